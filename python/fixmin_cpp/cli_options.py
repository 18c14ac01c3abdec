"""The arguments of Model() and Model.generate() as options of the command line, made of the tables of them."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, TypeVar, get_origin

import typer

from .fields import Field
from .load_options import LOAD_FIELDS
from .sampling_fields import FIELDS, Biases, Breakers, Choices, Flag, Float, Ids, Int, Seeds, Text, Texts
from .serve_options import SERVE_FIELDS, SERVE_LOAD_FIELDS

__all__ = [
    "MACHINE",
    "OPTIONS",
    "from_argv",
    "load_options",
    "read_options",
    "read_prompt",
    "read_stdin",
    "read_text",
    "unescape",
    "with_environment",
    "with_load_options",
    "with_options",
    "with_serve_options",
]


class _Option(NamedTuple):
    argument: str  # of generate(), or of Model()
    type: Any  # list[...]: may be given several times; bool: a flag
    flags: tuple[str, ...]
    help: str
    panel: str
    metavar: str | None = None


# How values of an argument's type are written.
_WRITTEN: dict[Any, tuple[Any, str | None]] = {
    **{Flag: (bool, None), Int: (int, None), Float: (float, None), Seeds: (int, None), Text: (str, None)},
    **{Any: (str, None), Texts: (list[str], "TEXT"), Choices: (list[str], "TEXT"), Breakers: (list[str], "TEXT")},
    **{Ids: (list[int], "ID"), Biases: (list[str], "ID[+-]BIAS"), str: (str, None), int: (int, None)},
    **{float: (float, None), tuple[str, ...]: (list[str], "TEXT"), str | os.PathLike[str] | None: (Path, "PATH")},
}
_NAMES = re.compile(rf"\b({'|'.join(name for name in FIELDS if '_' in name)})\b")
MACHINE = "Model and machine"


def _option(name: str, row: Field, panel: str, shows_default: bool = True) -> _Option:
    flags = tuple((row.option or f"--{_hyphens(name)}").split())
    kind, metavar = _WRITTEN[row.kind]
    text = row.option_help or _NAMES.sub(lambda found: _hyphens(found[0]), row.help)
    if get_origin(kind) is list:
        text = text.removesuffix(".") + "; repeatable."
    if shows_default and kind in (int, float) and row.default is not None and not row.option_help:
        text += f" Default: {row.default:g}"
    return _Option(name, kind, flags, text, panel, metavar)


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


def _key(option: _Option) -> str:
    """The option's name in the command."""
    return next(flag for flag in option.flags if flag.startswith("--"))[2:].replace("-", "_")


def _sampling_options() -> list[_Option]:
    """Names and defaults are llama.cpp's where it has the option. What is not given is not passed on: defaults are
    those of generate(), and only shown here."""
    options, panel = [], ""
    for name, row in FIELDS.items():
        panel = row.heading or panel
        if row.option is not None:
            options.append(_option(name, row, panel))
        if name == "seed":
            made = "Several completions, with seeds made of the given one. Default: 1"
            options.append(_Option("n", int, ("--n",), made, panel))
            options.append(_Option("best_of", int, ("--best-of",), "The --n most probable of so many.", panel))
        if name in ("json_schema", "grammar"):
            options.append(_Option(name, Path, (f"--{_hyphens(name)}-file",), "The same, from a file.", panel))
    return options


OPTIONS: dict[str, _Option] = {_key(option): option for option in _sampling_options()}

_F = TypeVar("_F", bound=Callable[..., Any])


def with_options(before: str, without: Sequence[str] = ()) -> Callable[[_F], _F]:
    """Gives a command the sampling options but for `without` in the place of its **options; --help shows them before
    `before`."""
    return _adding(before, [_parameter(key, option) for key, option in OPTIONS.items() if key not in without])


def with_load_options(before: str, without: Sequence[str] = (), rare: bool = False) -> Callable[[_F], _F]:
    """Gives a command the load options but for `without`, and for the rare ones; for load_options()."""
    rows = {name: row for name, row in LOAD_FIELDS.items() if rare >= row.rare and name not in without}
    return _adding(before, _parameters(rows, MACHINE, "load_"))


def with_serve_options(before: str) -> Callable[[_F], _F]:
    """Gives a command the settings of a server, for ServeSettings()."""
    return _adding(before, _parameters({**SERVE_LOAD_FIELDS, **SERVE_FIELDS}, ""))


def _parameters(rows: Mapping[str, Field], panel: str, prefix: str = "") -> list[inspect.Parameter]:
    """Of a command; typer shows their defaults."""
    return [
        _parameter(prefix + name, _option(name, row, panel, shows_default=False), row.default)
        for name, row in rows.items()
        if row.option is not None
    ]


def load_options(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the load options out of a command's, as arguments of Model()."""
    return {name: options.pop(f"load_{name}") for name in LOAD_FIELDS if f"load_{name}" in options}


def with_environment(*others: str) -> Callable[[_F], _F]:
    """Each option of a command but `others` can be an environment variable: --max-queue is FIXMIN_MAX_QUEUE."""

    def add(command: _F) -> _F:
        for name, parameter in inspect.signature(command).parameters.items():
            for shown in getattr(parameter.annotation, "__metadata__", ()):
                if name not in others:
                    # typer takes the first of its own names for a default.
                    flags = [one for one in (shown.default, *(shown.param_decls or ())) if isinstance(one, str)]
                    shown.envvar = f"FIXMIN_{(flags or [name])[-1].lstrip('-').replace('-', '_').upper()}"
        return command

    return add


def _adding(before: str, more: list[inspect.Parameter]) -> Callable[[_F], _F]:
    def add(command: _F) -> _F:
        own = inspect.signature(command).parameters.values()
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        at = next(i for i, parameter in enumerate(parameters) if parameter.name == before)
        parameters[at:at] = more
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return add


def _parameter(key: str, option: _Option, default: Any = None) -> inspect.Parameter:
    flag = option.type is bool
    about: dict[str, Any] = {"metavar": option.metavar, "rich_help_panel": option.panel or None}
    shown = typer.Option(*option.flags, help=option.help, **about)
    default = False if flag else None if default == () else default
    kind = option.type if default is not None else option.type | None
    return inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown])


def read_options(values: Mapping[str, Any], escape: bool) -> dict[str, Any]:
    """What was given of the options, as arguments of Model.generate()."""
    plain: Callable[[str], str] = unescape if escape else str
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or value is False or value == []:
            continue
        if isinstance(value, str):
            value = from_argv(value)
        elif isinstance(value, list) and isinstance(value[0], str):
            value = [from_argv(text) for text in value]
        argument = OPTIONS[name].argument
        if argument in arguments:
            raise typer.BadParameter(f"give --{argument.replace('_', '-')} or --{name.replace('_', '-')}, not both")
        if name == "logit_bias":
            value = _logit_bias(value)
        elif name in ("no_prefix_cache", "no_parse_special"):
            value = False
        elif name == "dry_sequence_breaker":
            value = [] if value == ["none"] else [plain(text) for text in value]
        elif name in ("stop", "choice"):
            value = [plain(text) for text in value]
        elif isinstance(value, Path):
            value = read_text(value)
        arguments[argument] = value
    return arguments


#: Of a text, bytes: a device or a pipe that never ends is not read until memory is gone.
MOST_TEXT = 1 << 30


def read_text(file: Path) -> str:
    """The text of a file, of stdin for "-". ValueError: it is not UTF-8, or longer than MOST_TEXT. OSError."""
    if str(file) == "-":
        return read_stdin()
    with file.open("rb") as opened:
        return _read(opened, str(file))


def read_stdin() -> str:
    """All of stdin as text. ValueError: as of read_text."""
    if sys.stdin is None:
        raise typer.BadParameter("stdin is closed: there is nothing to read")  # type: ignore[unreachable]
    return _read(sys.stdin.buffer, "stdin")


def _read(file: BinaryIO, source: str) -> str:
    data = bytearray()
    while piece := file.read(1 << 20):
        data += piece
        if len(data) > MOST_TEXT:
            raise ValueError(f"{source}: the text has more than {MOST_TEXT:,} bytes, the most that is read")
    return decode(bytes(data), source)


def read_prompt(prompt: str | None, file: Path | None, escape: bool) -> str:
    """The text that a command is given: by --prompt, by --file, or by stdin."""
    if prompt is not None and file is not None:
        raise typer.BadParameter("give --prompt or --file, not both")
    if prompt is not None and prompt != "-":
        prompt = from_argv(prompt)
        return unescape(prompt) if escape else prompt
    if prompt is None and file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise typer.BadParameter("no prompt: give --prompt TEXT or --file FILE, or pipe text into stdin")
    text = read_stdin() if file is None else read_text(file)
    return text.removesuffix("\n").removesuffix("\r")  # the newline that editors and echo put at the end


def from_argv(text: str) -> str:
    """An argument as UTF-8, also where the locale has another encoding. ValueError: it is not UTF-8."""
    if any("\udc80" <= letter <= "\udcff" for letter in text):  # bytes that the locale could not read
        return decode(os.fsencode(text), "the command line")
    return text


def decode(data: bytes, source: str) -> str:
    """UTF-8 from `source` as text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def unescape(text: str) -> str:
    r"""Replaces \n, \t, \r, \" and \\; any other backslash stays as it is."""
    letters = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
    return re.sub(r'\\([ntr"\\])', lambda found: letters[found[1]], text)


def _logit_bias(options: list[str]) -> dict[int, float]:
    """ID+BIAS or ID-BIAS, as llama.cpp writes it."""
    biases = {}
    for option in options:
        match = re.fullmatch(r"(\d+)([+-].+)", option)
        try:
            biases[int(match[1])] = float(match[2])  # type: ignore[index]
        except (TypeError, ValueError):
            raise typer.BadParameter(f"--logit-bias must be ID+BIAS or ID-BIAS, got {option!r}") from None
    return biases
