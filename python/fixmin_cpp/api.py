"""One-call interface: generate() keeps the models that it loads; convert() and quantize() write files; system_info()
says what this build runs on."""

import os
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from . import _core
from .arguments import Prompt, as_bool, as_path, as_threads
from .errors import ArgumentTypeError
from .generation import Completion
from .hub import find
from .load_options import LOAD_FIELDS, LoadOptions
from .model import Model

if TYPE_CHECKING:
    # In the source tree they lie elsewhere, where mypy does not look.
    from fixmin_cpp.convert.convert import ConversionReport  # type: ignore[import-untyped, unused-ignore]
    from fixmin_cpp.quantization.requantize import QuantizeReport  # type: ignore[import-untyped, unused-ignore]

__all__ = ["clear_cache", "convert", "generate", "quantize", "system_info"]

# Two, so that a script which compares two files does not load one of them for every prompt.
_MAX_MODELS = 2

_cache: "OrderedDict[tuple[Any, ...], Model]" = OrderedDict()
_cache_lock = threading.Lock()


@overload
def generate(path: str | os.PathLike[str], prompt: Prompt, **arguments: Any) -> Completion: ...
@overload
def generate(path: str | os.PathLike[str], prompt: Sequence[Prompt], **arguments: Any) -> list[Completion]: ...
def generate(
    path: str | os.PathLike[str], prompt: Prompt | Sequence[Prompt], **arguments: Any
) -> Completion | list[Completion]:
    """Continues `prompt` with the model in the GGUF file `path`: Model(path).generate(prompt), loaded only once.

    The two models used last stay in memory, so that the next call answers at once; a file that has changed on disk or
    other settings load a new one. clear_cache() frees them. Safe to call from several threads.

    Args:
        path: a GGUF file, or what else fixmin_cpp.hub.find takes: a checkpoint folder or a repository of the Hugging
            Face hub, which is converted once.
        prompt: text, token ids, or a list of those: see Model.generate.
        **arguments: those of Model (n_threads, n_ctx, kv_type, n_kv, ...) go there, all others to Model.generate.

    Returns:
        A Completion, or a list of them for a list of prompts.
    """
    path = as_path("path", path)
    options = LoadOptions.check({name: arguments.pop(name) for name in LOAD_FIELDS if name in arguments})
    return _load(path, options).generate(prompt, **arguments)


def convert(
    checkpoint_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    outtype: str = "q8_0",
    *,
    trust_remote_code: bool = False,
    log: Callable[[str], object] | None = None,
    **options: Any,
) -> "ConversionReport":
    """Converts a Hugging Face checkpoint to a GGUF file and certifies it: `fixmin convert` (needs fixmin-cpp[convert]).

    >>> report = fixmin_cpp.convert("checkpoint/", "model.gguf", "q8_0", trust_remote_code=True)
    >>> report.path, report.certificate.passed

    `fixmin_cpp.convert` is the package of the converter too: `from fixmin_cpp.convert import ...` works beside this.

    Args:
        checkpoint_dir: the folder with config.json, weights, tokenizer.json and modeling code.
        out: the file to write, or the folder for it; None: in the checkpoint's folder. It appears when it is certified.
        outtype: f32, f16, bf16, q8_0, w8a8 or q4_0.
        trust_remote_code: run the Python code of the checkpoint, which could do anything, to see what it computes.
        log: called with a line of text for every step and finding, such as print. None: nothing is told.
        **options: map_file, calibrate, overrides, allow_missing, allow_unexpected, keep_uncertified, n_threads, smooth:
            see fixmin_cpp.convert.convert.convert.

    Returns:
        A ConversionReport: path, sizes, types, the conventions with their origins, and the certificate.

    Raises:
        CheckpointError: the checkpoint cannot be read, is ambiguous, or is not reproduced (CertificationError).
        ArgumentTypeError. OSError. ImportError: PyTorch or another package of the converter is not installed.
    """
    checkpoint_dir = as_path("checkpoint_dir", checkpoint_dir)
    out = None if out is None else as_path("out", out)
    if not isinstance(outtype, str):
        raise ArgumentTypeError(f"outtype must be a str, got {type(outtype).__name__}")
    _check_convert_options(log, options)
    # By name: a folder of its own in the source tree, part of the package once installed.
    converter = import_module(".convert.convert", __package__)
    reporter = None if log is None else converter.LogReporter(log)
    report: ConversionReport = converter.convert(
        checkpoint_dir,
        out,
        outtype.lower(),
        trust_remote_code=as_bool("trust_remote_code", trust_remote_code),
        reporter=reporter,
        **options,
    )
    return report


_CONVERT_OPTIONS = (
    *("map_file", "calibrate", "overrides", "allow_missing", "allow_unexpected", "keep_uncertified", "n_threads"),
    "smooth",
    "open_runner",
)


def _check_convert_options(log: Any, options: dict[str, Any]) -> None:
    """Raises ArgumentError, ArgumentTypeError; names of tensors are checked where they are used."""
    if log is not None and not callable(log):
        raise ArgumentTypeError(f"log must be callable, got {type(log).__name__}")
    for name, value in options.items():
        if name not in _CONVERT_OPTIONS:
            others = ("out", "outtype", "trust_remote_code", "log")
            meant = get_close_matches(name, [*_CONVERT_OPTIONS, *others], 1)
            hint = f": did you mean {meant[0]!r}?" if meant else ""
            raise ArgumentTypeError(f"convert() has no argument {name!r}{hint}")
        if name in ("map_file", "calibrate") and value is not None:
            as_path(name, value)
        elif name == "overrides" and not isinstance(value, Mapping | None):
            raise ArgumentTypeError(f"overrides must be a dict, got {type(value).__name__}")
        elif name.startswith("allow_") and not isinstance(value, Sequence):
            raise ArgumentTypeError(f"{name} must be a list of names, got {type(value).__name__}")
        elif name == "n_threads":
            as_threads(value)
        elif name == "keep_uncertified":
            as_bool(name, value)


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    tensor_types: Mapping[str, str] | None = None,
    output_tensor_type: str | None = None,
    allow_requantize: bool = False,
    smooth: Prompt | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> "QuantizeReport":
    """Writes the GGUF file `source` as `target` in another number format (needs fixmin-cpp[quantize]).

    Args:
        source: a GGUF file, in F32, F16 or BF16.
        target: the file to write; it appears when it is complete.
        type: a type for every matrix, such as "q8_0" or "q4_k", or a mixed recipe such as "q4_k_m".
        imatrix, tensor_types, output_tensor_type, allow_requantize, smooth, n_threads, progress: see
            fixmin_cpp.quantization.requantize.quantize.

    Returns:
        A QuantizeReport: path, sizes, and the type of every tensor with the reason where it is not the one asked for.

    Raises:
        ArgumentError, ArgumentTypeError: before anything is written. GGUFError: a malformed file. CheckpointError: a
            weight that the type cannot hold. OSError. ImportError: gguf or ggml-python is not installed.
    """
    report: QuantizeReport = import_module(".quantization.requantize", __package__).quantize(
        source,
        target,
        type,
        imatrix=imatrix,
        tensor_types=tensor_types,
        output_tensor_type=output_tensor_type,
        allow_requantize=allow_requantize,
        smooth=smooth,
        n_threads=n_threads,
        progress=progress,
    )
    return report


def clear_cache() -> None:
    """Lets go of the models that generate() keeps; memory is freed when calls that still use them return."""
    with _cache_lock:
        _cache.clear()


def system_info() -> dict[str, Any]:
    """What runs where: CPU, instruction sets, usable CPUs and threads (from the native module), and versions."""
    from importlib import metadata  # 30 ms that most programs need not spend

    return {
        **_core.system_info(),
        "fixmin_cpp": _core.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": np.__version__,
        "tokenizers": metadata.version("tokenizers"),
    }


def _load(name: str, options: LoadOptions) -> Model:
    path = os.fspath(find(name).path)
    path = os.fspath(find(path).path)
    status = os.stat(path)
    device = os.environ.get("FIXMIN_DEVICE")  # which counts where options say none
    key = (os.path.realpath(path), status.st_mtime_ns, status.st_size, status.st_ino, options, device)
    with _cache_lock:  # held while loading, so that two threads do not load the same file twice
        model = _cache.get(key)
        if model is None:
            while len(_cache) >= _MAX_MODELS:
                _cache.popitem(last=False)  # not close(): another thread may be in the middle of a call
            model = _cache[key] = Model(path, **options.given())
        _cache.move_to_end(key)
        return model


def _reset_after_fork() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)
