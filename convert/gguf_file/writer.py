"""Write a `ModelSpec` as a GGUF file (keys: docs/design.md): metadata, then the tensors, quantised as they stream by.

    with AtomicFile(out) as file:
        layout = Layout.plan(spec, "q8_0", provenance)
        layout.write(file, certificate={...})     # ~16 MB in flight, whatever the size of the model
        ...                                       # certify file.path
        layout.rewrite_header(file, certificate)  # same length: the certificate has fixed-size values only
        file.commit()

The metadata and the table of tensors are packed by `gguf.GGUFWriter`; only the tensor data bypasses it, because it
takes whole tensors and this module never holds one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType, quants
from gguf.utility import size_label
from numpy.typing import NDArray

from ...atomic_file import AtomicFile, naming
from ...errors import CheckpointError, GGUFError, UnsupportedError
from ...inspect import CERTIFICATE_PREFIX
from ...tokenizer import EOS_IDS_KEY
from ..spec import ModelSpec, TensorRecipe
from .formats import (
    F32,
    I8,
    OUT_TYPES,
    SCALE_SUFFIX,
    W8A8_KEY,
    W8A8_VERSION,
    NotFiniteError,
    choose_type,
    quantize_rows,
    row_bytes,
    row_scales,
)

ARCHITECTURE = "fixmin"

# Weights per chunk: 4 MB of float32. Larger chunks were no faster; smaller ones make the reads of a file short.
_CHUNK = 1 << 20

Progress = Callable[[int, int, str], None]  # weights done, weights in all, tensor being written


# --- metadata ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """A metadata value with its GGUF type, and the type of its elements if it is an array."""

    value: Any
    type: GGUFValueType
    element: GGUFValueType | None = None


def _u32(value: int) -> Value:
    return Value(int(value), GGUFValueType.UINT32)


def _f32(value: float) -> Value:
    return Value(float(value), GGUFValueType.FLOAT32)


def _text(value: str) -> Value:
    return Value(_utf8(value), GGUFValueType.STRING)


def _texts(values: Sequence[str]) -> Value:
    return Value([_utf8(v) for v in values], GGUFValueType.ARRAY, GGUFValueType.STRING)


def _bytes(values: NDArray[np.uint8]) -> Value:
    return Value(np.asarray(values, dtype=np.uint8).tobytes(), GGUFValueType.ARRAY, GGUFValueType.UINT8)


def _utf8(text: str) -> bytes:
    """UTF-8, which GGUF demands. A lone surrogate (an odd folder name) has none and is written as `\\udc80`."""
    return text.encode("utf-8", "backslashreplace")


def _fixed_size(values: Mapping[str, bool | int | float]) -> dict[str, Value]:
    """Certificate figures as GGUF values whose length does not depend on the figure."""
    types = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT64, float: GGUFValueType.FLOAT32}
    return {CERTIFICATE_PREFIX + name: Value(value, types[type(value)]) for name, value in values.items()}


@dataclass(frozen=True)
class Provenance:
    """Where a file comes from; everything here is known before its tensors are written.

    `against`: what the certificate compares with, in words. `overrides`: the plain values that the user stated, as
    JSON; allow_missing, allow_unexpected: the tensors, or patterns of names, that he allowed. With them `fixmin verify`
    resolves the checkpoint in the same way.
    """

    tool: str
    source: str
    sha256: str
    conventions: Sequence[str]
    overrides: str
    against: str
    allow_missing: Sequence[str] = ()
    allow_unexpected: Sequence[str] = ()


def model_metadata(spec: ModelSpec, outtype: str) -> dict[str, Value]:
    """Hyper-parameters and conventions, with the keys of docs/design.md."""
    eps_key = "layer_norm_epsilon" if spec.norm == "layernorm" else "layer_norm_rms_epsilon"
    code = spec.code
    keys = {
        "general.type": _text("model"),
        "general.name": _text(spec.name),
        "general.file_type": _u32(OUT_TYPES[outtype].file_type),
        "general.quantization_version": _u32(2),
        "fixmin.vocab_size": _u32(spec.vocab_size),
        "fixmin.context_length": _u32(spec.context_length),
        "fixmin.embedding_length": _u32(spec.embedding_length),
        "fixmin.block_count": _u32(spec.block_count),
        "fixmin.feed_forward_length": _u32(spec.feed_forward_length),
        "fixmin.attention.head_count": _u32(spec.head_count),
        "fixmin.attention.head_count_kv": _u32(spec.head_count_kv),
        "fixmin.attention.scale": _f32(spec.attention_scale),
        f"fixmin.attention.{eps_key}": _f32(spec.norm_eps),
        "fixmin.rope.dimension_count": _u32(spec.rope_dim),
        "fixmin.rope.freq_base": _f32(spec.rope_base),
        "fixmin.rope.style": _text(spec.rope_style),
        "fixmin.activation": _text(spec.activation),
        "fixmin.code.kind": _text(code.kind),
    }
    if code.kind != "learned":
        keys["fixmin.code.width"] = _u32(code.width)
        keys["fixmin.code.lift"] = _text(code.lift)
        keys["fixmin.code.values"] = Value([float(v) for v in code.values], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    if code.kind == "affine":
        assert code.matrix is not None
        assert code.shift is not None
        keys["fixmin.code.affine_matrix"] = _bytes(code.matrix)
        keys["fixmin.code.affine_shift"] = _bytes(code.shift)
    return keys


def provenance_metadata(provenance: Provenance) -> dict[str, Value]:
    """`fixmin.convert.*`, without the figures of the certificate."""
    return {
        "fixmin.convert.tool": _text(provenance.tool),
        "fixmin.convert.source": _text(provenance.source),
        "fixmin.convert.sha256": _text(provenance.sha256),
        "fixmin.convert.conventions": _texts(provenance.conventions),
        "fixmin.convert.overrides": _text(provenance.overrides),
        "fixmin.convert.allow_missing": _texts(provenance.allow_missing),
        "fixmin.convert.allow_unexpected": _texts(provenance.allow_unexpected),
        f"{CERTIFICATE_PREFIX}against": _text(provenance.against),
    }


def tokenizer_metadata(spec: ModelSpec) -> dict[str, Value]:
    """tokenizer.json whole, for this runtime, and the lists `tokenizer.ggml.*` for other GGUF tools.

    Those tools know byte-level BPE as "gpt2". Any other tokenizer is listed under its own model name ("bpe" for a
    BPE over characters): a tool that does not know it must refuse, not split text in another way.
    """
    if spec.tokenizer_json is None:
        return {"tokenizer.ggml.model": _text("none"), **_special_metadata(spec, None)}
    text = spec.tokenizer_json.read_text(encoding="utf-8")
    try:
        tokenizer = json.loads(text)
        model = tokenizer["model"]
        tokens, types = _token_lists(tokenizer, spec.vocab_size)
        merges = [_merge(pair) for pair in model.get("merges") or []]
        kind = "gpt2" if model["type"] == "BPE" and _is_byte_level(tokenizer) else str(model["type"]).lower()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{spec.tokenizer_json}: not a tokenizer.json of the tokenizers library: {error!r}"
        ) from error
    keys = {
        "tokenizer.ggml.model": _text(kind),
        "tokenizer.ggml.tokens": _texts(tokens),
        "tokenizer.ggml.token_type": Value(types, GGUFValueType.ARRAY, GGUFValueType.INT32),
    }
    if merges:
        keys["tokenizer.ggml.merges"] = _texts(merges)
    unknown = model.get("unk_token")
    is_known = isinstance(unknown, str) and unknown in tokens
    keys |= _special_metadata(spec, tokens.index(unknown) if is_known else None)
    keys["tokenizer.huggingface.json"] = _text(text)
    return keys


def _special_metadata(spec: ModelSpec, unknown: int | None) -> dict[str, Value]:
    """Ids of special tokens. GGUF's own key holds one end of text; `fixmin.eos_token_ids` all, if there are several."""
    eos = next(iter(spec.eos_token_ids), None)
    special = {"bos": spec.bos_token_id, "eos": eos, "padding": spec.pad_token_id, "unknown": unknown}
    keys = {f"tokenizer.ggml.{name}_token_id": _u32(i) for name, i in special.items() if i is not None}
    if len(spec.eos_token_ids) > 1:
        keys[EOS_IDS_KEY] = Value(list(spec.eos_token_ids), GGUFValueType.ARRAY, GGUFValueType.UINT32)
    return keys


def _token_lists(tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and `TokenType` of every id below vocab_size; ids that the tokenizer lacks get a name and type unused."""
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [text, score] in order of ids
        vocab = {entry[0]: i for i, entry in enumerate(vocab)}
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in vocab.items():
        if 0 <= i < vocab_size:
            tokens[i], types[i] = token, int(TokenType.NORMAL)
    unknown = tokenizer["model"].get("unk_token")
    for added in tokenizer.get("added_tokens") or []:
        i, token = added["id"], added["content"]
        if 0 <= i < vocab_size:
            tokens[i], types[i] = token, int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    for i, token in enumerate(tokens):
        if token == unknown:
            types[i] = int(TokenType.UNKNOWN)
    return tokens, types


def _merge(pair: str | Sequence[str]) -> str:
    """A merge as "left right". A space within a part becomes U+0120, as gguf and llama.cpp have it."""
    if isinstance(pair, str):
        return pair
    left, right = pair
    return f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether bytes are mapped to printable characters before BPE: a ByteLevel part, alone or within a sequence."""
    parts = [tokenizer.get("pre_tokenizer"), tokenizer.get("decoder"), tokenizer.get("normalizer")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if part.get("type") == "ByteLevel":
                return True
            for name in ("pretokenizers", "decoders", "normalizers"):
                parts.extend(part.get(name) or [])
    return False


# --- tensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPlan:
    """A tensor and the form it is stored in. `shape`: NumPy order, rows of shape[-1]."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    recipe: TensorRecipe
    note: str | None = None  # why the type is not the one asked for
    is_stored: bool = False  # the recipe gives rows as they are stored, not float32
    importance: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)  # [shape[-1]], see imatrix

    @property
    def n_bytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.n_rows * row_bytes(self.shape[-1], self.type)

    @property
    def n_rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def n_weights(self) -> int:
        """0 for the scales of a matrix."""
        return 0 if self.name.endswith(SCALE_SUFFIX) else self.n_rows * self.shape[-1]


def plan_tensors(spec: ModelSpec, outtype: str) -> list[TensorPlan]:
    """The tensors of the file in order, each with the ggml type it is stored in."""
    plans = []
    for name, recipe in spec.tensors.items():
        ggml_type, note = choose_type(name, recipe.shape, outtype)
        plans.append(TensorPlan(name, recipe.shape, ggml_type, recipe, note))
        if ggml_type == I8:
            plans.append(scale_plan(plans[-1]))
    if spec.code.table is not None:
        # Bit i of a row is bit i % 8, least significant first, of byte i / 8.
        packed = np.packbits(spec.code.table, axis=1, bitorder="little").view(np.int8)
        recipe = TensorRecipe(packed.shape, (), lambda start, stop: packed[start:stop])
        plans.append(TensorPlan("token_code.weight", packed.shape, GGMLQuantizationType.I8, recipe, is_stored=True))
    return plans


def scale_plan(matrix: TensorPlan, stored: TensorRecipe | None = None) -> TensorPlan:
    """The vector of scales of a W8A8 matrix, which stands behind it: computed, or as it is stored already."""

    def read(start: int, stop: int) -> NDArray[np.float32]:
        step = max(1, _CHUNK // matrix.shape[-1])
        ends = [*range(start, stop, step), stop]
        parts = (matrix.recipe.load_rows(first, last) for first, last in itertools.pairwise(ends))
        return np.concatenate([row_scales(part) for part in parts])

    shape = matrix.shape[:1]
    recipe = stored or TensorRecipe(shape, matrix.recipe.sources, read)
    return TensorPlan(matrix.name + SCALE_SUFFIX, shape, F32, recipe)


@dataclass
class Layout:
    """A file that is fully determined except for the figures of its certificate."""

    tensors: list[TensorPlan]
    metadata: dict[str, Value]
    header_bytes: int = field(default=0)  # length of everything before the tensor data, padding included
    architecture: str = ARCHITECTURE

    @classmethod
    def plan(cls, spec: ModelSpec, outtype: str, provenance: Provenance) -> Layout:
        """Decide types and metadata. Reads the tokenizer and a code table, no weights."""
        if outtype not in OUT_TYPES:
            raise CheckpointError(f"outtype {outtype!r} is not one of {', '.join(OUT_TYPES)}")
        tensors = plan_tensors(spec, outtype)
        n_weights = sum(tensor.n_weights for tensor in tensors)
        metadata = model_metadata(spec, outtype)
        metadata["general.size_label"] = _text(size_label(n_weights, n_weights, 0, 0))
        if any(t.name.endswith(SCALE_SUFFIX) for t in tensors):
            metadata[W8A8_KEY] = _u32(W8A8_VERSION)
        return cls(tensors, {**metadata, **provenance_metadata(provenance), **tokenizer_metadata(spec)})

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensor data, padding included."""
        return sum(_pad(t.n_bytes) for t in self.tensors)

    @property
    def n_weights(self) -> int:
        return sum(t.n_weights for t in self.tensors)

    def write(
        self,
        file: AtomicFile,
        certificate: Mapping[str, bool | int | float],
        n_threads: int = 0,
        progress: Progress = lambda done, total, name: None,
    ) -> None:
        """Write header and tensors. Peak memory: a few chunks of 4 MB for each thread.

        n_threads: 0 for the CPUs this process may use. Raises CheckpointError for a value that the type cannot hold.
        """
        header = self._header(certificate)
        self.header_bytes = len(header)
        needed, free = len(header) + self.data_bytes, shutil.disk_usage(file.path.parent).free
        if free < needed:
            text = f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB free"
            raise OSError(errno.ENOSPC, text, str(file.target))
        n_threads = n_threads or len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(n_threads, "quantize") as pool:
            file.write(header)
            done = 0
            for tensor, part, is_last in self._quantised(pool, window=n_threads + 1):
                file.write(part)
                done += part.shape[0] * tensor.n_weights // tensor.n_rows
                if is_last:
                    file.write(bytes(_pad(tensor.n_bytes) - tensor.n_bytes))
                progress(done, self.n_weights, tensor.name)
        with naming(file.target):
            file.file.flush()

    def rewrite_header(self, file: AtomicFile, certificate: Mapping[str, bool | int | float]) -> None:
        """Replace the figures of the certificate in a file that `write` has written."""
        header = self._header(certificate)
        if len(header) != self.header_bytes:
            raise ValueError(f"the header changed from {self.header_bytes} to {len(header)} bytes")
        with naming(file.target):
            file.file.seek(0)
            file.file.write(header)
            file.file.flush()

    def _quantised(self, pool: ThreadPoolExecutor, window: int) -> Iterator[tuple[TensorPlan, NDArray[np.uint8], bool]]:
        """All chunks in file order with whether they end their tensor; at most `window` are waiting at a time.

        This thread reads the checkpoint, whose readers need not be thread-safe; the pool does the arithmetic.
        """
        waiting: deque[tuple[TensorPlan, Future[NDArray[np.uint8]], bool]] = deque()
        try:
            for tensor in self.tensors:
                step = max(1, _CHUNK // tensor.shape[-1])
                for start in range(0, tensor.n_rows, step):
                    stop = min(start + step, tensor.n_rows)
                    part = pool.submit(_store, tensor, _read(tensor, start, stop), start)
                    waiting.append((tensor, part, stop == tensor.n_rows))
                    if len(waiting) >= window:
                        plan, part, is_last = waiting.popleft()
                        yield plan, part.result(), is_last
            for plan, part, is_last in waiting:
                yield plan, part.result(), is_last
        finally:
            for _, part, _ in waiting:
                part.cancel()

    def _header(self, certificate: Mapping[str, bool | int | float]) -> bytes:
        """Magic, metadata and tensor table, padded to where the data begins."""
        with tempfile.TemporaryDirectory(prefix="fixmin-") as folder:
            path = Path(folder, "header.gguf")
            writer = GGUFWriter(path, self.architecture)
            for key, value in {**self.metadata, **_fixed_size(certificate)}.items():
                if value.type != GGUFValueType.ARRAY or value.value:  # GGUFWriter has no empty arrays
                    writer.add_key_value(key, value.value, value.type, value.element)
            for tensor in self.tensors:
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
            with naming(path), contextlib.closing(writer):
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
            header = path.read_bytes()
        return header + bytes(_pad(len(header)) - len(header))


def check_loads(file: AtomicFile) -> None:
    """Load the finished file as whoever uses it does: tensors, tokenizer, special tokens.

    Raises CheckpointError if that fails: such a file must not get its name.
    """
    from ...model import Model

    try:
        Model(file.path, n_ctx=1, n_kv=1, n_batch=1, n_parallel=1).close()
    except (GGUFError, UnsupportedError) as error:
        text = str(error).replace(str(file.path), str(file.target))
        raise CheckpointError(f"the finished file cannot be loaded, so it was not written: {text}") from error


def _pad(n: int) -> int:
    return GGUFWriter.ggml_pad(n, GGUF_DEFAULT_ALIGNMENT)


def _read(tensor: TensorPlan, start: int, stop: int) -> NDArray[Any]:
    """Rows start..stop [stop - start, row length]; a vector is one row."""
    if len(tensor.shape) == 1:
        return tensor.recipe.load()[None]
    if tensor.is_stored:
        return tensor.recipe.read_rows(start, stop)
    return tensor.recipe.load_rows(start, stop)


def _store(tensor: TensorPlan, rows: NDArray[Any], first: int) -> NDArray[np.uint8]:
    """Rows as bytes; `first` is the number of the first one. CheckpointError for values that cannot be stored."""
    try:
        if not tensor.is_stored:
            return quantize_rows(rows, tensor.type, tensor.importance)
        stored = np.ascontiguousarray(rows).view(np.uint8)
        if tensor.type != GGMLQuantizationType.I8:
            values = quants.dequantize(stored, tensor.type)
            if not np.isfinite(values).all():
                raise NotFiniteError(values.reshape(len(rows), -1))
        return stored
    except NotFiniteError as error:
        row, column = error.index
        index = [column] if len(tensor.shape) == 1 else [first + row, column]
        origin = ", ".join(tensor.recipe.sources)
        raise CheckpointError(
            f"tensor {tensor.name} ({f'from {origin}' if origin else 'computed'}) {error} at {index}: the weights are "
            "damaged"
        ) from error
    except OverflowError as error:
        raise CheckpointError(
            f"tensor {tensor.name} (checkpoint: {', '.join(tensor.recipe.sources) or 'computed'}) {error}; "
            "use --outtype bf16 or f32, or repair the checkpoint if the value is not meant to be there"
        ) from error
