"""What the command line writes: results to stdout, everything about them to stderr, errors as a line and a code."""

import contextlib
import importlib
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .atomic_file import naming
from .errors import FixminError
from .hub import Code, Found
from .inspect import printable
from .progress import bar as _terminal_bar
from .recognise import folder_and_type, hub_id

__all__ = [
    "Stdout",
    "bar",
    "colored",
    "errors",
    "extra",
    "guarded",
    "json_pieces",
    "load",
    "locate",
    "note",
    "painted",
    "report",
    "status",
    "summary",
    "tell_without_effect",
    "write",
]

# Import names of what an extra of this package installs. A test compares them with pyproject.toml.
EXTRAS = {
    "convert": ("torch", "transformers", "safetensors", "gguf"),
    "quantize": ("gguf", "ggml"),
    "grammar": ("llguidance",),
    "serve": ("fastapi", "uvicorn", "h11", "prometheus_client", "jinja2", "llguidance", "starlette", "pydantic"),
    "ray": ("ray",),
    "hub": ("huggingface_hub",),
    "run": ("prompt_toolkit",),
    "eval": ("lm_eval", "typing_extensions"),
    "bench": ("matplotlib",),
    "compare": ("datasets", "lm_eval", "typing_extensions", "matplotlib"),
}
_MOST_FILES = 20  # of a checkpoint's code that are shown before it runs
_PATIENCE = 0.4  # seconds after which a line says what takes so long, where no bar can be seen


class Stdout(Console):
    """The screen or the pipe at stdout, where rich must not end the process itself when the reader goes away."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that is being handled

    def print(self, *objects: Any, **options: Any) -> None:
        """As Console's. OSError: it names stdout."""
        with naming("stdout"):
            super().print(*objects, **options)


def guarded(run: Callable[[], object]) -> None:
    """Runs the whole program: errors that reach this far, also those of writing help, end it with a line and a code."""
    _open_closed_streams()
    if callable(signal.getsignal(signal.SIGINT)):  # neither ignored nor left to the system
        signal.signal(signal.SIGINT, _interrupt_once)
    code: Any = 0
    try:
        with errors(debug=False):
            try:
                with naming("stdout"):  # commands have errors() of their own: what is left is help and the like
                    run()
            except SystemExit as end:  # what typer ends with
                code = end.code
                if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # how it ends if the reader of help goes away
                    code = 141
    except typer.Exit as end:
        code = end.exit_code
    _discard(sys.stderr)
    sys.exit(code)


def _interrupt_once(number: int, frame: object) -> None:
    """The first Ctrl-C ends the command in order; the next one at once, for what it would break is just that order."""
    signal.signal(number, lambda *_: os._exit(130))
    raise KeyboardInterrupt


def _open_closed_streams() -> None:
    """Gives the numbers 0 to 2 back to what they stand for if the caller has closed them (`>&-`).

    A file opened later would get the number, and what is meant for stdout would be written into it.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):  # nothing can be written to such a 1
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)  # type: ignore[unreachable]  # it may be None
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)  # type: ignore[unreachable]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a letter that the terminal does not have is no reason to end
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def errors(debug: bool, tell: Callable[[str], object] | None = None) -> Iterator[None]:
    """Turns exceptions into a line on stderr and an exit code. `tell`: writes the line in another form."""
    try:
        yield
        with naming("stdout"):
            sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        raise typer.Exit(141) from None
    except KeyboardInterrupt:
        note("interrupted")
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if tell is None:
            if debug:
                traceback.print_exc()
            note(f"error: {_one_line(error)}", "bold red")
        else:
            tell(_one_line(error))
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        _discard(sys.stdout)
        raise typer.Exit(1) from None


def _discard(stream: TextIO) -> None:
    """Python flushes its streams once more when it ends: lets that write go nowhere if it cannot go anywhere else."""
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(error: Exception) -> str:
    if isinstance(error, MemoryError):
        text = str(error)
        return text if "memory" in text else "not enough memory"
    missing = _missing_package(error)
    if missing is not None:
        return missing
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    line = printable(" ".join(text.split())) or type(error).__name__
    expected = isinstance(error, FixminError | OSError | ValueError | ImportError)
    return line if expected else f"{type(error).__name__}: {line} (--debug shows where)"


def _missing_package(error: BaseException) -> str | None:
    """Which extra to install, if this error comes from a package that is not there."""
    found = None
    while isinstance(error, ImportError):
        if isinstance(error, ModuleNotFoundError) and error.name:
            found = error.name.partition(".")[0]
        error = error.__cause__ or error.__context__ or Exception()  # transformers wraps the one that matters
    for name in (*_wanted, *EXTRAS):
        if found in EXTRAS[name]:
            install = f"pip install 'fixmin-cpp[{name}]', or '.[{name}]' in its source folder"
            return f"this command needs the Python package {found!r}: {install}"
    return None


_wanted: list[str] = []  # extras of the command that runs


def extra(module: str, name: str) -> Any:
    """A module of this package that needs an extra."""
    _wanted.append(name)
    # By name: it is a folder of its own in the source tree and part of the package once that is installed.
    return importlib.import_module(f".{module}", __package__)


def locate(model: str | os.PathLike[str], *, quiet: bool = False, **selection: Any) -> Found:
    """The file of a model, by hub.find: what is no file may be converted first, after a question if code runs then."""
    from .hub import find

    text = os.fspath(model)
    if not (os.path.exists(text) or hub_id(text) or folder_and_type(text) or selection):
        return Found(Path(model), os.fspath(model))  # whoever opens it says that it is not there, in its turn
    selection = {"trust_remote_code": _confirm, **selection}
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before huggingface_hub is imported
    return find(model, log=None if quiet else _tell, **selection)


_SHOWN = ("converting", "certified", "warning", "the hub", "another process")


def _tell(line: str) -> None:
    """Of a conversion's lines those that everybody wants to see; `fixmin convert` shows them all."""
    if line.startswith(_SHOWN):
        note(printable(line))


def _confirm(code: Code) -> bool:
    """Shows what would run and asks. Without a terminal nobody can say yes."""
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    lines = code.lines()
    more = len(lines) - _MOST_FILES
    note(f"{code.where} comes with Python code. Converting runs it, and it could do anything that you can do:", "bold")
    for line in [*lines[:_MOST_FILES], *([f"and {more} more"] if more > 0 else [])]:
        print(f"  {printable(line)}", file=sys.stderr, flush=True)  # not broken at the width of the terminal
    while True:
        print("Run it? [y/N]: ", end="", file=sys.stderr, flush=True)
        try:
            answer = input().strip().lower()
        except EOFError:
            print(file=sys.stderr)
            return False
        if answer in ("", "n", "no", "y", "yes"):
            return answer.startswith("y")


def colored(wanted: bool | None) -> bool:
    """Whether to colour stdout: as wanted, or if it is a terminal that has colours and nobody minds (NO_COLOR)."""
    if wanted is not None:
        return wanted
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in (None, "", "dumb")


def painted(text: str, color: bool) -> str:
    """What a model wrote, in its colour."""
    return f"\x1b[32m{text}\x1b[0m" if color and text else text


def summary(completion: Any, *, sampled: bool) -> str:
    """Tokens, speed and end of a completion, and its seed if chance had a part in it."""
    t = completion.timings
    return (
        f"{t.n_prompt} prompt tokens ({t.prefill_tok_s:,.0f}/s), "
        f"{t.n_generated} new ({t.decode_tok_s:,.1f}/s), finish {completion.finish_reason}"
        + (f", seed {completion.seed}" if sampled else "")
    )


# What does nothing while the most probable token is taken.
_OF_CHANCE = (
    "seed top_n_sigma top_k typical_p top_p min_p xtc_probability xtc_threshold min_keep mirostat dynatemp_range"
)


def tell_without_effect(arguments: Mapping[str, Any]) -> None:
    """A line to stderr if options were given that did nothing."""
    given = [f"--{name.replace('_', '-')}" for name in _OF_CHANCE.split() if name in arguments]
    if given and "temperature" not in arguments:
        note(f"{', '.join(given)} had no effect: without --temp the most probable token is taken")


def load(model: Path, *, quiet: bool = False, **settings: Any) -> Any:
    """The model, with a progress bar if someone is watching; in a pipe with a line if it takes a while."""
    from .model import Model

    path = locate(model, quiet=quiet).path
    if quiet:
        return Model(path, **settings)
    if not sys.stderr.isatty():
        with status(False) as tell:
            tell(f"loading {path}")
            return Model(path, **settings)
    columns = (TextColumn("loading"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("load", total=1.0)
        return Model(path, progress=lambda done: progress.update(task, completed=done), **settings)


@contextmanager
def bar(title: str, silent: bool) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, in a pipe a line that says what is being done, if it takes a while."""
    with status(silent or sys.stderr.isatty()) as tell, _terminal_bar(title, silent) as update:
        tell(title)
        yield update


@contextmanager
def status(silent: bool) -> Iterator[Callable[[str], None]]:
    """What is going on, on stderr: a line that changes on a terminal, in a pipe one line after the other.

    What is over at once, such as an error, comes without such lines there.
    """
    if silent:
        yield lambda text: None
    elif sys.stderr.isatty():
        with Console(stderr=True).status("") as shown:
            yield shown.update
    else:
        lines = _Lines()
        try:
            yield lines.tell
        finally:
            lines.timer.cancel()


class _Lines:
    """Shows the newest line once _PATIENCE is over, and from then on each as it comes."""

    def __init__(self) -> None:
        self._text = ""
        self._lock = threading.Lock()
        self._waiting = True
        self.timer = threading.Timer(_PATIENCE, self._begin)
        self.timer.daemon = True
        self.timer.start()

    def tell(self, text: str) -> None:
        with self._lock:
            self._text = text
            if not self._waiting:
                note(f"{text} ...")

    def _begin(self) -> None:
        with self._lock:
            self._waiting = False
            if self._text:
                note(f"{self._text} ...")


def report(facts: Mapping[str, Any], as_json: bool) -> None:
    """To stdout: one JSON object, a table on a terminal, lines in a pipe."""
    if as_json:
        write(json.dumps(_finite(dict(facts)), indent=2, allow_nan=False) + "\n")
    elif sys.stdout.isatty():
        table = Table(show_header=False)
        for key, value in facts.items():
            table.add_row(key, printable(_plain(value)))
        Stdout(markup=False).print(table)
    else:
        write("".join(f"{key}: {printable(_plain(value))}\n" for key, value in facts.items()))


def _finite(value: Any) -> Any:
    """As JSON can hold it: null for the perplexity, say, that is beyond a double."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(text: str) -> None:
    """To stdout at once, as UTF-8 whatever the locale says; file names of other bytes as these."""
    with naming("stdout"):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()


def note(text: str, style: str = "dim") -> None:
    """A line to stderr. Nothing happens if it cannot be written."""
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            Console(stderr=True).print(text, style=style, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def json_pieces(pieces: Sequence[str | bytes]) -> dict[str, Any]:
    """Tokens as JSON can hold them: "pieces", their texts with U+FFFD for parts of characters, and "bytes"."""
    data = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    return {"pieces": [one.decode(errors="replace") for one in data], "bytes": [list(one) for one in data]}
