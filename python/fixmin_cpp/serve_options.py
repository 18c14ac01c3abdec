"""What an operator decides about a server: the table of it, for `fixmin serve`, ServeSettings and Ray Serve.

A new setting needs a row here, and nothing else but what it does. It needs no FastAPI, so that the command line has it.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, TypedDict

from .arguments import MAX_INT32, as_float, as_text
from .errors import ArgumentError, ArgumentTypeError
from .fields import Field, Integer, fields_of, unsized
from .load_options import LOAD_FIELDS

__all__ = ["SERVE_FIELDS", "SERVE_LOAD_FIELDS", "ServeArguments"]

_PREFIX = re.compile(r"(/(?!\.{1,2}(/|$))[\w.~-]+)*/?", re.ASCII)
_COUNT = Integer(1, MAX_INT32)


@unsized
def _seconds(name: str, value: Any) -> float:
    if (seconds := as_float(name, value, 0.0, 1e9)) == 0.0:
        raise ArgumentError(f"{name} must be above 0 seconds")
    return seconds


@unsized
def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        raise ArgumentTypeError(f"{name} must be a tuple of texts")  # without what it holds: it may be a key
    if "" in value:
        raise ArgumentError(f"{name} must not hold an empty text")
    return value


@unsized
def _keys(name: str, value: Any) -> tuple[str, ...]:
    if any(not key.isascii() or not key.isprintable() for key in _texts(name, value, 0)):
        raise ArgumentError("an API key must be printable ASCII: it travels in a header")
    return tuple(value)


@unsized
def _prefix(name: str, value: Any) -> str:
    if not isinstance(value, str) or not _PREFIX.fullmatch(value):
        raise ArgumentError(f"{name} must be like /llm, of letters, digits and ._~-/, got {value!r}")
    return value


@unsized
def _host(name: str, value: Any) -> str:
    if "\0" in as_text(name, value):
        raise ArgumentError(f"{name} must be an address or a name, got {value!r}")
    return str(value)


@unsized
def _path(name: str, value: Any) -> str:
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(path, str):
        raise ArgumentTypeError(f"{name} must be a path, got {type(path).__name__}")
    if not path or "\0" in path:
        raise ArgumentError(f"{name} must be the path of a file, got {path!r}")
    return path


class ServeArguments(TypedDict, total=False):
    """Settings of a server besides its model and how that is loaded. All are optional."""

    # fmt: off
    host: Annotated[str, Field("127.0.0.1", _host, "Address to listen on; 0.0.0.0: all.")]
    port: Annotated[int | None, Field(None, Integer(0, 65535), "0: a free one. Default: 8000.")]
    uds: Annotated[str | os.PathLike[str] | None, Field(None, _path,
        "Path of a Unix socket to listen on, instead of host and port.")]
    root_path: Annotated[str, Field("", _prefix,
        "As /llm: where a reverse proxy shows the server, whether it passes that on or not.")]
    model_name: Annotated[str | None, Field(None, unsized(as_text), "In answers. Default: the file's name.")]
    chat_template: Annotated[str | None, Field(None, unsized(as_text),
        "Jinja template. Default: Question/Answer, for base models.", option=None)]
    max_queue: Annotated[int, Field(512, Integer(0, MAX_INT32),
        "Generations that wait while as many as may run do; others get 429.")]
    max_body_bytes: Annotated[int, Field(4 << 20, _COUNT, "Of a request.")]
    max_n: Annotated[int, Field(128, _COUNT, "Largest n and best_of.")]
    max_logprobs: Annotated[int, Field(20, _COUNT, "Largest logprobs.")]
    max_inputs: Annotated[int, Field(2048, _COUNT, "Most prompts of a completion, most texts of an embedding.")]
    timeout: Annotated[float, Field(600.0, _seconds, "Seconds until a generation ends, those in the queue included.")]
    max_connections: Annotated[int, Field(1000, _COUNT, "Open at a time; more get 503.")]
    keep_alive: Annotated[float, Field(75.0, _seconds, "Seconds that a connection may be idle between requests.")]
    read_timeout: Annotated[float, Field(30.0, _seconds, "Seconds in which a request has to arrive.")]
    write_timeout: Annotated[float, Field(60.0, _seconds,
        "Seconds that a client may take no data before its connection is closed.")]
    shutdown_timeout: Annotated[float, Field(30.0, _seconds, "Seconds that running requests get to end.")]
    allowed_hosts: Annotated[tuple[str, ...], Field((), _texts,
        "Names by which the server may be asked besides its own. Default on 127.0.0.1: localhost.",
        option="--allowed-host")]
    cors_origins: Annotated[tuple[str, ...], Field((), _texts,
        "Sites whose pages may ask, or *. Default: none.", option="--cors-origin")]
    api_keys: Annotated[tuple[str, ...], Field((), _keys,
        "Keys of which requests must bring one. Default: none needed.", option="--api-key")]
    # fmt: on


SERVE_FIELDS: Mapping[str, Field] = fields_of(ServeArguments)

# How its model is loaded, too: but for the KV cache, which holds as many whole contexts as generations may run.
_CACHE = "Positions of the KV cache, of all requests. Default: --parallel contexts, if memory allows."
SERVE_LOAD_FIELDS: Mapping[str, Field] = {
    **{name: row for name, row in LOAD_FIELDS.items() if name != "kv_contexts"},
    "n_kv": replace(LOAD_FIELDS["n_kv"], option_help=_CACHE),
    "kv_memory_share": replace(
        LOAD_FIELDS["kv_memory_share"],
        default=1 / 4,
        option_help="Most of the memory, or of the GPU's, that the KV cache takes without --n-kv.",
    ),
    "n_parallel": replace(LOAD_FIELDS["n_parallel"], default=64),
}
