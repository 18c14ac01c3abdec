"""What a server writes to stderr: lines of text, or one JSON object per line.

A line may quote what clients send. No character of it begins a line, and no exception's message is shown, which may
hold a piece of a prompt, and no warning about a grammar, unless the level is debug.
"""

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import datetime, timezone
from enum import Enum
from typing import Any
from urllib.parse import quote

from .inspect import printable

__all__ = ["Facts", "LogFormat", "LogLevel", "configure", "request_id"]

_PLAIN = "/:,.~-_!@$&'()*+;?#[]{}|^<>`\\"  # what a value has as it is, beside letters and digits: no space, " or =
_TRACE = 5  # uvicorn's

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request that is being answered


class LogLevel(str, Enum):
    """uvicorn's names."""

    critical = "critical"
    error = "error"
    warning = "warning"
    info = "info"
    debug = "debug"
    trace = "trace"


class LogFormat(str, Enum):
    """How lines look."""

    text = "text"
    json = "json"


class Facts:
    """What a line says by name: fields in JSON, as text `name=value name=value`, where values are percent-encoded.

    The only argument of its message.
    """

    def __init__(self, **values: Any) -> None:
        self.values = values

    def __str__(self) -> str:
        return " ".join(f"{name}={_shown(value)}" for name, value in self.values.items())


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return quote(str(value), safe=_PLAIN, errors="backslashreplace")


def configure(level: LogLevel, form: LogFormat) -> None:
    """Lets all that is logged in this process go to stderr, this package's and uvicorn's from `level` on.

    Of others, and of Python's warnings, what is at least a warning.
    """
    number = _TRACE if level is LogLevel.trace else getattr(logging, level.name.upper())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((_Json if form is LogFormat.json else _Text)(messages=number <= logging.DEBUG))
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
    logging.captureWarnings(True)
    for name in ("fixmin_cpp", "uvicorn"):
        logging.getLogger(name).setLevel(number)
    if number > logging.DEBUG:  # its warnings quote what a grammar holds
        logging.getLogger("fixmin_cpp.constrain").setLevel(max(number, logging.ERROR))


class _Formatter(logging.Formatter):
    def __init__(self, *, messages: bool) -> None:
        """`messages`: whether those of exceptions are shown."""
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._messages = messages

    def formatException(self, ei: Any) -> str:
        if self._messages:
            return super().formatException(ei)
        parts, error = [], ei[1]
        while error is not None:  # the first cause comes first, as Python has it
            frames = "".join(traceback.format_tb(error.__traceback__))
            parts.append(f"Traceback (most recent call last):\n{frames}{type(error).__name__}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        return "\n\n".join(reversed(parts))


class _Text(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        first, *others = super().format(record).split("\n")
        return "\n    ".join(map(printable, (first, *others)))


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if isinstance(record.args, tuple) and len(record.args) == 1 and isinstance(record.args[0], Facts):
            line["message"] = record.msg.replace("%s", "").strip()
            values = record.args[0].values.items()
            line |= {name: round(value, 6) if isinstance(value, float) else value for name, value in values}
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
