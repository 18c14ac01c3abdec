"""What an operator decides about a server. Nothing of it comes from requests."""

import os
import re
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from ..arguments import MAX_INT32, as_float, as_int
from ..errors import ArgumentError, ArgumentTypeError
from ..load_options import LOAD_FIELDS, LoadOptions

__all__ = ["ServeSettings"]

_PREFIX = re.compile(r"(/(?!\.{1,2}(/|$))[\w.~-]+)*/?", re.ASCII)
_MEMORY_SHARE = 1 / 4  # of the machine's, for the KV cache at the most

# Of the model, as in fixmin_cpp.Model, but for what a server says itself: its KV cache holds as many whole contexts as
# requests may run.
_OWN = ("n_parallel", "kv_contexts", "kv_memory_share")
_Load: Any = make_dataclass(
    "_Load",
    [(name, row.kind, field(default=row.default)) for name, row in LOAD_FIELDS.items() if name not in _OWN],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True)
class ServeSettings(_Load):  # type: ignore[misc]  # made of a table
    """Settings of create_app() and run(); each is an option of `fixmin serve` and an environment variable.

    n_threads, n_ctx, kv_type, n_batch, n_kv: as in fixmin_cpp.Model.

    Raises:
        ArgumentError, ArgumentTypeError: one is out of range.
    """

    model: str | os.PathLike[str]  # GGUF file
    model_name: str | None = None  # in answers and /v1/models; None: the file's name without .gguf
    host: str = "127.0.0.1"
    port: int | None = None  # 8000 if no `uds` is given; 0: a free one
    uds: str | os.PathLike[str] | None = None  # path of a Unix socket to listen on instead of `host` and `port`
    root_path: str = ""  # "/llm": where a reverse proxy shows the server, whether it passes that on or not
    api_keys: tuple[str, ...] = ()  # none: everybody may ask
    allowed_hosts: tuple[str, ...] = ()  # names (Host) by which run() may be asked besides `host` and, there, localhost
    cors_origins: tuple[str, ...] = ()  # sites whose pages may ask; "*": all
    chat_template: str | None = None  # Jinja text; None: that of chat.py for base models

    # Limits of a request
    max_body_bytes: int = 4 << 20
    max_n: int = 128  # n and best_of
    max_logprobs: int = 20
    max_inputs: int = 2048  # prompts of one completion, texts of one embedding
    timeout: float = 600.0  # seconds until a generation ends, those in the queue included

    # Limits of all
    n_parallel: int = 64  # generations that run at a time
    max_queue: int = 512  # generations that wait while n_parallel run; more of them are refused with 429
    max_connections: int = 1000  # open at a time; more get 503
    keep_alive: float = 75.0  # seconds that a connection may be idle between requests
    read_timeout: float = 30.0  # seconds in which a request has to arrive
    write_timeout: float = 60.0  # seconds that a client may take no data before its connection is closed
    shutdown_timeout: float = 30.0  # seconds that running requests get to finish

    def __post_init__(self) -> None:
        if self.port is not None:
            as_int("port", self.port, 0, 65535)
        if self.uds is not None:
            self._check_uds()
        if not isinstance(self.root_path, str) or not _PREFIX.fullmatch(self.root_path):
            raise ArgumentError(f"root_path must be like /llm, of letters, digits and ._~-/, got {self.root_path!r}")
        for name in ("max_body_bytes", "max_n", "max_logprobs", "max_inputs", "max_connections"):
            as_int(name, getattr(self, name), 1, MAX_INT32)
        as_int("max_queue", self.max_queue, 0, MAX_INT32)
        for name in ("timeout", "keep_alive", "read_timeout", "write_timeout", "shutdown_timeout"):
            if as_float(name, getattr(self, name), 0.0, 1e9) == 0.0:
                raise ArgumentError(f"{name} must be above 0 seconds")
        for name in ("api_keys", "allowed_hosts", "cors_origins"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(isinstance(v, str) and v for v in values):
                raise ArgumentTypeError(f"{name} must be a tuple of texts that are not empty")
        self.load_options()
        if any(not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ArgumentError("an API key must be printable ASCII: it travels in a header")

    def _check_uds(self) -> None:
        if self.port is not None or self.host != ServeSettings.host:
            raise ArgumentError("uds, the path of a socket, stands in place of host and port: give one or the other")
        path = os.fspath(self.uds) if isinstance(self.uds, str | os.PathLike) else self.uds
        if not isinstance(path, str):
            raise ArgumentTypeError(f"uds must be a path, got {type(path).__name__}")
        if not path or "\0" in path:
            raise ArgumentError(f"uds must be the path of a file, got {path!r}")

    @property
    def prefix(self) -> str:
        """root_path without a / at its end."""
        return self.root_path.rstrip("/")

    @property
    def name(self) -> str:
        """The model's name in answers."""
        return self.model_name if self.model_name is not None else Path(self.model).stem

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names by which run() answers; none: any, as it listens to more than this machine and no name is given.

        Any too on a Unix socket: no web page can reach that, and what stands before it decides which names it serves.
        """
        local = ("localhost", "127.0.0.1", "[::1]")
        if self.uds is not None:
            return (*local, *self.allowed_hosts) if self.allowed_hosts else ()
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.host == "localhost" or host == "[::1]" or self.host.startswith("127."):
            return (*local, host, *self.allowed_hosts)
        return (*local, host, *self.allowed_hosts) if self.allowed_hosts else ()

    @property
    def max_sequences(self) -> int:
        """Generations that may run and wait together."""
        return self.n_parallel + self.max_queue

    def load_options(self) -> LoadOptions:
        """For fixmin_cpp.Model."""
        given = {name: getattr(self, name) for name in LOAD_FIELDS if hasattr(self, name)}
        return LoadOptions.check({**given, "kv_contexts": self.n_parallel, "kv_memory_share": _MEMORY_SHARE})
