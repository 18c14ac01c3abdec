"""The command `fixmin`. Text goes to stdout, everything about it to stderr; rich on a terminal, plain in a pipe.

Exit codes: 0 success, 1 an error (one line on stderr; --debug adds the traceback), 2 wrong usage, 130 Ctrl-C,
141 the reader of stdout went away.
"""

import dataclasses
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import __version__
from .errors import FixminError

__all__ = ["app", "main"]

app = typer.Typer(
    name="fixmin",
    help="Language models without an input embedding table: convert, run and inspect them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)
# Commands whose arguments are parsed where they are implemented.
_FORWARD: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """Entry point of the `fixmin` script."""
    app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"fixmin {__version__}")
        raise typer.Exit


@app.command(**_FORWARD)
def convert(context: typer.Context) -> None:
    """Convert a Hugging Face checkpoint to GGUF and certify the result (needs fixmin-cpp[convert])."""
    _forward(context, "main")


@app.command(**_FORWARD)
def verify(context: typer.Context) -> None:
    """Certify a GGUF file against its checkpoint again (needs fixmin-cpp[convert])."""
    _forward(context, "verify_main")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="GGUF file, of any architecture.")],
    tokens: Annotated[
        list[str] | None,
        typer.Option("-t", "--token", help="Show the code of these ids or of the tokens of this text; repeatable."),
    ] = None,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Show a GGUF file: hyper-parameters, the code and its matrix, certificate, tensors."""
    from .inspect import render

    with _errors(debug):
        render(file, tokens or [], as_json=as_json)


@app.command()
def generate(
    model: Annotated[Path, typer.Option("-m", "--model", help="GGUF file.")],
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue. Default: stdin.")] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the prompt from a file (without its last newline).")
    ] = None,
    escape: Annotated[
        bool, typer.Option(help=r"Read \n, \t, \r, \" and \\ in --prompt and --stop as the characters they stand for.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", help="Upper limit of new tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "--temp", help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most probable tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability; 1: from all.")] = 1.0,
    seed: Annotated[int | None, typer.Option("-s", "--seed", help="Default: a random one, shown at the end.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="Default: what the machine offers.")] = None,
    ctx: Annotated[int | None, typer.Option("-c", "--ctx", help="Context positions. Default: the model's.")] = None,
    kv_type: Annotated[str, typer.Option(help="Type of the KV cache: f16 or f32.")] = "f16",
    stream: Annotated[bool, typer.Option(help="Print text as it is generated.")] = True,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No timings on stderr.")] = False,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Continue a prompt. The text goes to stdout, timings to stderr."""
    with _errors(debug):
        text = _read_prompt(prompt, file, escape)
        stops = [_unescape(s) if escape else s for s in stop or []]
        arguments = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "stop": stops,
            "ignore_eos": ignore_eos,
        }
        with _load(model, n_threads=threads, n_ctx=ctx, kv_type=kv_type) as loaded:
            # Through a stream in any case, so that Ctrl-C keeps what was written so far.
            with loaded.stream(text, **arguments) as pieces:
                for piece in pieces:
                    if stream and not as_json:
                        _write(piece.text)
            completion = pieces.completion
            if as_json:
                _write(json.dumps({"prompt": text, **dataclasses.asdict(completion)}, ensure_ascii=False))
            elif not stream:
                _write(completion.text)
            _write("\n")
        if not quiet and not as_json:
            t = completion.timings
            _note(
                f"{t.n_prompt} prompt tokens ({t.prefill_tok_s:,.0f}/s), "
                f"{t.n_generated} new ({t.decode_tok_s:,.1f}/s), finish {completion.finish_reason}"
                + (f", seed {completion.seed}" if temperature > 0 else "")
            )


@app.command()
def info(as_json: _Json = False, debug: _Debug = False) -> None:
    """Show the CPU, the instruction sets and the versions that this installation uses."""
    from .api import system_info

    with _errors(debug):
        report = system_info()
        if as_json:
            _write(json.dumps(report, indent=2) + "\n")
        elif sys.stdout.isatty():
            table = Table(show_header=False)
            for key, value in report.items():
                table.add_row(key, _plain(value))
            Console().print(table)
        else:
            _write("".join(f"{key}: {_plain(value)}\n" for key, value in report.items()))


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turns exceptions into a line on stderr and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit: let that write go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except KeyboardInterrupt:
        _note("interrupted")
        raise typer.Exit(130) from None
    except (FixminError, OSError, ValueError, MemoryError, ImportError) as error:
        if debug:
            traceback.print_exc()
        _note(f"error: {_one_line(error)}", "bold red")
        raise typer.Exit(1) from None


def _forward(context: typer.Context, name: str) -> None:
    """Runs a command of fixmin_cpp.convert.convert, which parses its own arguments."""
    arguments = list(context.args)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    with _errors(debug):
        try:
            # By name: it is a folder of its own in the source tree and part of the package once that is installed.
            commands = importlib.import_module(".convert.convert", __package__)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith(str(__package__)):
                raise
            raise ImportError(
                f"this command needs the Python package {error.name!r}: pip install 'fixmin-cpp[convert]'"
            ) from error
        code = getattr(commands, name)(arguments)
    raise typer.Exit(code or 0)


def _read_prompt(prompt: str | None, file: Path | None, escape: bool) -> str:
    if prompt is not None and file is not None:
        raise typer.BadParameter("give --prompt or --file, not both")
    if prompt is not None:
        return _unescape(prompt) if escape else prompt
    if file is not None:
        data, source = file.read_bytes(), str(file)
    else:
        if sys.stdin.isatty():
            raise typer.BadParameter("no prompt: give --prompt TEXT or --file FILE, or pipe text into stdin")
        data, source = sys.stdin.buffer.read(), "stdin"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None
    return text.removesuffix("\n").removesuffix("\r")  # the newline that editors and echo put at the end


def _unescape(text: str) -> str:
    r"""Replaces \n, \t, \r, \" and \\; any other backslash stays as it is."""
    letters = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
    result, i = [], 0
    while i < len(text):
        letter = letters.get(text[i + 1 : i + 2]) if text[i] == "\\" else None
        result.append(text[i] if letter is None else letter)
        i += 1 if letter is None else 2
    return "".join(result)


def _load(path: Path, **settings: Any) -> Any:
    """The model, with a progress bar if someone is watching."""
    from .model import Model

    if not sys.stderr.isatty():
        return Model(path, **settings)
    columns = (TextColumn("loading"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("load", total=1.0)
        return Model(path, progress=lambda done: progress.update(task, completed=done), **settings)


def _write(text: str) -> None:
    """To stdout at once, as UTF-8 whatever the locale says."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()


def _note(text: str, style: str = "dim") -> None:
    if sys.stderr.isatty():
        Console(stderr=True).print(text, style=style, markup=False, highlight=False)
    else:
        print(text, file=sys.stderr)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "not enough memory" if isinstance(error, MemoryError) else text


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


if __name__ == "__main__":
    main()
