"""The whole conversion: resolve a checkpoint, write the file, certify it, give it its name. Also the command line.

    report = convert("checkpoint/", "model.gguf", "q8_0", trust_remote_code=True)
    print(report.certificate.passed)

`main` and `verify_main` define the options once, for `convert/hf_to_gguf.py`, `fixmin convert` and `fixmin verify`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from rich.text import Text

from .. import _core
from ..errors import CheckpointError
from ..inspect import printable
from .certify import Certificate, OpenRunner, certify, open_engine, pending
from .quantize import OUT_TYPES
from .resolve import resolve
from .spec import Resolved
from .writer import AtomicFile, Layout, Progress, Provenance

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
    quantise_s: float  # seconds of reading, quantising and writing, without certification
    certificate: Certificate


class Reporter:
    """Tells what is going on. This one is silent."""

    def step(self, text: str) -> None:
        """The next step has begun."""

    def line(self, text: str) -> None:
        """Something to know that stays on the screen."""

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """A context whose value is called with weights done, weights in all and the tensor being written."""
        yield lambda done, total, name: None


class ConsoleReporter(Reporter):
    """On a terminal with a progress bar, in a pipe as plain lines. Texts of a checkpoint are escaped."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def step(self, text: str) -> None:
        self.line(f"{text} ...")

    def line(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)

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
    out: str | os.PathLike[str],
    outtype: str = "q8_0",
    *,
    keep_uncertified: bool = False,
    n_threads: int = 0,
    open_runner: OpenRunner = open_engine,
    reporter: Reporter | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert a Hugging Face checkpoint to a GGUF file and certify it.

    The file appears under its name only when it is complete and certified; whatever had the name is replaced in one
    step. Nothing of the checkpoint is changed.

    Args:
        checkpoint_dir: config.json, weights (safetensors or pytorch_model.bin), tokenizer.json, modeling code.
        out: the file to write.
        outtype: a key of `quantize.OUT_TYPES`.
        keep_uncertified: keep a file that fails certification as OUT.uncertified.
        n_threads: threads that quantise, 0 for all CPUs of this process.
        open_runner: opens the file for certification; the native engine by default.
        reporter: what to tell on the way.
        options: passed to `resolve`: trust_remote_code and what the checkpoint leaves open.

    Raises:
        CheckpointError: the checkpoint cannot be read or resolved, or `out` is one of its files.
        CertificationError: the result is wrong; nothing is written (but see keep_uncertified).
        OSError: the disk is full, the folder not writable.
    """
    reporter = reporter or Reporter()
    checkpoint_dir, out = Path(checkpoint_dir), Path(out)
    if outtype not in OUT_TYPES:
        raise CheckpointError(f"outtype {outtype!r} is not one of {', '.join(OUT_TYPES)}")
    _refuse_inputs(out, checkpoint_dir)
    with AtomicFile(out) as file, resolve(checkpoint_dir, **options) as resolved:
        for line in resolved.report:
            reporter.line(line)
        layout = Layout.plan(resolved.spec, outtype, _provenance(checkpoint_dir, resolved, outtype, options, reporter))
        notes = tuple(f"{t.name} is stored as {t.type.name}: {t.note}" for t in layout.tensors if t.note)
        for note in notes:
            reporter.line(note)
        start = time.perf_counter()
        with reporter.progress(f"writing {outtype}") as progress:
            layout.write(file, pending(resolved, outtype).figures(), n_threads, progress)
        quantise_s = time.perf_counter() - start
        certificate = certify(file.path, resolved, open_runner, reporter.step)
        layout.rewrite_header(file, certificate.figures())
        if not certificate.passed:
            kept = ""
            if keep_uncertified:
                target = file.target.with_name(file.target.name + UNCERTIFIED_SUFFIX)
                file.commit(target)
                kept = f"; the file is kept as {target}"
            raise CertificationError(f"{out}: certification failed, nothing was written there{kept}", certificate)
        file.commit()
        return ConversionReport(
            path=out,
            outtype=outtype,
            n_bytes=out.stat().st_size,
            n_weights=layout.n_weights,
            types=dict(Counter(t.type.name for t in layout.tensors)),
            notes=notes,
            conventions=tuple(resolved.report),
            quantise_s=quantise_s,
            certificate=certificate,
        )


def _refuse_inputs(out: Path, checkpoint_dir: Path) -> None:
    """Raise CheckpointError if `out` would replace a file that the conversion reads."""
    if out.exists() and checkpoint_dir.is_dir() and out.suffix != ".gguf":
        for path in checkpoint_dir.iterdir():
            if path.is_file() and path.samefile(out):
                raise CheckpointError(f"{out}: is part of the checkpoint; choose another output file")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out.parent}: there is no such folder to write {out.name} to")


def _provenance(
    checkpoint_dir: Path, resolved: Resolved, outtype: str, options: Mapping[str, Any], reporter: Reporter
) -> Provenance:
    reporter.step("hashing the weights")
    spec = resolved.spec
    return Provenance(
        tool=f"fixmin-cpp {_core.__version__}",
        source=checkpoint_dir.resolve().name,
        sha256=spec.weights_sha256(),
        conventions=tuple(f"{name} = {value}: {origin}" for name, (value, origin) in spec.conventions.items()),
        options=json.dumps(options, default=str, sort_keys=True),
        against=pending(resolved, outtype).against,
    )
