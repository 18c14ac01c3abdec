"""Commands that take a model by its name: run, pull, and the cache of what they have converted."""

import glob
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_output as output
from .atomic_file import AtomicFile, refuse_inputs, terminate_cleanly
from .cli_app import INPUT, MAKE, MEASURE, RUN, Debug, Escape, Json, app
from .cli_help import App
from .cli_options import from_argv, load_options, read_options, read_prompt, with_load_options, with_options
from .errors import ArgumentError
from .hub import CachedModel, Found, cache_folder, cached_models, facts_of, remove_cached

__all__ = ["run"]

_WHERE = "The model"
_PHASES = ("look", "download", "convert", "load", "prompt", "answer")


def _names(incomplete: str) -> list[str]:
    """For the shell: models that have been converted before, and files."""
    known = {m.source for m in cached_models()}
    paths = [f"{path}/" if Path(path).is_dir() else path for path in glob.glob(f"{glob.escape(incomplete)}*")]
    return sorted(name for name in (*known, *paths) if name.startswith(incomplete))


_Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="OWNER/NAME[@REVISION][:TYPE] of the Hugging Face hub, a checkpoint folder, or a GGUF file.",
        autocompletion=_names,
        show_default=False,
    ),
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        "--outtype",
        metavar="TYPE",
        help="Type of the matrices where it is converted: q8_0 (default), q4_0, f32, q4_k_m ...",
        rich_help_panel=_WHERE,
    ),
]
_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.", rich_help_panel=_WHERE)]
_Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the model's Python code without a question.", rich_help_panel=_WHERE),
]
_Offline = Annotated[
    bool, typer.Option("--offline", help="Ask no network: what the caches have.", rich_help_panel=_WHERE)
]


@app.command(rich_help_panel=RUN)
@with_load_options(before="debug")
@with_options(before="debug", without=["n", "best_of", "logprobs", "prompt_logprobs"])
def run(
    model: _Name,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The text; -: stdin. Default on a terminal: a session.")
    ] = None,
    given: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The same as PROMPT.", rich_help_panel=INPUT)
    ] = None,
    dtype: _Dtype = None,
    revision: _Revision = None,
    trust_remote_code: _Trust = False,
    offline: _Offline = False,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Read the text from a file.", rich_help_panel=INPUT)
    ] = None,
    interactive: Annotated[
        bool, typer.Option("-i", "--interactive", help="Go on with a session after the prompt.", rich_help_panel=INPUT)
    ] = False,
    escape: Escape = True,
    color: Annotated[
        bool | None,
        typer.Option(
            "--color/--no-color",
            help="Colour what the model writes. Default: on a terminal, without NO_COLOR.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Nothing on stderr but errors.", rich_help_panel=INPUT)
    ] = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Run a model by its name: find or download it, convert and certify it once, continue a prompt or hold a session.

    Code that comes with a model runs while it is converted, and only after a yes. The result is kept in a cache.
    """
    with output.errors(debug):
        load, arguments = load_options(options), read_options(options, escape)
        if prompt is not None and given is not None:
            raise typer.BadParameter("give PROMPT or --prompt, not both")
        prompt = given if prompt is None else prompt
        on_terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        session = interactive or (prompt is None and file is None and on_terminal)
        if session and not on_terminal:
            raise typer.BadParameter("--interactive needs a terminal")
        text = None if session and prompt is None and file is None else read_prompt(prompt, file, escape)
        colored = output.colored(color)
        with terminate_cleanly():
            found = locate(model, dtype, revision, trust_remote_code, offline, quiet)
        begin = time.monotonic()
        with output.load(found.path, quiet=quiet, **load) as loaded:
            found.seconds["load"] = time.monotonic() - begin
            if session:
                tell_phases(found, quiet)
                _session(loaded, arguments, text, color=colored, escape=escape, quiet=quiet)
                return
            with loaded.stream(text, **arguments) as pieces:
                for piece in pieces:
                    output.write(output.painted(piece.text, colored))
            output.write("\n")
            timings = pieces.completion.timings
            found.seconds["prompt"], found.seconds["answer"] = timings.prefill_s, timings.decode_s
            tell_phases(found, quiet)
            if not quiet:
                output.note(output.summary(pieces.completion, sampled=arguments.get("temperature", 0.0) > 0))
                output.tell_without_effect(arguments)


def _session(model: Any, arguments: dict[str, Any], first: str | None, **how: Any) -> None:
    module = output.extra("cli_session", "run")
    model.require_tokenizer()
    module.Session(model, arguments, **how).run(cache_folder() / "history", first)


@app.command(rich_help_panel=RUN)
def pull(
    model: _Name,
    dtype: _Dtype = None,
    revision: _Revision = None,
    trust_remote_code: _Trust = False,
    offline: _Offline = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on stderr but errors.")] = False,
    debug: Debug = False,
) -> None:
    """Find or download a model, convert and certify it into the cache, and print the path of the file."""
    with output.errors(debug), terminate_cleanly():
        found = locate(model, dtype, revision, trust_remote_code, offline, quiet)
        tell_phases(found, quiet)
        output.write(f"{found.path}\n")


def locate(model: str, dtype: str | None, revision: str | None, trust: bool, offline: bool, quiet: bool) -> Found:
    """As hub.find does, with a question on the terminal before code runs."""
    return output.locate(
        from_argv(model),
        quiet=quiet,
        dtype=dtype,
        revision=revision,
        local_files_only=offline,
        **({"trust_remote_code": True} if trust else {}),
    )


def tell_phases(found: Found, quiet: bool) -> None:
    """How long each phase took that took any time."""
    if not quiet:
        shown = [f"{name} {found.seconds[name]:.2f} s" for name in _PHASES if found.seconds.get(name, 0) >= 0.005]
        output.note(f"{found.path.name}: {', '.join(shown) or 'at once'}")


# --- the cache ----------------------------------------------------------------------------------------------------

_cache = App(
    name="cache", help="Show or remove the converted models that `fixmin run` and others keep.", no_args_is_help=True
)
app.add_typer(_cache, rich_help_panel=MEASURE)


@_cache.command("list")
def list_cache(as_json: Json = False, debug: Debug = False) -> None:
    """Show the converted models, the newest last."""
    with output.errors(debug):
        models = cached_models()
        if as_json:
            output.write(json.dumps([facts_of(m) for m in models], indent=2) + "\n")
            return
        for m in models:
            output.write(f"{_shown(m)}\n")
        total = sum(m.n_bytes for m in models)
        output.note(f"{len(models)} model{'s' * (len(models) != 1)}, {total / 1e6:,.1f} MB, in {cache_folder()}")


@_cache.command("rm")
def remove(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME ...", help="OWNER/NAME or a folder, with @REVISION or :TYPE if wanted; a path."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    debug: Debug = False,
) -> None:
    """Remove converted models. Checkpoints in the cache of huggingface_hub stay: `hf cache rm` removes those."""
    with output.errors(debug):
        if bool(names) == everything:
            raise ArgumentError("name the models, or give --all")
        for m in remove_cached(None if everything else [from_argv(name) for name in names or []]):
            output.write(f"removed {_shown(m)}\n")


def _shown(m: CachedModel) -> str:
    commit = f"@{m.commit[:12]}" if m.commit else ""
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(m.made))
    return f"{m.source}{commit}:{m.dtype}  {m.n_bytes / 1e6:,.1f} MB  {made}  {m.path}"


# --- what the hub shows -------------------------------------------------------------------------------------------


@app.command(rich_help_panel=MAKE)
def card(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.gguf ...", help="All GGUF files of the repository.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="README.md", help="File to write. Default: stdout.")
    ] = None,
    repository: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Where the files will lie.")] = None,
    base_model: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="The checkpoint on the hub.")] = None,
    license: Annotated[str | None, typer.Option(metavar="NAME", help="Of the weights, as apache-2.0.")] = None,
    debug: Debug = False,
) -> None:
    """Write the README.md of a hub repository of GGUF files, with the figures of their certificates."""
    from .card import card as text_of

    with output.errors(debug):
        text = text_of(files, repository=repository, base_model=base_model, license=license)
        if out is None:
            output.write(text)
            return
        refuse_inputs(out, *files)
        if out.exists():
            raise ArgumentError(f"{out} exists: name another file")
        with AtomicFile(out) as file:
            file.write(text.encode())
            file.commit()
        output.note(f"wrote {out}")
