"""A fixmin file as one that unmodified llama.cpp, and what is built on it, runs (docs/llama_cpp.md)."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from .. import _core
from ..arguments import as_bool, as_threads
from ..atomic_file import AtomicFile, refuse_inputs
from ..convert.gguf_file.formats import bits_per_weight, shown
from ..convert.gguf_file.readback import StoredModel, read_gguf
from ..convert.gguf_file.writer import Layout, Progress, Value
from ..convert.spec import ModelSpec
from ..errors import ArgumentError, ArgumentTypeError, CheckpointError, UnsupportedError
from ..quantization.requantize import MIXED, PLAIN, TYPES
from ..state import file_sha256
from ..tokenizer import TextTokenizer, end_of_text_ids
from .architecture import QKV, Architecture, choose
from .bpe import ENDS, LlamaTokenizer, from_tokenizer_json
from .certificate import (
    Certificate,
    SampleResult,
    certify,
    compare_tokens,
    token_figures,
    token_problems,
)
from .graph import Weights
from .programs import lines, modelfile
from .tensors import ExportTensor, export_tensors

TARGETS = ("llama.cpp",)
#: What --outtype may be.
OUT_TYPES = tuple(name for name in TYPES if name != "w8a8")

_JSON_KEY = "tokenizer.huggingface.json"
_PREFIX = "fixmin.export."
# Kept from the source, with all of general.* that does not speak of how its tensors are stored.
_KEPT = ("fixmin.convert.tool", "fixmin.convert.source", "fixmin.convert.sha256", "tokenizer.chat_template")
_STORAGE = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")
# What llama.cpp takes for the end of a text of a "gpt2" tokenizer that names none.
_DEFAULT_END = 11
# Without a template llama-server's chat takes ChatML's, which these models never saw.
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class ExportReport:
    """What an export did. `path` is where the complete file is."""

    path: Path
    architecture: str
    file_type: str
    source_bytes: int
    n_bytes: int
    bits_per_weight: float  # of the whole tensor data
    types: dict[str, int]  # ggml type -> number of tensors
    folded: bool  # the output projection had a bias
    notes: tuple[str, ...]  # what differs from the source
    certificate: Certificate
    tokens: tuple[SampleResult, ...] | None  # None: no tokenizer
    modelfile: Path | None
    commands: dict[str, str]  # program -> what to type
    seconds: float


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = "llama.cpp",
    outtype: str | None = None,
    tokenizer: bool = True,
    allow_token_differences: bool = False,
    modelfile_path: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    progress: Progress | None = None,
    step: Callable[[str], None] | None = None,
) -> ExportReport:
    """Writes a model as a GGUF file of an architecture that llama.cpp has, and measures what differs.

    The codes become a table, the bias of the output projection goes into the last LayerNorm and the matrix, rows of
    queries and keys get llama.cpp's order, the tokenizer becomes a byte-level BPE. Streams tensor by tensor. The
    file appears under its name only when it is complete and its certificate is good.

    Args:
        model: a GGUF file of architecture "fixmin", best in F32 or F16: what is computed anew from quantised weights
            is rounded twice.
        out: the file to write, none of those that are read.
        to: "llama.cpp", the only one so far.
        outtype: type of the matrices, one of OUT_TYPES, as `fixmin quantize` would choose; None: those of the model.
        tokenizer: False: without one. Programs then take token ids alone.
        allow_token_differences: write a file too whose tokenizer gives other ids in more than a few ordinary texts.
        modelfile_path: where to write a Modelfile for Ollama.
        n_threads: threads that quantise; None, 0 or -1: the CPUs of this process.
        progress: called with weights done, weights in all, and the tensor being written; step: with what is done next.

    Returns:
        An ExportReport.

    Raises:
        UnsupportedError: llama.cpp has no architecture that computes the model, or no such tokenizer.
        ArgumentError: an unknown outtype, W8A8 without one, an output that is an input. ArgumentTypeError: a wrong
            type of argument.
        CheckpointError: the certificate failed, a weight does not fit the type, or the target is being written by
            another process. GGUFError: the model is malformed. OSError: a file cannot be read or written.
    """
    started = time.perf_counter()
    source, target = _as_path("model", model), _as_path("out", out)
    tell = step or (lambda text: None)
    name = _as_outtype(outtype)
    if to not in TARGETS:
        raise ArgumentError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    threads = as_threads(n_threads)
    wants_tokenizer = as_bool("tokenizer", tokenizer)
    allow = as_bool("allow_token_differences", allow_token_differences)
    beside = None if modelfile_path is None else _as_path("modelfile_path", modelfile_path)
    refuse_inputs(target, source)
    if beside is not None:
        refuse_inputs(beside, source)
        if beside.resolve() == target.resolve():
            raise ArgumentError(f"{beside} is to be the model: give the Modelfile another name")

    for path in (target, beside):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            why = "is a folder" if path.is_dir() else "there is no such folder to write it to"
            raise ArgumentError(f"{path}: {why}")
    if beside is not None and beside.exists():
        made = modelfile(target, beside.parent, 1).splitlines()[0]
        if beside.read_bytes().splitlines()[:1] != [made.encode()]:
            raise ArgumentError(f"{beside} exists, and is not of this file: give another one with --modelfile")
    stored = read_gguf(source)
    spec = stored.spec
    architecture = choose(spec, keeps_qkv_apart=_types_differ(stored, name))
    tensors = export_tensors(source, stored, architecture, name)
    words, tokens = _tokenizer(source, stored, allow, tell) if wants_tokenizer else (None, None)
    folded = "output.bias" in spec.tensors and not architecture.output_bias
    notes = _notes(spec, tensors, tokens, words, stored.metadata)
    keys = {
        **_kept(source),
        **_architecture_keys(spec, architecture),
        **_type_keys(stored, name),
        **_tokenizer_keys(words, stored.metadata, spec.vocab_size),
        **_export_keys(source, folded, notes, tokens),
    }
    layout = Layout([t.plan for t in tensors], keys, architecture=architecture.name)
    with ExitStack() as files:
        file = files.enter_context(AtomicFile(target))
        text = None if beside is None else files.enter_context(AtomicFile(beside))
        certificate = _written(file, layout, source, stored, tensors, threads, progress, tell)
        if text is not None and beside is not None:
            text.write(modelfile(target, beside.parent, spec.context_length).encode())
        file.commit()
        if text is not None:
            text.commit()
    return ExportReport(
        path=target,
        architecture=architecture.name,
        file_type=name or "as in the source",
        source_bytes=source.stat().st_size,
        n_bytes=target.stat().st_size,
        bits_per_weight=8 * sum(plan.n_bytes for plan in layout.tensors) / layout.n_weights,
        types=dict(Counter(shown(plan.type) for plan in layout.tensors)),
        folded=folded,
        notes=tuple(notes),
        certificate=certificate,
        tokens=tokens,
        modelfile=beside,
        commands=lines(target, spec.context_length, beside),
        seconds=time.perf_counter() - started,
    )


def _tokenizer(
    source: Path, stored: StoredModel, allow: bool, tell: Callable[[str], None]
) -> tuple[LlamaTokenizer | None, tuple[SampleResult, ...] | None]:
    """What llama.cpp is told, and how it fares; None if the model has no tokenizer."""
    own = TextTokenizer.from_metadata(stored.metadata)
    if own is None:
        return None, None
    data = json.loads(stored.metadata[_JSON_KEY])
    words = from_tokenizer_json(data, stored.spec.vocab_size)
    unknown = data["model"].get("unk_token")
    tell("comparing token ids")
    tokens = tuple(compare_tokens(own, words, data["model"]["vocab"].get(unknown)))
    if (problems := token_problems(tokens)) and not allow:
        raise UnsupportedError(
            f"{source}: llama.cpp's tokenizer would give other ids ({'; '.join(problems)}); "
            "--allow-token-differences writes the file nevertheless"
        )
    return words, tokens


def _written(
    file: AtomicFile,
    layout: Layout,
    source: Path,
    stored: StoredModel,
    tensors: list[ExportTensor],
    threads: int,
    progress: Progress | None,
    tell: Callable[[str], None],
) -> Certificate:
    """Writes the file, measures it, and writes what was measured into it. CheckpointError beyond a limit."""
    layout.metadata.update(_figures(None, stored.spec))
    try:
        layout.write(file, {}, threads, progress or (lambda done, total, tensor: None))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    keys = {"general.architecture": layout.architecture, **{k: value.value for k, value in layout.metadata.items()}}
    planned = Weights(keys, {t.name: t.values for t in tensors})
    lowest = min((t.plan.type for t in tensors if _is_weight(t)), key=bits_per_weight)
    certificate = certify(source, stored, planned, file.path, lowest, tell)
    if certificate.problems:
        raise CheckpointError(f"{file.target} was not written: {'; '.join(certificate.problems)}")
    layout.metadata.update(_figures(certificate, stored.spec))
    layout.rewrite_header(file, {})
    return certificate


# --- what differs ------------------------------------------------------------------------------------------------


def _notes(
    spec: ModelSpec,
    tensors: list[ExportTensor],
    tokens: tuple[SampleResult, ...] | None,
    words: LlamaTokenizer | None,
    metadata: Mapping[str, Any],
) -> list[str]:
    notes = []
    if spec.activation == "gelu":
        notes.append("GELU is that of erf; llama.cpp computes the formula with tanh, from a table in F16")
    if twice := [t.name for t in tensors if t.rounds_twice]:
        which = twice[0] if len(twice) == 1 else f"{len(twice)} matrices"
        notes.append(f"{which}: computed from quantised weights and quantised again; an F32 or F16 source avoids that")
    if tokens is None:
        notes.append("no tokenizer: programs take token ids alone")
    elif any(result.n_different for result in tokens):
        shares = [f"{r.name} {r.n_different} of {r.n_texts}" for r in tokens if r.n_different]
        notes.append(f"texts with other token ids than by the model's own tokenizer: {', '.join(shares)}")
    return notes + ([] if words is None else _end_notes(words, end_of_text_ids(metadata, spec.vocab_size)))


def _end_notes(words: LlamaTokenizer, ends: tuple[int, ...]) -> list[str]:
    notes = []
    if len(ends) > 3:
        notes.append(f"{len(ends)} ids end a text, llama.cpp is told three: {', '.join(map(str, ends[:3]))}")
    if more := [f"{text} ({i})" for i, text in enumerate(words.tokens) if text in ENDS and i not in ends[:3]]:
        notes.append(f"llama.cpp ends a text at {', '.join(more)} too, by the name")
    if not ends and words.unused is None:
        notes.append(f"no id ends a text; llama.cpp then takes {_DEFAULT_END} for one")
    return notes


def _types_differ(stored: StoredModel, outtype: str | None) -> bool:
    """Whether q, k and v of a layer have several types: in the source, or by a mixed recipe."""
    if outtype is not None:
        return outtype in MIXED and outtype not in PLAIN
    layers = range(stored.spec.block_count)
    return any(len({stored.types[f"blk.{n}.{part}.weight"] for part in QKV}) > 1 for n in layers)


def _is_weight(tensor: ExportTensor) -> bool:
    """Not the table of codes, which is exact in any type."""
    return len(tensor.plan.shape) > 1 and tensor.name != "token_embd.weight"


# --- keys --------------------------------------------------------------------------------------------------------


def _u32(value: int) -> Value:
    return Value(int(value), GGUFValueType.UINT32)


def _f32(value: float) -> Value:
    return Value(float(value), GGUFValueType.FLOAT32)


def _bool(value: bool) -> Value:
    return Value(value, GGUFValueType.BOOL)


def _text(value: str) -> Value:
    return Value(value.encode("utf-8", "backslashreplace"), GGUFValueType.STRING)


def _texts(values: list[str]) -> Value:
    return Value([v.encode("utf-8", "surrogatepass") for v in values], GGUFValueType.ARRAY, GGUFValueType.STRING)


def _kept(path: Path) -> dict[str, Value]:
    """general.* and where the source came from, as they are."""
    file = _core.GgufFile(str(path))
    kept = {}
    for key, value in file.metadata.items():
        if key in _KEPT or (key.startswith("general.") and key not in _STORAGE):
            kind, element = file.metadata_types[key]
            plain = value.tolist() if isinstance(value, np.ndarray) else value
            kept[key] = Value(plain, GGUFValueType(kind), None if element is None else GGUFValueType(element))
    return {"general.type": _text("model"), **kept}


def _architecture_keys(spec: ModelSpec, architecture: Architecture) -> dict[str, Value]:
    eps = "layer_norm_epsilon" if spec.norm == "layernorm" else "layer_norm_rms_epsilon"
    keys = {
        "vocab_size": _u32(spec.vocab_size),
        "context_length": _u32(spec.context_length),
        "embedding_length": _u32(spec.embedding_length),
        "block_count": _u32(spec.block_count),
        "feed_forward_length": _u32(spec.feed_forward_length),
        "attention.head_count": _u32(spec.head_count),
        "attention.head_count_kv": _u32(spec.head_count_kv),
        f"attention.{eps}": _f32(spec.norm_eps),
        "rope.dimension_count": _u32(spec.rope_dim),
        "rope.freq_base": _f32(spec.rope_base),
        "use_parallel_residual": _bool(False),
    }
    return {f"{architecture.name}.{key}": value for key, value in keys.items()}


def _type_keys(stored: StoredModel, outtype: str | None) -> dict[str, Value]:
    kind = int((PLAIN | MIXED)[outtype][1]) if outtype else stored.metadata.get("general.file_type")
    number = {} if kind is None else {"general.file_type": _u32(kind)}
    return {**number, "general.quantization_version": _u32(2)}


def _tokenizer_keys(words: LlamaTokenizer | None, metadata: Mapping[str, Any], vocab_size: int) -> dict[str, Value]:
    if words is None:
        return {"tokenizer.ggml.model": _text("none")}
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding", "unknown")}
    # Any of the three ends a text.
    ends = end_of_text_ids(metadata, vocab_size)
    ids.update(zip(("eos", "eot", "eom"), ends or (words.unused,), strict=False))
    keys = {
        "tokenizer.ggml.model": _text("gpt2"),
        "tokenizer.ggml.pre": _text(words.pre),
        "tokenizer.ggml.tokens": _texts(words.tokens),
        "tokenizer.ggml.token_type": Value(words.types, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.merges": _texts([f"{a} {b}" for a, b in words.merges]),
        # Like fixmin: nothing is put before or after a prompt.
        "tokenizer.ggml.add_bos_token": _bool(False),
        "tokenizer.ggml.add_eos_token": _bool(False),
        "tokenizer.ggml.add_space_prefix": _bool(False),
        **{f"tokenizer.ggml.{name}_token_id": _u32(i) for name, i in ids.items() if i is not None},
    }
    if "tokenizer.chat_template" not in metadata:
        keys["tokenizer.chat_template"] = _text(_PLAIN_TEMPLATE)
    return keys


def _export_keys(
    source: Path, folded: bool, notes: list[str], tokens: tuple[SampleResult, ...] | None
) -> dict[str, Value]:
    keys = {
        "tool": _text(f"fixmin-cpp {_core.__version__}"),
        "source": _text(source.name),
        "source_sha256": _text(file_sha256(source)),
        "folded_output_bias": _bool(folded),
        "differences": _texts(notes),
    }
    if tokens is not None:
        keys["tokens"] = _text(json.dumps(token_figures(tokens)))
    return {_PREFIX + key: value for key, value in keys.items()}


def _figures(certificate: Certificate | None, spec: ModelSpec) -> dict[str, Value]:
    """Of fixed size: room for them is made before they are known."""
    nothing = Certificate(0, np.nan, 0, None if spec.activation == "swiglu" else np.nan, np.nan, 0, np.nan, np.nan)
    figures = (certificate or nothing).figures()
    return {f"{_PREFIX}certificate.{key}": _f32(value) for key, value in figures.items()}


# --- arguments ---------------------------------------------------------------------------------------------------


def _as_path(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ArgumentTypeError(f"{name} must be a str or a path, got {value!r}")
    return Path(value)


def _as_outtype(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ArgumentTypeError(f"outtype must be a str, got {value!r}")
    if value.lower() not in OUT_TYPES:
        raise ArgumentError(f"outtype must be one of {', '.join(OUT_TYPES)}, got {value!r}")
    return value.lower()
