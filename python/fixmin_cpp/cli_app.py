"""The application `fixmin`, and what several of its commands share: headings and options.

A file of commands (cli, cli_*) takes them from here, and cli imports every such file.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_help import App
from .cli_options import MACHINE

__all__ = [
    "CLUSTER",
    "FORWARD",
    "INPUT",
    "JOB",
    "MAKE",
    "MEASURE",
    "MODEL_HELP",
    "RUN",
    "All",
    "Debug",
    "Escape",
    "File",
    "Json",
    "Model",
    "Prompt",
    "Text",
    "app",
]

app = App(
    name="fixmin",
    help="Language models without an input embedding table: convert, run and inspect them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# Commands whose arguments are parsed where they are implemented.
FORWARD: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}
MODEL_HELP = "GGUF file, checkpoint folder, or OWNER/NAME[@REVISION][:TYPE] of the Hugging Face hub."
MAKE, RUN, MEASURE = "Make a file", "Run a model", "Look and measure"
INPUT, JOB, CLUSTER = "Input and output", "The job", "On Ray (needs fixmin-cpp[ray])"

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
All = Annotated[bool, typer.Option("--all", help="Show everything, not a summary.")]
Model = Annotated[
    Path,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help=MODEL_HELP,
        rich_help_panel=MACHINE,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option("-p", "--prompt", metavar="TEXT", help="The text. Default, or -: stdin.", rich_help_panel=INPUT),
]
File = Annotated[
    Path | None,
    typer.Option(
        "-f", "--file", help="Read the text from a file (without its last newline; -: stdin).", rich_help_panel=INPUT
    ),
]
Text = Annotated[Path, typer.Option("-f", "--file", help="Text, UTF-8; -: stdin.")]
Escape = Annotated[
    bool,
    typer.Option(
        "--escape/--no-escape",
        help=r"Read \n, \t, \r, \" and \\ in --prompt, --stop and --choice as the characters they stand for.",
        rich_help_panel=INPUT,
    ),
]
