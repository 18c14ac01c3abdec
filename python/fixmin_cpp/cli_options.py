"""The arguments of Model.generate() as options of the command line, each a row of one table."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import typer

__all__ = ["OPTIONS", "from_argv", "read_options", "read_prompt", "read_stdin", "read_text", "unescape", "with_options"]


class _Option(NamedTuple):
    type: Any  # list[...]: may be given several times; bool: a flag
    help: str
    names: tuple[str, ...] = ()  # in place of the one made of the option's own
    metavar: str | None = None
    argument: str | None = None  # of generate(), if it has another name


# Names and defaults are llama.cpp's where it has the option. What is not given is not passed on:
# defaults are those of generate(), and only shown here.
_GROUPS: dict[str, dict[str, _Option]] = {
    "Prompt": {
        "no_parse_special": _Option(
            bool, "Read names of special tokens in the prompt, as </s>, as plain text.", argument="parse_special"
        ),
    },
    "Length": {
        "max_new_tokens": _Option(
            int, "Upper limit of new tokens; -1: until the context ends. Default: 128", ("-n", "--max-new-tokens")
        ),
        "min_new_tokens": _Option(int, "Do not end before so many. Default: 0"),
        "stop": _Option(list[str], "End before this text; repeatable.", metavar="TEXT"),
        "stop_id": _Option(list[int], "End at this token; repeatable.", metavar="ID", argument="stop_ids"),
        "ignore_eos": _Option(bool, "Never draw the end-of-text token."),
        "timeout": _Option(float, "End after so many seconds."),
    },
    "Chance": {
        "temperature": _Option(float, "Default: 0, greedy", ("--temperature", "--temp")),
        "seed": _Option(
            int, "The same one, the same text. Default: -1, a random one, shown at the end.", ("-s", "--seed")
        ),
        "n": _Option(int, "Several completions, with seeds made of the given one. Default: 1"),
        "best_of": _Option(int, "The --n most probable of so many."),
        "dynatemp_range": _Option(float, "Temperature +- range, by the entropy. Default: 0"),
        "dynatemp_exponent": _Option(
            float, "How it depends on the entropy. Default: 1", ("--dynatemp-exponent", "--dynatemp-exp")
        ),
    },
    "Which tokens may be drawn, in this order": {
        "top_n_sigma": _Option(
            float, "Logits within n deviations of the largest. Default: -1, off", ("--top-n-sigma", "--top-nsigma")
        ),
        "top_k": _Option(int, "From the k most probable tokens. Default: 40; 0 or -1: all"),
        "typical_p": _Option(float, "From this share of typical tokens. Default: 1, off", ("--typical-p", "--typical")),
        "top_p": _Option(float, "From this share of the probability. Default: 0.95; 1: all"),
        "min_p": _Option(float, "From tokens so probable beside the first. Default: 0.05; 0: all"),
        "xtc_probability": _Option(float, "How often to leave out the most probable tokens. Default: 0"),
        "xtc_threshold": _Option(float, "Which these are. Default: 0.1"),
        "min_keep": _Option(int, "Tokens that typical-p, top-p, min-p and XTC leave at least. Default: 0"),
        "mirostat": _Option(int, "1 or 2 in place of all that. Default: 0, off"),
        "mirostat_tau": _Option(
            float, "Surprise in bits that mirostat aims at. Default: 5", ("--mirostat-tau", "--mirostat-ent")
        ),
        "mirostat_eta": _Option(float, "How fast. Default: 0.1", ("--mirostat-eta", "--mirostat-lr")),
    },
    "Repetition": {
        "repeat_penalty": _Option(float, "Divides logits of recent tokens. Default: 1, off"),
        "presence_penalty": _Option(float, "Subtracted from logits of recent tokens. Default: 0"),
        "frequency_penalty": _Option(float, "The same, for every time. Default: 0"),
        "repeat_last_n": _Option(int, "Which are recent, prompt included. Default: 64; -1: all"),
        "openai_penalties": _Option(
            bool, "Presence and frequency: of all generated tokens and none of the prompt, as OpenAI's."
        ),
        "dry_multiplier": _Option(float, "DRY, against repeated sequences. Default: 0, off"),
        "dry_base": _Option(float, "DRY: growth with their length. Default: 1.75"),
        "dry_allowed_length": _Option(int, "DRY: length that costs nothing yet. Default: 2"),
        "dry_penalty_last_n": _Option(int, "DRY: tokens to look back. Default: -1, all"),
        "dry_sequence_breaker": _Option(
            list[str],
            "DRY: repetitions end here; repeatable, 'none' for none. Default: newline : \" *",
            metavar="TEXT",
            argument="dry_sequence_breakers",
        ),
    },
    "Single tokens": {
        "logit_bias": _Option(
            list[str], "Add to a logit: 17+1.5, 17-inf; repeatable.", ("-l", "--logit-bias"), "ID[+-]BIAS"
        ),
        "banned_id": _Option(list[int], "Never draw this token; repeatable.", metavar="ID", argument="banned_ids"),
        "allowed_id": _Option(
            list[int], "Draw nothing but these tokens; repeatable.", metavar="ID", argument="allowed_ids"
        ),
    },
    "Form of the text (needs fixmin-cpp[grammar])": {
        "json_schema": _Option(str, "The text is JSON of this schema ({}: any).", ("-j", "--json-schema")),
        "json_schema_file": _Option(Path, "The same, from a file.", argument="json_schema"),
        "regex": _Option(str, "The text matches it."),
        "grammar": _Option(str, "The text is of this grammar, Lark or GBNF."),
        "grammar_file": _Option(Path, "The same, from a file.", argument="grammar"),
        "choice": _Option(
            list[str], "The text is this or another one given so; repeatable.", metavar="TEXT", argument="choices"
        ),
    },
    "Probabilities and speed": {
        "logprobs": _Option(int, "With --json: log-probabilities of the tokens, and of the k most probable."),
        "prompt_logprobs": _Option(int, "With --json: the same for the prompt."),
        "prompt_lookup_num_tokens": _Option(int, "Guess up to so many tokens from the text so far. Default: 0"),
        "no_prefix_cache": _Option(bool, "Read the prompt for every completion.", argument="prefix_cache"),
    },
}
OPTIONS: dict[str, _Option] = {name: option for group in _GROUPS.values() for name, option in group.items()}

_F = TypeVar("_F", bound=Callable[..., Any])


def with_options(before: str) -> Callable[[_F], _F]:
    """Gives a command the options of the table in the place of its **options; --help shows them before `before`."""

    def add(command: _F) -> _F:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == before:
                for panel, group in _GROUPS.items():
                    parameters += [_parameter(name, option, panel) for name, option in group.items()]
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return add


def _parameter(name: str, option: _Option, panel: str) -> inspect.Parameter:
    names = option.names or (f"--{name.replace('_', '-')}",)
    kind = bool if option.type is bool else option.type | None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if option.type is bool else None,
        annotation=Annotated[
            kind, typer.Option(*names, help=option.help, metavar=option.metavar, rich_help_panel=panel)
        ],
    )


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
        argument = OPTIONS[name].argument or name
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


def read_text(file: Path) -> str:
    """The text of a file, of stdin for "-". ValueError: it is not UTF-8. OSError."""
    if str(file) == "-":
        return read_stdin()
    return decode(file.read_bytes(), str(file))


def read_stdin() -> str:
    """All of stdin as text. ValueError: it is not UTF-8."""
    if sys.stdin is None:
        raise typer.BadParameter("stdin is closed: there is nothing to read")  # type: ignore[unreachable]
    return decode(sys.stdin.buffer.read(), "stdin")


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
    result, i = [], 0
    while i < len(text):
        letter = letters.get(text[i + 1 : i + 2]) if text[i] == "\\" else None
        result.append(text[i] if letter is None else letter)
        i += 1 if letter is None else 2
    return "".join(result)


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
