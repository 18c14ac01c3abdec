"""Tables of arguments: what users, checks, the command line and the server know of a name stands in one row.

A table is a TypedDict, so that type checkers read the same rows; each name is annotated with its type and a Field.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, get_args, get_origin

from .arguments import as_float, as_int

__all__ = ["Alias", "Field", "Integer", "Number", "aliases_of", "checked_class", "fields_of", "summary", "unsized"]

Check: TypeAlias = Callable[[str, Any, int], Any]  # name, value, vocabulary size -> the checked value


@dataclass(frozen=True)
class Number:
    """Checks numbers in [low, high]; those below `least` count as that."""

    low: float
    high: float | None = None
    least: float | None = None
    read: Callable[..., Any] = as_float

    def __call__(self, name: str, value: Any, vocab_size: int = 0) -> Any:
        number = self.read(name, value, self.low, self.high)
        return number if self.least is None else max(number, self.least)


Integer = functools.partial(Number, read=as_int)


def unsized(check: Callable[[str, Any], Any]) -> Check:
    """A check that does not depend on the vocabulary."""
    return lambda name, value, vocab_size: check(name, value)


@dataclass(frozen=True)
class Field:
    """What there is to know of an argument besides its name."""

    default: Any  # as it is once checked
    check: Check | None  # None: checked together with other arguments
    help: str  # what it does, in sentences; its default is added where it is shown
    heading: str = ""  # begins a group of options with this heading
    option: str | None = ""  # its names on the command line; "": one made of its own; None: none
    option_help: str = ""  # of an option that says something else than the argument
    bodies: str | None = ""  # further names in bodies of HTTP requests, a winner first; None: not taken from them
    elsewhere: str = ""  # what other programs call it
    rare: bool = False  # an option of those commands alone that ask for it
    kind: Any = None  # its static type; set by fields_of()

    def checked(self, name: str, value: Any, vocab_size: int = 0) -> Any:
        """The value as it is used. Raises ArgumentError, ArgumentTypeError."""
        assert self.check is not None
        return self.check(name, value, vocab_size)

    @property
    def low(self) -> float | None:
        """Least number that is taken; None: no number, or no simple range."""
        return getattr(self.check, "low", None)

    @property
    def high(self) -> float | None:
        """Largest number that is taken; None as for `low`, or no limit."""
        return getattr(self.check, "high", None)


@dataclass(frozen=True)
class Alias:
    """Another name of an argument."""

    of: str


def fields_of(table: Any) -> dict[str, Field]:
    """The rows of a table in their order, without aliases."""
    rows = {name: get_args(row) for name, row in table.__annotations__.items() if get_origin(row) is Annotated}
    return {name: dataclasses.replace(about, kind=kind) for name, (kind, about) in rows.items() if type(about) is Field}


def aliases_of(table: Any) -> dict[str, str]:
    """Other names and those that they stand for."""
    rows = {name: get_args(row)[1] for name, row in table.__annotations__.items()}
    return {name: about.of for name, about in rows.items() if isinstance(about, Alias)}


def summary(fields: Mapping[str, Field]) -> str:
    """All rows as lines, for a docstring."""
    return "".join(f"    {name}: {row.help} Default: {row.default!r}.\n" for name, row in fields.items())


def checked_class(name: str, fields: Mapping[str, Field], **more: Any) -> Any:
    """A frozen dataclass of checked values, keyword arguments only. more: defaults of fields that no row is of."""
    rows = [(row, field.kind, dataclasses.field(default=field.default)) for row, field in fields.items() if field.check]
    rows += [(row, Any, dataclasses.field(default=default)) for row, default in more.items()]
    return dataclasses.make_dataclass(name, rows, frozen=True, kw_only=True)
