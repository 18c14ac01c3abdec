"""What an operator decides about a server. Nothing of it comes from requests."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..arguments import as_path
from ..errors import ArgumentError
from ..fields import checked_class
from ..load_options import LoadOptions
from ..serve_options import SERVE_FIELDS, SERVE_LOAD_FIELDS

__all__ = ["ServeSettings"]

_Optional: Any = checked_class("_Optional", {**SERVE_LOAD_FIELDS, **SERVE_FIELDS})


@dataclass(frozen=True, kw_only=True, repr=False)
class ServeSettings(_Optional):  # type: ignore[misc]  # made of tables
    """Settings of create_app() and run(): those of serve_options.ServeArguments, device, n_threads, n_ctx, kv_type,
    n_batch and n_kv as in fixmin_cpp.Model, and n_parallel and kv_memory_share with other defaults.

    Raises:
        ArgumentError, ArgumentTypeError: one is out of range.
    """

    model: str | os.PathLike[str]  # GGUF file

    def __repr__(self) -> str:
        """Without the keys, since it may end in a log."""
        shown = {field.name: repr(getattr(self, field.name)) for field in fields(self)}
        shown["api_keys"] = f"{len(self.api_keys)} of them"
        return f"ServeSettings({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def __post_init__(self) -> None:
        as_path("model", self.model)
        for name, row in SERVE_FIELDS.items():
            if (value := getattr(self, name)) is not None or row.default is not None:
                row.checked(name, value)
        if self.uds is not None and (self.port is not None or self.host != SERVE_FIELDS["host"].default):
            raise ArgumentError("uds, the path of a socket, stands in place of host and port: give one or the other")
        self.load_options()

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
        given = {name: getattr(self, name) for name in SERVE_LOAD_FIELDS}
        return LoadOptions.check({**given, "kv_contexts": self.n_parallel})
