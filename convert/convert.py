"""The whole conversion: resolve a checkpoint, write the file, certify it, give it its name. Also the command line.

    report = convert("checkpoint/", "model.gguf", "q8_0", trust_remote_code=True)
    print(report.certificate.passed)

`main` is `fixmin convert` and `convert/hf_to_gguf.py`, `verify_main` is `fixmin verify`: one definition of the options.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import rich.progress
from rich.console import Console
from rich.text import Text

from .. import _core
from ..arguments import Prompt, as_threads
from ..atomic_file import AtomicFile, refuse_inputs, terminate_cleanly
from ..errors import CheckpointError
from ..inspect import printable
from ..quantization.smooth import Factors, SmoothReport, applied, read_smooth, search, smooth_by, smooth_metadata
from .certify import Certificate, OpenRunner, certify, open_engine, pending, verify
from .checkpoint.source import check_directory
from .gguf_file.formats import OUT_TYPES
from .gguf_file.writer import Layout, Progress, Provenance, check_loads
from .observed.torch_threads import torch_threads
from .overrides import add_options, stated_options
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
    refuse_inputs(out, smooth if isinstance(smooth, os.PathLike) else None)
    smooth_prompt = None if smooth is None else read_smooth(smooth)
    stated = {name: value for name, value in (overrides or {}).items() if value is not None}
    n_threads = as_threads(n_threads)
    with (
        torch_threads(checkpoint_dir),
        AtomicFile(out) as file,
        resolve(checkpoint_dir, overrides=stated, log=reporter.line, **options) as resolved,
    ):
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
        layout.rewrite_header(file, certificate.figures())
        if not certificate.passed:
            kept = ""
            if keep_uncertified:
                target = file.target.with_name(file.target.name + UNCERTIFIED_SUFFIX)
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
    if out.exists() and not out.name.endswith((".gguf", UNCERTIFIED_SUFFIX)):
        for path in checkpoint_dir.iterdir():
            if path.is_file() and path.samefile(out):
                raise CheckpointError(f"{out}: is part of the checkpoint; choose another output file")
    return out


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


# --- command line -----------------------------------------------------------------------------------------------


def _add_resolve_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint directory and everything that tells `resolve` how to read it."""
    parser.add_argument("checkpoint_dir", type=Path, help="folder with config.json, weights and modeling code")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the checkpoint, to see what it computes (off: it could do anything)",
    )
    parser.add_argument(
        "--map", dest="map_file", type=Path, metavar="FILE", help="which tensor is which: lines GGUF = CHECKPOINT"
    )
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="text that decides what the files leave open")
    for what, instead in (("missing", "use a new model's values"), ("unexpected", "leave it out")):
        parser.add_argument(
            f"--allow-{what}",
            action="append",
            default=[],
            metavar="NAME",
            help=f"{instead} where a tensor of this name (* and ? stand for any text) is {what}; may be repeated",
        )
    add_options(parser.add_argument_group("what the checkpoint does not say"))


def _resolve_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `resolve` from the options of `_add_resolve_options`."""
    return {
        "trust_remote_code": args.trust_remote_code,
        "map_file": args.map_file,
        "calibrate": args.calibrate,
        "allow_missing": tuple(args.allow_missing),
        "allow_unexpected": tuple(args.allow_unexpected),
        "overrides": stated_options(args),
    }


class _Parser(argparse.ArgumentParser):
    """One that says in two lines what is wrong, and does not hide that its help could not be written."""

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        args, unknown = self.parse_known_args(argv)
        if not unknown:
            return args
        option = next((text for text in unknown if text.startswith("-")), None)
        if option is None:
            self.error(f"unexpected argument {unknown[0]!r}")
        known = set(re.findall(r"--[a-z][a-z-]*", self.format_help()))
        meant = difflib.get_close_matches(option.partition("=")[0], known, 1)
        self.error(f"no such option: {option}" + (f" (did you mean {meant[0]}?)" if meant else ""))

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file or sys.stdout, flush=True)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)}\n{self.prog} --help shows how to use it\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit code: 0, or 1 if the result could not be certified.

    Other errors are raised; argparse ends the process for wrong usage (2) and --help (0).
    """
    parser = _Parser(
        prog="fixmin convert",
        description="Convert a Hugging Face checkpoint to GGUF and prove that the file computes the same function.",
    )
    _add_resolve_options(parser)
    parser.add_argument(
        "-o",
        "--out",
        "--outfile",
        type=Path,
        help="file to write (replaced if it exists) or its folder; default: NAME-OUTTYPE.gguf in the checkpoint folder",
    )
    parser.add_argument(
        "--outtype", choices=tuple(OUT_TYPES), default="q8_0", help="type of the matrices (%(default)s)"
    )
    parser.add_argument(
        "--smooth",
        type=Path,
        metavar="TEXT",
        help="with w8a8: move powers of two from channels to weights, as this text (or importance matrix) tells",
    )
    parser.add_argument("-t", "--threads", type=int, help="threads that quantise; default, 0 or -1: all CPUs")
    parser.add_argument(
        "--keep-uncertified", action="store_true", help=f"keep a file that fails as OUT{UNCERTIFIED_SUFFIX}"
    )
    args = parser.parse_args(argv)
    if args.threads is not None and not -1 <= args.threads <= 1024:
        parser.error(f"--threads must be between -1 and 1024, got {args.threads}")
    reporter = ConsoleReporter(Console(highlight=False))
    try:
        with terminate_cleanly():
            report = convert(
                args.checkpoint_dir,
                args.out,
                args.outtype,
                keep_uncertified=args.keep_uncertified,
                n_threads=args.threads,
                smooth=None if args.smooth is None else smooth_by(args.smooth),
                reporter=reporter,
                **_resolve_options(args),
            )
    except CertificationError as error:
        for line in error.certificate.lines():
            reporter.line(line)
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    for line in report.certificate.lines():
        reporter.line(line)
    types = ", ".join(f"{count} {name}" for name, count in report.types.items())
    speed = report.n_weights / max(report.quantise_s, 1e-9) / 1e6
    reporter.line(f"{report.n_weights:,} weights in {report.quantise_s:.1f} s ({speed:,.0f} million per second)")
    if report.smooth is not None:
        reporter.line(report.smooth.summary())
    for warning in report.warnings:
        reporter.line(f"warning: {warning}")
    reporter.line(f"wrote {report.path} ({report.n_bytes:,} bytes; tensors: {types})")
    return 0


def verify_main(argv: Sequence[str] | None = None) -> int:
    """Certify a file again, as the command line says. Returns 0 if it passes, 1 if not; other errors are raised."""
    parser = _Parser(
        prog="fixmin verify", description="Prove again that a GGUF file computes the function of its checkpoint."
    )
    parser.add_argument("gguf", type=Path, help="the file to verify")
    _add_resolve_options(parser)
    args = parser.parse_args(argv)
    reporter = ConsoleReporter(Console(highlight=False))
    certificate = verify(args.gguf, args.checkpoint_dir, progress=reporter.line, **_resolve_options(args))
    for line in certificate.lines():
        reporter.line(line)
    reporter.line(f"{args.gguf}: {'certified' if certificate.passed else 'NOT certified'}")
    return 0 if certificate.passed else 1
