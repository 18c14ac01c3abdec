"""From the name of a model to a certified GGUF file: on the disk, or of the Hugging Face hub, converted once.

What has been converted lies in the cache ($FIXMIN_CACHE, else ~/.cache/fixmin), a file and beside it what it was made
of. Checkpoints themselves stay in the cache of huggingface_hub.

The converter runs in a process of its own: PyTorch's memory is given back, and code of strangers does not run in this.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .arguments import as_bool, as_path
from .atomic_file import AtomicFile
from .errors import ArgumentError, ArgumentTypeError, CheckpointError
from .recognise import describe_no_file, describe_wrong_model, folder_and_type, hub_id

__all__ = ["CachedModel", "Code", "Found", "cache_folder", "cached_models", "find", "remove_cached"]

_CONVERTED = ("f32", "f16", "bf16", "q8_0", "w8a8", "q4_0")  # what the converter writes
# What is quantised from float32 then: all else that `fixmin quantize` has.
_QUANTISED = tuple(
    [
        "q4_1",
        "q5_0",
        "q5_1",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "iq4_nl",
        "iq4_xs",
        "q3_k_s",
        "q3_k_m",
        "q3_k_l",
        "q4_k_s",
        "q4_k_m",
        "q5_k_s",
        "q5_k_m",
    ]
)
DTYPES = (*_CONVERTED, *_QUANTISED)
# What of a repository is a checkpoint: everything that is small, and of the weights safetensors or else PyTorch's.
_SMALL = ("*.json", "*.py", "*.txt", "*.model", "*.jinja", "*.safetensors.index.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ERROR_LINES = 12  # of a failed conversion's output that are shown
_NAME = 80  # characters of a model's name in names of files and folders
_CONVERT = "import sys; sys.path[:] = [p for p in sys.path if p]; from fixmin_command import main; main()"


@dataclass(frozen=True)
class Code:
    """Python files that come with a checkpoint, and run when it is converted."""

    where: str  # the repository and commit, or the folder
    files: dict[str, str]  # name -> SHA-256, hexadecimal

    @property
    def digest(self) -> str:
        """SHA-256 of all names and contents: what a consent is for."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    def lines(self) -> list[str]:
        """A line for each file, to be shown before it runs: SHA-256 and name."""
        return [f"{sha256}  {name}" for name, sha256 in self.files.items()]


@dataclass
class Found:
    """A model file, and what it took to get it."""

    path: Path
    source: str  # the file or folder as given, or OWNER/NAME
    commit: str | None = None  # of a repository
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase: look, download, convert


@dataclass(frozen=True)
class CachedModel:
    """A converted model in the cache."""

    source: str  # OWNER/NAME, or the folder of the checkpoint
    revisions: tuple[str, ...]  # as asked for: branches, tags, commits
    commit: str | None
    dtype: str
    made: float  # seconds since 1970
    n_bytes: int
    path: Path


# Asked with the code of a checkpoint before it runs: whether it may. `find` remembers a yes for these very files.
Consent = Callable[[Code], bool]


def find(
    model: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool | Consent = False,
    local_files_only: bool = False,
    log: Callable[[str], object] | None = None,
) -> Found:
    """The GGUF file of a model. What is not GGUF yet is converted and certified, once.

    Args:
        model: a GGUF file, which is returned as it is; a checkpoint folder; or a repository of the hub, as OWNER/NAME,
            hf.co/OWNER/NAME or its address, with @REVISION and :TYPE behind it if wanted: "owner/name@main:q4_0". A
            repository of GGUF files has the one of the type taken, or the one named in the place of the type.
        dtype: type of the matrices: f32, f16, bf16, q8_0 (the default), w8a8, q4_0, or one that `fixmin quantize` has.
        revision: branch, tag or commit of a repository. Default: its main branch.
        token: for repositories that need one; None: what `hf auth login` has stored, or HF_TOKEN. False: none.
        trust_remote_code: run Python files of the checkpoint, which could do anything, to see what they compute; or a
            function that is asked, once for the same files.
        local_files_only: no network: what the caches have. So does HF_HUB_OFFLINE=1.
        log: called with lines of text that tell what is going on.

    Raises:
        FileNotFoundError: no such file, folder or repository. CheckpointError: it cannot be converted, its code may not
        run, or what it has is no model. ArgumentError. OSError: no network, no space. ImportError: huggingface_hub
        or a package of the converter is not installed.
    """
    tell = log or (lambda line: None)
    begin = time.monotonic()
    text = as_path("model", model)
    if os.path.isfile(text):
        _refuse_selection(dtype, revision, text)
        return Found(Path(text), text)
    if (no_file := describe_no_file(Path(text))) and not os.path.isdir(text):
        raise OSError(f"{text}: {no_file}")
    if of_folder := folder_and_type(text):
        text, dtype = of_folder[0], _agreed("dtype", of_folder[1], dtype, text)
    if os.path.isdir(text):
        found = _from_folder(Path(text), _checked_type(dtype), revision, trust_remote_code, tell)
    else:
        repository, of_name = _split(text, dtype, revision)
        if repository is None:
            if hub_id(f"hf.co/{text}"):
                raise FileNotFoundError(
                    f"{text}: there is no such file in the folder {os.path.dirname(text)}; a repository of the hub is "
                    f"hf.co/{text}"
                )
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)
        hub = _Hub(repository, of_name["revision"] or "main", token, local_files_only, tell)
        found = _from_hub(hub, _checked_type(of_name["dtype"]), trust_remote_code, tell)
    found.seconds["look"] = time.monotonic() - begin - sum(found.seconds.values())
    return found


def _checked_type(dtype: str | None) -> str:
    if dtype is None:
        return "q8_0"
    if not isinstance(dtype, str):
        raise ArgumentTypeError(f"dtype must be a str, got {type(dtype).__name__}")
    if dtype.endswith(".gguf"):  # the name of a file
        return dtype
    if dtype.lower() not in DTYPES:
        raise ArgumentError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype.lower()


def _refuse_selection(dtype: str | None, revision: str | None, path: str) -> None:
    for name, value in (("dtype", dtype), ("revision", revision)):
        if value is not None:
            more = ": `fixmin quantize` changes it" if name == "dtype" else ""
            raise ArgumentError(f"{name} is {value!r}, but {path} is a file and has its own{more}")


def _split(text: str, dtype: str | None, revision: str | None) -> tuple[str | None, dict[str, str | None]]:
    """OWNER/NAME[@REVISION][:TYPE] as the repository, or None, and what it names or the arguments say."""
    text = re.sub(r"^(https?:/+[^/]+/[^/]+/[^/]+)/tree/([^/]+)/?$", r"\1@\2", text)  # as a browser shows it
    match = re.fullmatch(r"(?P<name>(?:https?:/+)?[^:@]+)(?:@(?P<revision>[^:@]+))?(?::(?P<dtype>[^:@/]+))?/?", text)
    name = None if match is None else hub_id(match["name"])
    if match is None or name is None:
        return None, {}
    named = {}
    for key, given in (("dtype", dtype), ("revision", revision)):
        named[key] = _agreed(key, match[key], given, text)
    return name, named


def _agreed(key: str, named: str | None, given: str | None, text: str) -> str | None:
    """What a name says or an argument. ArgumentError: they differ."""
    if named is not None and given is not None and named.lower() != given.lower():
        raise ArgumentError(f"{key} is {given!r} and {text!r} names {named!r}")
    return named or given


# --- a folder ---------------------------------------------------------------------------------------------------


def _from_folder(
    folder: Path, dtype: str, revision: str | None, trust: bool | Consent, tell: Callable[[str], object]
) -> Found:
    if revision is not None:
        raise ArgumentError(f"revision is {revision!r}, but {folder} is a folder, which has none")
    if dtype.endswith(".gguf") or not (folder / "config.json").is_file():
        name = _of_type({p.name for p in folder.glob("*.gguf")}, dtype)
        if name is None:
            raise CheckpointError(f"{folder}: {describe_wrong_model(folder)}, and no checkpoint: it has no config.json")
        return Found(folder / name, str(folder))
    resolved = folder.resolve()
    facts = []
    for path in sorted({*(p for p in resolved.iterdir() if p.is_file()), *_python_files(resolved)}):
        if path.suffix != ".gguf":  # what was converted into the same folder
            status = path.stat()
            facts.append((path.relative_to(resolved).as_posix(), status.st_size, status.st_mtime_ns))
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    place = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:12]
    entry = _Entry(cache_folder() / "models" / f"{resolved.name[:_NAME]}--{place}" / key, resolved.name, dtype)
    found = Found(entry.path, str(folder))
    if entry.complete():
        return found
    with entry.writing(tell) as needed:
        if needed:
            _convert(entry, resolved, _asked(resolved, str(resolved), trust), found, tell)
            entry.finish(str(resolved), None, None)
    _remove_older(entry, resolved.name)
    return found


def _remove_older(entry: "_Entry", name: str) -> None:
    """Conversions of a folder that has changed since: nobody can ask for them again, but one may still be going on."""
    for other in entry.folder.parent.iterdir():
        if other != entry.folder and not any(_Entry(other, name, dtype).is_written() for dtype in DTYPES):
            shutil.rmtree(other, ignore_errors=True)


# --- the hub ----------------------------------------------------------------------------------------------------


class _Hub:
    """A repository at a revision, as the network has it or, without one, the cache of huggingface_hub."""

    def __init__(
        self, name: str, revision: str, token: str | bool | None, offline: bool, tell: Callable[[str], object]
    ) -> None:
        self.name, self.revision, self._token = name, revision, token
        # By name, for it is optional; and what it loads only when asked by its own name.
        self.library = importlib.import_module("huggingface_hub")
        self.errors = importlib.import_module("huggingface_hub.errors")
        self.constants = importlib.import_module("huggingface_hub.constants")
        self.offline = as_bool("local_files_only", offline) or self.constants.HF_HUB_OFFLINE
        self._unreached = (self.errors.HfHubHTTPError, importlib.import_module("httpx").HTTPError)
        self.commit: str | None = None
        self._fetched: str | None = None  # the commit of the files that were fetched
        self.files: list[str] = []
        if not self.offline:
            self._ask(tell)

    def _ask(self, tell: Callable[[str], object]) -> None:
        errors = self.errors
        try:
            info = self.library.HfApi(token=self._token).model_info(self.name, revision=self.revision, timeout=20)
        except errors.GatedRepoError as error:
            page = f"{self.constants.ENDPOINT}/{self.name}"
            raise CheckpointError(
                f"{self.name} is gated: accept its conditions at {page} and give a token (`hf auth login`, or HF_TOKEN)"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(f"{self.name}: the hub has no revision {self.revision!r} of it") from error
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name}: there is no such file or folder, and the hub has no such repository; if it is private, "
                "give a token (`hf auth login`, or HF_TOKEN)"
            ) from error
        except self._unreached as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status is not None and status < 500 and status != 429:
                token = "; is the token right (`hf auth login`, HF_TOKEN)?" if status in (401, 403) else ""
                raise OSError(f"{self.name}: the hub refused the request with HTTP status {status}{token}") from error
            self.offline = True
            said = f"it answers with HTTP status {status}" if status else f"{type(error).__name__}: {error}"
            self.reason = " ".join(said.split())
            tell(f"the hub could not be reached ({self.reason}): looking into the caches")
            return
        self.commit = info.sha
        self.files = [sibling.rfilename for sibling in info.siblings or []]

    def fetch(self, patterns: Sequence[str]) -> Path:
        """The folder of the snapshot with the files that match. FileNotFoundError, OSError."""
        errors = self.errors
        try:
            folder = self.library.snapshot_download(
                self.name,
                revision=self._fetched or self.revision,
                token=self._token,
                allow_patterns=list(patterns),
                local_files_only=self.offline,
            )
        except errors.LocalEntryNotFoundError as error:
            raise FileNotFoundError(f"{self.name}: {self.missing()}") from error
        except errors.HfHubHTTPError as error:
            raise OSError(f"{self.name}: {' '.join(str(error).split())}") from error
        except self._unreached[1] as error:  # the connection broke
            raise OSError(
                f"{self.name}: the download failed ({type(error).__name__}: {error}); the same command goes on with it"
            ) from error
        # By name the first time, so that the name is known without a network too; then what the name meant then.
        self.commit = self._fetched = Path(folder).name
        return Path(folder)

    def missing(self) -> str:
        """Why there is nothing without the network."""
        why = getattr(self, "reason", "no network is to be used")
        return f"revision {self.revision} is in no cache on this machine, and the hub gives no answer ({why})"


def _from_hub(hub: _Hub, dtype: str, trust: bool | Consent, tell: Callable[[str], object]) -> Found:
    root = cache_folder() / "models" / hub.name.replace("/", "--")
    found = Found(Path(), hub.name, hub.commit)
    if hub.commit is None:
        newest = _newest(root, hub.revision, dtype)
        if newest is not None:
            return Found(newest.path, hub.name, newest.commit)
    elif (entry := _Entry(root / hub.commit[:12], hub.name.split("/")[1], dtype)).complete():
        entry.note(hub.revision)
        found.path = entry.path
        return found

    begin = time.monotonic()
    small = hub.fetch(_SMALL)
    if dtype.endswith(".gguf") or not (small / "config.json").is_file():  # files of GGUF, perhaps
        names = set(hub.files) or {p.name for p in small.glob("*.gguf")}
        name = _of_type({n for n in names if n.endswith(".gguf")}, dtype)
        if name is None:
            raise CheckpointError(f"{hub.name}: has neither a config.json nor a GGUF file: it is no model")
        found.path, found.commit = hub.fetch([glob.escape(name)]) / name, hub.commit
        found.seconds["download"] = time.monotonic() - begin
        return found
    commit = small.name
    entry = _Entry(root / commit[:12], hub.name.split("/")[1], dtype)
    found.path, found.commit = entry.path, commit
    if not entry.complete():
        code = _asked(small, f"{hub.name} at {commit[:12]}", trust)
        has_safetensors = any(n.endswith(".safetensors") for n in hub.files or map(str, small.iterdir()))
        folder = hub.fetch([*_SMALL, *(_WEIGHTS[:1] if has_safetensors else _WEIGHTS)])
        found.seconds["download"] = time.monotonic() - begin
        with entry.writing(tell) as needed:
            if needed:
                _convert(entry, folder, code, found, tell)
                entry.finish(hub.name, hub.revision, commit)
    entry.note(hub.revision)
    return found


def _of_type(names: set[str], dtype: str) -> str | None:
    """Of the names of GGUF files the one of a type, or the only one; None: there is none. ArgumentError: several."""
    if not names:
        return None
    named = [n for n in names if n == dtype]
    matching = named or [n for n in sorted(names) if re.search(rf"[-_.]{re.escape(dtype)}\.gguf$", n, re.IGNORECASE)]
    if len(matching) != 1 and (len(names) != 1 or dtype.endswith(".gguf")):
        files = ", ".join(sorted(names)[:8])
        raise ArgumentError(f"dtype is {dtype}, and the files are {files}: name one of them, as in :{min(names)}")
    return matching[0] if matching else next(iter(names))


# --- code of a checkpoint ---------------------------------------------------------------------------------------


def code_of(folder: Path, where: str) -> Code | None:
    """The Python files in a checkpoint folder, or None if it has none."""
    files = _python_files(folder)
    if not files:
        return None
    return Code(where, {p.relative_to(folder).as_posix(): _sha256_of(p.read_bytes()) for p in files})


def _python_files(folder: Path) -> list[Path]:
    """In order; hidden folders have none that a checkpoint could import."""
    files = (p for p in folder.rglob("*.py") if p.is_file())
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _asked(folder: Path, where: str, trust: bool | Consent) -> bool:
    """Whether there is code that runs. CheckpointError: there is, and it may not."""
    code = code_of(folder, where)
    if code is None:
        return False
    consents = cache_folder() / "trusted"
    if trust is not True and not _is_noted(consents, code.digest):
        if trust is False or not trust(code):
            raise CheckpointError(
                f"{where} comes with Python code, which was not run: {', '.join(code.files)}. Read it, then say "
                "--trust-remote-code (in Python trust_remote_code=True); `fixmin convert` tries without"
            )
        consents.parent.mkdir(parents=True, exist_ok=True)
        with open(consents, "a", encoding="utf-8") as file:
            file.write(f"{code.digest} {json.dumps(where)}\n")  # in ASCII, on one line whatever the name holds
    return True


def _is_noted(consents: Path, digest: str) -> bool:
    try:
        return any(line.split(b" ")[0] == digest.encode() for line in consents.read_bytes().split(b"\n"))
    except FileNotFoundError:
        return False


# --- conversion -------------------------------------------------------------------------------------------------


def _convert(entry: "_Entry", folder: Path, trusted: bool, found: Found, tell: Callable[[str], object]) -> None:
    """Writes the file of an entry. CheckpointError with what the converter said."""
    begin = time.monotonic()
    outtype = entry.dtype if entry.dtype in _CONVERTED else "f32"
    converted = entry.path if outtype == entry.dtype else entry.folder / "converted.gguf"
    tell(f"converting to {entry.dtype}, and comparing the result with the checkpoint (once)")
    try:
        _run(
            ["convert", folder, "-o", converted, "--outtype", outtype, *(["--trust-remote-code"] if trusted else [])],
            found.source,
            tell,
        )
        if converted != entry.path:
            _run(["quantize", converted, entry.path, entry.dtype], found.source, tell)
    finally:
        if converted != entry.path:
            converted.unlink(missing_ok=True)
    found.seconds["convert"] = time.monotonic() - begin


def _run(arguments: Sequence[str | Path], model: str, tell: Callable[[str], object]) -> None:
    """A command of this package in a process of its own, whose lines are told. Ends with this one's Ctrl-C."""
    lines: list[str] = []
    command = [sys.executable, "-c", _CONVERT, *map(str, arguments)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            assert process.stdout is not None
            for data in process.stdout:
                line = data.decode("utf-8", "replace").rstrip()
                lines.append(line)
                tell(line)
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)  # it removes what it has written so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            raise
    if code:
        said = [line for line in lines if line.startswith("error: ")] or lines[-_ERROR_LINES:]
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise CheckpointError(f"{model}: the conversion failed ({ended}): {' | '.join(said).removeprefix('error: ')}")


# --- the cache --------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where converted models are kept: $FIXMIN_CACHE, $XDG_CACHE_HOME/fixmin or ~/.cache/fixmin. It need not exist."""
    try:
        if named := os.environ.get("FIXMIN_CACHE"):
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fixmin"
    except RuntimeError:  # of pathlib: a user without a home
        raise FileNotFoundError(
            errno.ENOENT, "there is no home directory: FIXMIN_CACHE says where converted models are kept"
        ) from None


class _Entry:
    """A converted model: FILE.gguf and, written after it, FILE.json, which says what it is and makes it complete."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self.path = folder / f"{name[:_NAME]}-{dtype.upper()}.gguf"
        self._facts = self.path.with_suffix(".json")

        # Beside the models and never removed: whoever waits for a lock must wait for the one that others take.
        self._lock = cache_folder() / "locks" / hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]

    def complete(self) -> bool:
        """Whether it can be used."""
        return _facts(self._facts) is not None

    def is_written(self) -> bool:
        """Whether a process is converting it at the moment."""
        try:
            with open(self._lock) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextlib.contextmanager
    def writing(self, tell: Callable[[str], object]) -> Iterator[bool]:
        """Waits until nobody else writes it; whether it is still to be written. What is incomplete does not stay."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with open(self._lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell("another process converts this model: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            needed = not self.complete()
            if needed:
                self.folder.mkdir(parents=True, exist_ok=True)
            try:
                yield needed
            finally:
                if not self.complete():
                    for path in (self._facts, self.path, self.path.with_name(f".{self.path.name}.partial")):
                        path.unlink(missing_ok=True)
                    _remove_empty(self.folder)

    def finish(self, source: str, revision: str | None, commit: str | None) -> None:
        """The file is there and certified."""
        made = time.time()
        seen = {revision: made} if revision else {}
        self._write({"source": source, "commit": commit, "dtype": self.dtype, "made": made, "seen": seen})

    def note(self, revision: str) -> None:
        """The hub says that this is the revision now: so it is, without a network, until the hub says otherwise."""
        facts = _facts(self._facts)
        if facts is not None and facts["seen"].get(revision, 0.0) < time.time() - 3600:
            facts["seen"][revision] = time.time()
            with contextlib.suppress(CheckpointError, OSError):  # another process notes it, or the cache is full
                self._write(facts)

    def _write(self, facts: dict[str, Any]) -> None:
        with AtomicFile(self._facts) as file:
            file.write(json.dumps({**facts, "n_bytes": self.path.stat().st_size}, indent=1).encode())
            file.commit()


def _facts(path: Path) -> dict[str, Any] | None:
    """Of a model in the cache; None if they, or the file, are not as they were written."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        good = (
            isinstance(facts["source"], str)
            and isinstance(facts["commit"], str | None)
            and isinstance(facts["dtype"], str)
            and isinstance(facts["made"], float)
            and all(isinstance(when, float) for when in facts["seen"].values())
            and path.with_suffix(".gguf").stat().st_size == facts["n_bytes"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return facts if good else None


def _remove_empty(folder: Path) -> None:
    """A folder of the cache and the one around it, unless they hold something."""
    for one in (folder, folder.parent):
        with contextlib.suppress(OSError):
            one.rmdir()


def _newest(root: Path, revision: str, dtype: str) -> CachedModel | None:
    """What was the revision, or begins with that commit, when the hub was asked last."""
    known = [m for m in cached_models(root) if m.dtype == dtype]
    seen = {m.path: (_facts(m.path.with_suffix(".json")) or {"seen": {}})["seen"].get(revision, 0.0) for m in known}
    named = [m for m in known if seen[m.path]] or [m for m in known if _is_commit(m, revision)]
    return max(named, key=lambda m: seen[m.path], default=None)


def _is_commit(model: CachedModel, revision: str) -> bool:
    return len(revision) >= 7 and model.commit is not None and model.commit.startswith(revision)


def cached_models(folder: Path | None = None) -> list[CachedModel]:
    """The converted models in the cache, newest last. What is not complete is left out."""
    found = []
    for path in (folder or cache_folder() / "models").rglob("*.json"):
        facts = _facts(path)
        if facts is not None:
            found.append(
                CachedModel(
                    source=facts["source"],
                    revisions=tuple(sorted(facts["seen"])),
                    commit=facts["commit"],
                    dtype=facts["dtype"],
                    made=facts["made"],
                    n_bytes=facts["n_bytes"],
                    path=path.with_suffix(".gguf"),
                )
            )
    return sorted(found, key=lambda m: m.made)


def remove_cached(names: Sequence[str] | None) -> list[CachedModel]:
    """Removes converted models: of a repository, a folder, NAME:TYPE, NAME@REVISION, or a file in the cache.

    A model that runs keeps its file until it ends. names: None: all, and what is damaged too. Returns what was removed.
    ArgumentError: a name that the cache has not; nothing is removed then.
    """
    known = cached_models()
    chosen: dict[Path, CachedModel] = {m.path: m for m in known} if names is None else {}
    for name in names or ():
        matching = [m for m in known if _is_meant(m, name)]
        if not matching:
            raise ArgumentError(f"{name!r} is not in the cache: `fixmin cache list` shows what is")
        chosen |= {m.path: m for m in matching}
    paths = [*chosen, *((cache_folder() / "models").rglob("[!.]*.gguf") if names is None else ())]
    for path in paths:
        path.with_suffix(".json").unlink(missing_ok=True)  # first: from here on it is not complete
        path.unlink(missing_ok=True)
        _remove_empty(path.parent)
    return list(chosen.values())


def _is_meant(model: CachedModel, name: str) -> bool:
    if os.path.realpath(name) in (os.path.realpath(model.path), model.source):
        return True
    match = re.fullmatch(r"([^:@]+)(?:@([^:@]+))?(?::([^:@/]+))?", name)
    if match is None:
        return False
    wanted, revision, dtype = match.groups()
    return (
        (hub_id(wanted) or wanted) == model.source
        and (dtype is None or dtype.lower() == model.dtype)
        and (revision is None or revision in model.revisions or _is_commit(model, revision))
    )


def facts_of(model: CachedModel) -> dict[str, Any]:
    """As JSON can hold it."""
    return {**asdict(model), "path": str(model.path)}
