"""The whole conversion: resolve a checkpoint, write the file, certify it, give it its name.

report = convert("checkpoint/", "model.gguf", "q8_0", trust_remote_code=True)
print(report.certificate.passed)
"""

import contextlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from rich.text import Text

from .. import _core
from ..arguments import Prompt, as_threads
from ..atomic_file import AtomicFile, refuse_inputs
from ..errors import CheckpointError
from ..inspect import printable
from ..quantization.smooth import Factors, SmoothReport, applied, read_smooth, search, smooth_metadata
from .certify import Certificate, OpenRunner, certify, open_engine, pending
from .checkpoint.source import check_directory
from .gguf_file.formats import OUT_TYPES
from .gguf_file.writer import Layout, Progress, Provenance, check_loads
from .observed.torch_threads import torch_threads
from .resolve import resolve
from .spec import ModelSpec, Resolved

UNCERTIFIED_SUFFIX = ".uncertified"


class CertificationError(CheckpointError):
    """The file that was written does not compute the function of the checkpoint within the tolerances."""

    def __init__(self, message: str, certificate: Certificate) -> None:
        super().__init__(message)
        self.certificate = certificate


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. `path` is where the file is, complete and certified."""

    path: Path
    outtype: str
    n_bytes: int
    n_weights: int
    types: dict[str, int]  # ggml type -> number of tensors
    notes: tuple[str, ...]  # tensors that are stored in another type than the one asked for
    conventions: tuple[str, ...]  # one line each: name, value, where it came from
    warnings: tuple[str, ...]  # what to know before the file is used
    quantise_s: float  # seconds of reading, quantising and writing, without certification
    certificate: Certificate
    smooth: SmoothReport | None = None


class Reporter:
    """Tells what is going on. This one is silent."""

    def step(self, text: str) -> None:
        """The next step has begun."""
        self.line(f"{text} ...")

    def line(self, text: str) -> None:
        """Something to know that stays on the screen."""

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """A context whose value is called with weights done, weights in all and the tensor being written."""
        yield lambda done, total, name: None


class LogReporter(Reporter):
    """Passes every line on to a function."""

    def __init__(self, log: Callable[[str], object]) -> None:
        self._log = log

    def line(self, text: str) -> None:
        self._log(text)


class ConsoleReporter(Reporter):
    """On a terminal with a progress bar, in a pipe as plain lines. Texts of a checkpoint are escaped."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def line(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)
        self._console.file.flush()  # whoever reads the pipe wants to see it now

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        if not self._console.is_terminal:
            self.step(title)
            yield lambda done, total, name: None
            return
        columns = (
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[tensor]}", markup=False),
        )
        with rich.progress.Progress(*columns, console=self._console) as bar:
            task = bar.add_task(title, total=None, tensor="")
            yield lambda done, total, name: bar.update(task, completed=done, total=total, tensor=name)


def convert(
    checkpoint_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    outtype: str = "q8_0",
    *,
    keep_uncertified: bool = False,
    n_threads: int | None = None,
    smooth: Prompt | os.PathLike[str] | None = None,
    open_runner: OpenRunner = open_engine,
    reporter: Reporter | None = None,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert a Hugging Face checkpoint to a GGUF file and certify it.

    The file appears under its name only when it is complete and certified; whatever had the name is replaced in one
    step. Nothing of the checkpoint is changed.

    Args:
        checkpoint_dir, out, outtype: as in fixmin_cpp.api.convert. The weights are safetensors or pytorch_model.bin; in
            a folder the file's name is made from the checkpoint's and the type.
        keep_uncertified: keep a file that fails certification, as OUT.uncertified.
        n_threads: threads that quantise; None, 0 or -1: the CPUs of this process.
        smooth: with w8a8, as in fixmin_cpp.quantization.requantize.quantize. Factors are kept in the file, which is
            certified with them; a float file and some ten of the new one are written on the way.
        open_runner: opens the file for certification; the native engine by default.
        reporter: what to tell on the way.
        overrides, options: for `resolve`: what the user states, trust_remote_code, map_file, calibrate, allow_missing,
            allow_unexpected.

    Raises:
        CheckpointError: the checkpoint cannot be read or resolved, or `out` is one of its files.
        CertificationError: the result is wrong; nothing is written (but see keep_uncertified).
        OSError: the disk is full, the folder not writable.
    """
    reporter = reporter or Reporter()
    checkpoint_dir = Path(checkpoint_dir)
    if outtype not in OUT_TYPES:
        raise CheckpointError(f"outtype {outtype!r} is not one of {', '.join(OUT_TYPES)}")
    if smooth is not None and outtype != "w8a8":
        raise CheckpointError(f"smooth is for w8a8, whose rows of activations have one scale; the type is {outtype}")
    out = _output_path(None if out is None else Path(out), checkpoint_dir, outtype)
    given = (smooth, *map(options.get, ("calibrate", "map_file")), *((overrides or {}).get("affine") or ()))
    for written in (out, _uncertified(out)):
        refuse_inputs(written, *(one for one in given if _is_file_name(one)))
    smooth_prompt = None if smooth is None else read_smooth(smooth)
    stated = {name: value for name, value in (overrides or {}).items() if value is not None}
    n_threads = as_threads(n_threads)
    with (
        torch_threads(checkpoint_dir),
        AtomicFile(out) as file,
        resolve(checkpoint_dir, overrides=stated, log=reporter.line, **options) as resolved,
    ):
        files = sorted({tensor.file for tensor in resolved.source.tensors.values()})
        before = [_state_of(path) for path in files]
        provenance = _provenance(checkpoint_dir, resolved, outtype, stated, reporter)
        layout, smoothed = Layout.plan(resolved.spec, outtype, provenance), None
        if smooth_prompt is not None:
            reporter.step("smoothing")
            layout, smoothed = _smoothed(resolved.spec, outtype, provenance, smooth_prompt, out.parent, n_threads)
        notes = tuple(f"{t.name} is stored as {t.type.name}: {t.note}" for t in layout.tensors if t.note)
        for note in notes:
            reporter.line(note)
        start = time.perf_counter()
        with reporter.progress(f"writing {outtype}") as progress:
            layout.write(file, pending(resolved, outtype).figures(), n_threads, progress)
        quantise_s = time.perf_counter() - start
        certificate = certify(file.path, resolved, open_runner, reporter.step)
        for path, state in zip(files, before, strict=True):
            if _state_of(path) != state:
                raise CheckpointError(f"{path}: was changed while it was converted; no file was written")
        layout.rewrite_header(file, certificate.figures())
        if not certificate.passed:
            kept = ""
            if keep_uncertified:
                target = _uncertified(file.target)
                file.commit(target)
                kept = f" (kept as {target})"
            smoother = "; large channels of activations may be why: try --smooth TEXT"
            raise CertificationError(
                f"{out}: certification failed; no file was written{kept}"
                f"{smoother if outtype == 'w8a8' and smooth is None else ''}",
                certificate,
            )
        check_loads(file)
        file.commit()
        return ConversionReport(
            path=out,
            outtype=outtype,
            n_bytes=out.stat().st_size,
            n_weights=layout.n_weights,
            types=dict(Counter(t.type.name for t in layout.tensors)),
            notes=notes,
            conventions=tuple(resolved.report),
            warnings=resolved.warnings,
            quantise_s=quantise_s,
            certificate=certificate,
            smooth=smoothed,
        )


def _smoothed(
    spec: ModelSpec,
    outtype: str,
    provenance: Provenance,
    smooth: Prompt | Path,
    folder: Path,
    n_threads: int,
) -> tuple[Layout, SmoothReport]:
    """The layout of the file with the best factors, which its metadata keeps, and what they changed."""

    def layout(factors: Factors) -> Layout:
        return Layout.plan(applied(spec, factors), outtype, provenance)

    def write(planned: Layout, path: Path) -> None:
        with AtomicFile(path) as file:
            planned.write(file, {}, n_threads)
            file.commit()

    with tempfile.TemporaryDirectory(dir=folder, prefix=".smooth-") as temporary:
        floats = Path(temporary, "floats.gguf")
        write(Layout.plan(spec, "f32", provenance), floats)
        factors, report = search(floats, spec, smooth, lambda path, f: write(layout(f), path), folder, n_threads)
    planned = layout(factors)
    planned.metadata.update(smooth_metadata(spec, factors, report))
    return planned, report


def _output_path(out: Path | None, checkpoint_dir: Path, outtype: str) -> Path:
    """The file to write. Raises CheckpointError if it is one that the conversion reads, or has no folder."""
    check_directory(checkpoint_dir)
    folder = checkpoint_dir if out is None else out
    if folder.is_dir():
        out = folder / f"{checkpoint_dir.resolve().name}-{outtype.upper()}.gguf"
    assert out is not None
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent}: there is no such folder to write {out.name} to")
    for written in filter(Path.exists, (out, _uncertified(out))):
        for path in checkpoint_dir.iterdir():
            made = path.resolve().name.endswith((".gguf", UNCERTIFIED_SUFFIX))  # by an earlier run
            if path.is_file() and not made and path.samefile(written):
                raise CheckpointError(f"{out}: is part of the checkpoint; choose another output file")
    return out


def _state_of(path: Path) -> tuple[int, int, int]:
    """What differs between a file and what it has been changed to or replaced by."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _uncertified(out: Path) -> Path:
    """Where a file is kept that fails."""
    return out.with_name(out.name + UNCERTIFIED_SUFFIX)


def _is_file_name(given: Any) -> bool:
    """Whether a file of the user's is meant, not a text or an array."""
    return isinstance(given, os.PathLike) or (isinstance(given, str) and len(given) < 4096 and os.path.isfile(given))


def _provenance(
    checkpoint_dir: Path, resolved: Resolved, outtype: str, stated: Mapping[str, Any], reporter: Reporter
) -> Provenance:
    reporter.step("hashing the weights")
    plain = {name: value for name, value in stated.items() if isinstance(value, (str, int, float, bool, list, tuple))}
    plain.pop("affine", None)  # names of files, or arrays
    return Provenance(
        tool=f"fixmin-cpp {_core.__version__}",
        source=checkpoint_dir.resolve().name,
        sha256=resolved.spec.weights_sha256(),
        conventions=[_convention(name, *found) for name, found in resolved.spec.conventions.items()],
        overrides=json.dumps(plain, sort_keys=True),
        allow_missing=resolved.source.allow_missing.patterns,
        allow_unexpected=resolved.source.allow_unexpected.patterns,
        against=pending(resolved, outtype).against,
    )


def _convention(name: str, value: Any, origin: str) -> str:
    return f"{name} = {f'{value:.9g}' if isinstance(value, float) else value} ({origin})"
