"""The commands of the converter: `fixmin convert` (and `convert/hf_to_gguf.py`), `fixmin verify`, `fixmin rewrap`.

One definition of the options that say how a checkpoint is read.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from ..atomic_file import naming, terminate_cleanly
from ..inspect import printable
from ..quantization.smooth import smooth_by
from .certify import verify
from .convert import UNCERTIFIED_SUFFIX, CertificationError, ConsoleReporter, convert
from .gguf_file.formats import OUT_TYPES
from .overrides import add_options, stated_options


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
        with naming("stdout"):
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


def rewrap_main(argv: Sequence[str] | None = None) -> int:
    """Write a checkpoint with the reference model as its code. Returns 0; errors are raised."""
    from .rewrap import rewrap  # imports torch and transformers, whose models it writes

    parser = _Parser(
        prog="fixmin rewrap",
        description="Write the weights of a checkpoint once more, with the reference model of this project as their "
        "code: with a KV cache, for transformers 5, torch.compile, vLLM. The result is compared with the original.",
    )
    _add_resolve_options(parser)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write; it must not exist")
    parser.add_argument(
        "--fold-bias",
        action="store_true",
        help="leave the output projection without a bias, as SGLang needs it: fold that into the last LayerNorm",
    )
    args = parser.parse_args(argv)
    reporter = ConsoleReporter(Console(highlight=False))
    with terminate_cleanly():
        report = rewrap(
            args.checkpoint_dir, args.out, fold_bias=args.fold_bias, log=reporter.line, **_resolve_options(args)
        )
    for line in report.lines():
        reporter.line(line)
    return 0
