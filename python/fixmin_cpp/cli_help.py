"""How `fixmin --help` looks: options and commands under headings, plain text whose names are never cut off.

typer's own form, a table drawn by rich, cuts long names at 80 columns and reads brackets in a help text as markup. This
one is that of a pipe everywhere, with a little colour on a terminal.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["App", "Command", "Group"]

_HYPHEN = "\N{NON-BREAKING HYPHEN}"
_WIDTH = 100  # columns at most; a narrower terminal counts


class _Unbroken:
    """Names with hyphens, such as --top-k and fixmin-cpp[convert], are not split between two lines."""

    help: Any

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)  # type: ignore[misc]  # of the class beside this one
        formatter.buffer = [part.replace(_HYPHEN, "-") for part in formatter.buffer]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        text = self.help
        self.help = _unbroken(text or "")
        try:
            super().format_help_text(ctx, formatter)  # type: ignore[misc]
        finally:
            self.help = text


class Command(_Unbroken, TyperCommand):
    """A command that shows its options under the headings of their rich_help_panel, in the order of the first of each.

    Options without one come last.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Other options")
                sections.setdefault(panel, []).append(record)
        others = sections.pop("Other options", None)
        if others:
            sections["Other options"] = others
        _write_sections(formatter, sections)


class Group(_Unbroken, TyperGroup):
    """The commands under the headings of their rich_help_panel, each with the whole first sentence of its help."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                first = (command.help or "").split("\n\n")[0]
                panel = getattr(command, "rich_help_panel", None) or "Commands"
                sections.setdefault(panel, []).append((name, " ".join(first.split())))
        _write_sections(formatter, sections)


class App(typer.Typer):
    """A typer application whose commands are of these classes."""

    def __init__(self, **settings: Any) -> None:
        context = {"max_content_width": _WIDTH, "help_option_names": ["-h", "--help"]}
        super().__init__(cls=Group, rich_markup_mode=None, context_settings=context, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:  # type: ignore[override]
        return super().command(name, **{"cls": Command, **settings})


def _write_sections(formatter: Any, sections: dict[str, list[tuple[str, str]]]) -> None:
    for heading, records in sections.items():
        with formatter.section(_styled(heading, "1")):
            formatter.write_dl([(_styled(name, "36"), _unbroken(text)) for name, text in records], col_max=30)


def _unbroken(text: str) -> str:
    return text.replace("-", _HYPHEN)


def _styled(text: str, code: str) -> str:
    """With colour if stdout is a terminal that has it and nobody minds."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "", "dumb") or not sys.stdout.isatty()
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"
