"""The lines of a batch job: requests in this project's form and in OpenAI's, and the records that answer them."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .arguments import MAX_SEED, as_int, split_prompts
from .errors import ArgumentError, ArgumentTypeError, FixminError
from .generation_options import GenerationOptions, main_names
from .openai_api.refusal import refusal
from .openai_api.request import ChatRequest, CompletionRequest, GenerationRequest

__all__ = [
    "TASKS",
    "Entry",
    "InputFile",
    "Line",
    "NativeEntry",
    "OpenAIEntry",
    "Settings",
    "parse_line",
    "read_record",
    "write_record",
]

TASKS = ("generate", "score", "embed")


class Line(NamedTuple):
    """A line of the input that is not blank."""

    number: int  # counted from 1, blank lines too
    offset: int  # bytes of the file before it
    data: bytes  # its line feed included, if it has one

    @property
    def end(self) -> int:
        """Bytes of the file up to the end of the line."""
        return self.offset + len(self.data)


@dataclass(frozen=True)
class InputFile:
    """The input as it was when the job began; what is appended later is not part of it."""

    path: str
    n_bytes: int
    n_lines: int  # that are not blank
    sha256: str

    @classmethod
    def scan(cls, path: str | os.PathLike[str]) -> "InputFile":
        """Reads a regular file once, line by line."""
        path = os.fspath(path)
        if not os.path.isfile(path):
            os.stat(path)  # raises the error that says what is missing
            raise ArgumentError(f"{path} must be a file: a job reads it twice, and again when it is resumed")
        digest, n_bytes, n_lines = hashlib.sha256(), 0, 0
        with open(path, "rb") as file:
            for data in file:
                digest.update(data)
                n_bytes += len(data)
                n_lines += not data.isspace()
        return cls(path, n_bytes, n_lines, digest.hexdigest())

    def goes_on(self, n_bytes: Any, sha256: Any) -> bool:
        """Whether the file is what had that size and hash, ending with a line feed, and more lines after it."""
        if not isinstance(n_bytes, int) or not 0 < n_bytes < self.n_bytes:
            return False
        digest, last = self._hash_of(n_bytes)
        return last == b"\n" and digest == sha256

    def check_unchanged(self) -> None:
        """FixminError if the lines are not those any more that the job began with: answers may be to other ones."""
        if self._hash_of(self.n_bytes)[0] != self.sha256:
            raise FixminError(f"{self.path} was changed while its lines were answered: the job is not done")

    def _hash_of(self, n_bytes: int) -> tuple[str, bytes]:
        """SHA-256 of the first bytes of the file as it is now, and the last one of them."""
        digest, left, data = hashlib.sha256(), n_bytes, b""
        with open(self.path, "rb") as file:
            while left > 0 and (data := file.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
        return digest.hexdigest(), data[-1:]

    def lines(self, number: int = 1, offset: int = 0) -> Iterator[Line]:
        """The lines from `offset` on, where line `number` begins."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            while data := file.readline(self.n_bytes - offset):
                if not data.isspace():
                    yield Line(number, offset, data)
                number += 1
                offset += len(data)


@dataclass(frozen=True)
class Settings:
    """What decides the answers, besides the model and the lines."""

    task: str  # one of TASKS
    seed: int  # of the job: lines without a seed of their own get one derived from it
    options: Mapping[str, Any]  # GenerationArguments for lines that do not give them, as JSON has them
    token_ids: bool  # whether records hold the generated ids

    @classmethod
    def check(cls, task: Any, seed: Any, options: Mapping[str, Any], token_ids: bool, vocab_size: int) -> "Settings":
        """Raises ArgumentError for what would be wrong in every line."""
        if task not in TASKS:
            raise ArgumentError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if task != "generate" and (options or token_ids):
            name = next(iter(options), "token_ids")
            raise ArgumentError(f"{name} is an option of the task generate, it means nothing to {task}")
        if "seed" in options:
            raise ArgumentError("seed is that of the job: give it as such, or in a line")
        try:
            plain = json.loads(json.dumps(dict(options)))
        except TypeError as error:
            raise ArgumentTypeError(f"options must be what JSON can hold: {error}") from None
        checked = main_names(plain)
        GenerationOptions.check(checked, vocab_size)
        return cls(task, as_int("seed", seed, 0, MAX_SEED), checked, token_ids)

    def seed_of(self, line: int, index: int) -> int:
        """Of a prompt that comes without one."""
        # 53 bits: other readers of JSON hold numbers as doubles.
        digest = hashlib.blake2b(b"%d %d %d" % (self.seed, line, index), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 11


class Entry(ABC):
    """A line that is JSON, in one of the two forms."""

    problem: ArgumentError | None = None  # why it cannot be answered, whatever it asks for

    def __init__(self, line: int, fields: dict[str, Any]) -> None:
        self.line = line
        # As everywhere in OpenAI's interface, null stands for a field that is not given.
        self.fields = {name: value for name, value in fields.items() if value is not None}

    @abstractmethod
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The record that holds an answer."""

    @abstractmethod
    def failure(self, error: FixminError) -> tuple[dict[str, Any], str]:
        """The record that says why there is no answer, and the reason alone."""


class NativeEntry(Entry):
    """{"id"?: anything, "prompt": text or ids, and any of GenerationArguments}."""

    def read(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        """The prompt and, for the task generate, its GenerationArguments. ArgumentError if they are not clear."""
        own = {name: value for name, value in self.fields.items() if name not in ("id", "prompt")}
        if own and settings.task != "generate":
            raise ArgumentError(f"the task {settings.task} takes no {next(iter(own))}: a line has id and prompt")
        if "prompt" not in self.fields:
            raise ArgumentError("prompt is missing")
        prompts = split_prompts(self.fields["prompt"])[0]
        if len(prompts) != 1:
            raise ArgumentError(f"prompt must be one text or its ids, got {len(prompts)} prompts: give each its line")
        if split_prompts(prompts[0])[1]:
            raise ArgumentError("prompt must be one text or its ids, got lists of them in a list")
        return prompts[0], {"seed": settings.seed_of(self.line, 0), **settings.options, **main_names(own)}

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(), **body, "error": None}

    def failure(self, error: FixminError) -> tuple[dict[str, Any], str]:
        reason = {"line": self.line, "type": type(error).__name__, "message": str(error)}
        return {**self._head(), "error": reason}, str(error)

    def _head(self) -> dict[str, Any]:
        return {"id": self.fields.get("id", self.line), "line": self.line}


class OpenAIEntry(Entry):
    """{"custom_id", "method": "POST", "url": "/v1/completions", "body": {...}}, as OpenAI's batch interface has it."""

    _REQUESTS: ClassVar[Mapping[Any, type[GenerationRequest]]] = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatRequest,
    }
    _request: GenerationRequest | None = None

    def read(self, settings: Settings) -> GenerationRequest:
        """The request in its body. ArgumentError if that is not clear."""
        if unknown := self.fields.keys() - {"custom_id", "method", "url", "body"}:
            raise ArgumentError(f"there is no field {min(unknown)!r} beside custom_id, method, url and body")
        if not isinstance(self.fields.get("custom_id"), str):
            raise ArgumentTypeError(f"custom_id must be a text, got {self.fields.get('custom_id')!r}")
        if self.fields.get("method", "POST") != "POST":
            raise ArgumentError(f"method must be POST, got {self.fields['method']!r}")
        url = self.fields.get("url")
        if settings.task != "generate" or not isinstance(url, str) or url not in self._REQUESTS:
            raise ArgumentError(
                f"the task {settings.task} has no answer to url {url!r}: generate has to {' and '.join(self._REQUESTS)}"
            )
        body = self.fields.get("body")
        if not isinstance(body, dict):
            raise ArgumentTypeError(f"body must be an object, got {body!r}")
        self._request = self._REQUESTS[url](body, streams=False)
        self._request.return_token_ids |= settings.token_ids
        return self._request

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._record(200, body)

    def failure(self, error: FixminError) -> tuple[dict[str, Any], str]:
        told = refusal(error, self._request)
        body = told.body()
        body["error"]["message"] = f"line {self.line}: {told.message}"
        return self._record(told.status, body), told.message

    def _record(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        response = {"status_code": status, "request_id": f"req_{self.line}", "body": body}
        return {
            "id": f"{_OPENAI_ID}{self.line}",
            "custom_id": self.fields.get("custom_id"),
            "response": response,
            "error": None,
        }


_OPENAI_ID = "batch_req_"  # the number of the line follows


def parse_line(line: Line) -> Entry:
    """The line as JSON. ArgumentError says what is wrong with it."""
    try:
        text = line.data.decode("utf-8-sig" if line.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise ArgumentError(f"the line is not UTF-8: byte {line.data[at]:#04x} at column {at + 1}") from None
    try:
        fields = json.loads(text, parse_constant=_no_constant)
        problem = _unwritable(fields)
    except RecursionError:
        raise ArgumentError("the line is nested too deeply") from None
    except ValueError as error:
        raise ArgumentError(f"the line is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ArgumentTypeError(f"the line must be a JSON object, got {type(fields).__name__}")
    form = OpenAIEntry if "custom_id" in fields or "body" in fields else NativeEntry
    if problem is None:
        return form(line.number, fields)
    # Its answer bears the name that whoever sent it looks for.
    names = {name: fields[name] for name in ("id", "custom_id") if name in fields and _unwritable(fields[name]) is None}
    entry = form(line.number, names)
    entry.problem = ArgumentError(f"the line holds {problem}")
    return entry


# Of lists and objects in a line; the server has the same. How deep Python can read and write depends on where it is.
_MAX_DEPTH = 100


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for parts in inner for part in parts]
    return any(isinstance(part, dict | list) for part in level)


def _unwritable(value: Any) -> str | None:
    """What there is in a value that JSON could spell, but no record can hold."""
    if _is_too_deep(value):
        return f"lists or objects more than {_MAX_DEPTH} deep"
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, which is no character"
    except ValueError:
        return "a number beyond those of doubles"
    return None


def write_record(record: dict[str, Any]) -> bytes:
    """A line of the output."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_record(data: bytes) -> tuple[int, bool] | None:
    """Number of the input line that a line of output answers, and whether by an error; None if it is not complete."""
    try:
        record = json.loads(data)
        if "custom_id" in record:
            number, failed = int(record["id"].removeprefix(_OPENAI_ID)), record["response"]["status_code"] != 200
        else:
            number, failed = record["line"], record["error"] is not None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (number, failed) if data.endswith(b"\n") else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
