"""A progress bar on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]


@contextmanager
def bar(title: str, silent: bool) -> Iterator[Callable[..., None]]:
    """A progress bar, if stderr is a terminal or this is a notebook; vanishes at the end.

    Its value is called with done, total and perhaps the name of what is being worked on.
    """
    if not silent:
        # Loaded here: takes longer than the rest of the package, and most programs show no bar.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        silent = not (console.file.isatty() or console.is_jupyter)
    if silent:
        yield lambda done, total, name="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None, item="")
        yield lambda done, total, name="": progress.update(task, completed=done, total=total, item=name)
