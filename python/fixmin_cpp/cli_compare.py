"""The command `fixmin compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_output as output
from .atomic_file import refuse_inputs, terminate_cleanly
from .cli_app import MEASURE, Debug, Json, app
from .cli_options import load_options, read_text, with_load_options

__all__ = ["compare"]

TEXT, SPEED, TASKS, CHECKPOINTS = "The held-out text", "Speed", "Tasks (needs fixmin-cpp[compare])", "Checkpoints"


@app.command(rich_help_panel=MEASURE)
@with_load_options(before="as_json", without=["n_ctx"])
def compare(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL", help="GGUF files, checkpoint folders, repositories of the hub. The first is the base."
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for results; what it has is used again.")
    ] = Path("compare"),
    text: Annotated[
        Path | None, typer.Option("--text", "-f", "--file", help="Text, UTF-8; -: stdin.", rich_help_panel=TEXT)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Stream it instead: fineweb-edu+cosmopedia, or one of them (needs fixmin-cpp[compare]).",
            rich_help_panel=TEXT,
        ),
    ] = None,
    n_tokens: Annotated[int, typer.Option(help="Tokens to stream, at least.", rich_help_panel=TEXT)] = 100_000,
    seed: Annotated[int, typer.Option(help="Of the order of streamed documents.", rich_help_panel=TEXT)] = 0,
    skip: Annotated[int, typer.Option(help="Documents of each data set to skip.", rich_help_panel=TEXT)] = 0,
    ctx: Annotated[
        int | None,
        typer.Option("-c", "--ctx", help="Tokens of a window. Default: the shortest context.", rich_help_panel=TEXT),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(help="Stop after so many. Default: the whole text.", rich_help_panel=TEXT)
    ] = None,
    outtype: Annotated[
        str, typer.Option(help="Weight type that checkpoints are converted to.", rich_help_panel=CHECKPOINTS)
    ] = "f32",
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run the code of checkpoints, as convert.", rich_help_panel=CHECKPOINTS
        ),
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure it: all models are in memory.", rich_help_panel=SPEED)
    ] = True,
    prompt: Annotated[
        int | None,
        typer.Option("-p", "--prompt", help="Tokens of a prefill. Default: 512, or what fits.", rich_help_panel=SPEED),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            "-n", "--generate", help="Tokens decoded one by one. Default: 64, or what fits.", rich_help_panel=SPEED
        ),
    ] = None,
    repeat: Annotated[
        int, typer.Option("-r", "--repeat", help="How often the models take turns.", rich_help_panel=SPEED)
    ] = 5,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="hellaswag,arc_easy,...", rich_help_panel=TASKS)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Tasks of your own, as YAML.", rich_help_panel=TASKS)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of a task. Default: all.", rich_help_panel=TASKS)] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before a question. Default: the task's.", rich_help_panel=TASKS)
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Compare models on a held-out text: perplexity, size, speed and tasks, beside the paper's figures.

    Writes compare.md, .csv, .tex, .json and, with matplotlib, .png and .svg. A run that was ended goes on with what DIR
    has; a model, text or setting that has changed is measured again. docs/compare.md says what the errors mean.
    """
    if (text is None) == (dataset is None):
        raise typer.BadParameter("give --text FILE or --dataset NAMES" + (", not both" if text is not None else ""))
    with output.errors(debug), terminate_cleanly():
        comparison = output.extra("compare", "compare")
        for name in comparison.REPORT_FILES:
            refuse_inputs(out / name, text, *models)
        held_out = read_text(text) if text is not None else comparison.Mixture.parse(dataset, n_tokens, seed, skip)
        trust = {"trust_remote_code": True} if trust_remote_code else {}
        for model in models:  # which may ask: not while a line of progress is shown
            if not model.is_file():
                output.locate(model, quiet=as_json, dtype=outtype, **trust)
        with output.status(as_json) as tell:
            found = comparison.compare(
                models,
                held_out,
                out,
                text_name=text.name if text is not None else "",
                outtype=outtype,
                trust_remote_code=trust_remote_code,
                ctx=ctx or None,
                max_windows=max_windows,
                speed=speed,
                n_prompt=prompt,
                n_generate=generate,
                repeat=repeat,
                tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
                include_path=include_path,
                limit=limit,
                num_fewshot=num_fewshot,
                tell=tell,
                **load_options(options),
            )
        written = comparison.write_report(found, out)
        if as_json:
            output.write((out / "compare.json").read_text(encoding="utf-8"))
            return
        output.write(comparison.markdown(found))
        output.note(f"wrote {', '.join(path.name for path in written)} to {out}")
        if not any(path.suffix == ".png" for path in written):
            output.note("no plot: it needs the Python package 'matplotlib': pip install 'fixmin-cpp[compare]'")
