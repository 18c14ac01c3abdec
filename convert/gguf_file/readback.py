"""Read a `fixmin` GGUF file back into a `ModelSpec`, so that it can be compared with the checkpoint it came from.

Independent of the writer and of the engine's arithmetic: the bytes are dequantised by `gguf.quants` (NumPy). Data is
read with plain reads, not through the mapping, because mapped pages count as resident memory.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from ... import _core
from ...errors import GGUFError, naming
from ...recognise import refuse_wrong_model
from ..spec import CodeSpec, ModelSpec, TensorRecipe
from .formats import F32, SCALE_SUFFIX, W8A8_KEY, W8A8_VERSION, row_bytes


@dataclass(frozen=True)
class StoredModel:
    """A file as it is on the disk. `types`: ggml type of each tensor of `spec`; `scales`: of its W8A8 matrices."""

    spec: ModelSpec
    types: dict[str, GGMLQuantizationType]
    scales: dict[str, TensorRecipe]
    metadata: dict[str, Any]


def read_gguf(path: str | os.PathLike[str]) -> StoredModel:
    """Metadata and tensor table of a file; tensor values are read and dequantised when a recipe is asked for rows.

    Raises GGUFError for a file that is malformed, is of another architecture or lacks a key; OSError if unreadable.
    """
    path = Path(path)
    with naming(path):
        refuse_wrong_model(path)
        file = _core.GgufFile(str(path))
        metadata = file.metadata
        if metadata.get("general.architecture") != "fixmin":
            raise GGUFError(f"{path}: architecture {metadata.get('general.architecture')!a}, expected 'fixmin'")
        keys = _Keys(path, metadata)
        types = {t.name: GGMLQuantizationType[t.type] for t in file.tensors}
        recipes = {t.name: tensor_recipe(path, t, types[t.name]) for t in file.tensors if t.name != "token_code.weight"}
        scales = {}
        for name in [name for name in recipes if types[name] == GGMLQuantizationType.I8]:
            if (scale := recipes.pop(name + SCALE_SUFFIX, None)) is None or types.pop(name + SCALE_SUFFIX) != F32:
                raise GGUFError(f"{path}: {name} is of type I8 and {name}{SCALE_SUFFIX} is missing or not F32")
            _check_scaled(path, name, metadata, scale)
            scales[name] = scale
            recipes[name] = _scaled(recipes[name], scale)
        is_rms = "fixmin.attention.layer_norm_rms_epsilon" in metadata
        spec = ModelSpec(
            vocab_size=keys.get("vocab_size", int),
            context_length=keys.get("context_length", int),
            embedding_length=keys.get("embedding_length", int),
            block_count=keys.get("block_count", int),
            feed_forward_length=keys.get("feed_forward_length", int),
            head_count=keys.get("attention.head_count", int),
            head_count_kv=keys.get("attention.head_count_kv", int),
            attention_scale=keys.get("attention.scale", float),
            norm="rmsnorm" if is_rms else "layernorm",
            norm_eps=keys.get(f"attention.layer_norm_{'rms_' if is_rms else ''}epsilon", float),
            rope_dim=keys.get("rope.dimension_count", int),
            rope_base=keys.get("rope.freq_base", float),
            rope_style=keys.get("rope.style", str),
            activation=keys.get("activation", str),
            code=_code(keys, file),
            tensors=recipes,
            conventions={},
            name=str(metadata.get("general.name", path.stem)),
        )
        return StoredModel(spec, types, scales, metadata)


class _Keys:
    """Typed access to `fixmin.*`."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self._path, self._metadata = path, metadata

    def get(self, name: str, kind: type) -> Any:
        value = self._metadata.get(f"fixmin.{name}")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise GGUFError(f"{self._path}: key fixmin.{name} is {'missing' if value is None else 'of the wrong type'}")
        return value

    def array(self, name: str, length: int) -> NDArray[Any]:
        values = self.get(name, np.ndarray)
        if values.shape != (length,):
            raise GGUFError(f"{self._path}: key fixmin.{name} has {values.size} elements, expected {length}")
        return values


def _code(keys: _Keys, file: _core.GgufFile) -> CodeSpec:
    kind = keys.get("code.kind", str)
    if kind == "learned":
        return CodeSpec("learned")
    width = keys.get("code.width", int)
    values = keys.array("code.values", 2)
    lift = {"width": width, "lift": keys.get("code.lift", str), "values": (float(values[0]), float(values[1]))}
    if kind == "affine":
        matrix = keys.array("code.affine_matrix", width * width).reshape(width, width)
        return CodeSpec("affine", matrix=matrix, shift=keys.array("code.affine_shift", width), **lift)
    if kind != "table":
        raise GGUFError(f"key fixmin.code.kind is {kind!a}, expected affine, table or learned")
    vocab_size = keys.get("vocab_size", int)
    tensor = next((t for t in file.tensors if t.name == "token_code.weight"), None)
    if tensor is None or tensor.n_bytes != vocab_size * ((width + 7) // 8):
        raise GGUFError(f"token_code.weight does not hold {vocab_size} rows of {width} bits")
    packed = file.tensor_data("token_code.weight").reshape(vocab_size, -1)
    return CodeSpec("table", table=np.unpackbits(packed, axis=1, bitorder="little")[:, :width], **lift)


def tensor_recipe(path: Path, tensor: _core.GgufTensor, ggml_type: GGMLQuantizationType) -> TensorRecipe:
    """Rows of a stored tensor, dequantised."""
    shape, offset = tuple(tensor.shape), tensor.offset
    # Any element of a vector may be asked for, so it must be stored in a type without blocks.
    try:
        row = row_bytes(shape[-1] if len(shape) > 1 else 1, ggml_type)
    except ValueError as error:
        raise GGUFError(f"{path}: {tensor.name}: {error}") from error

    def read_rows(start: int, stop: int) -> NDArray[np.float32]:
        with open(path, "rb") as data:
            raw = np.frombuffer(os.pread(data.fileno(), (stop - start) * row, offset + start * row), dtype=np.uint8)
        if raw.size != (stop - start) * row:
            raise GGUFError(f"{path}: {tensor.name}: the file ends before offset {offset + stop * row}")
        if ggml_type == GGMLQuantizationType.I8:
            return raw.view(np.int8).astype(np.float32).reshape(stop - start, *shape[1:])
        return quants.dequantize(raw, ggml_type).reshape(stop - start, *shape[1:])

    return TensorRecipe(shape, (tensor.name,), read_rows)


def _check_scaled(path: Path, name: str, metadata: Mapping[str, Any], scale: TensorRecipe) -> None:
    """What the engine refuses too: other rules, and scales that are none."""
    if (version := metadata.get(W8A8_KEY)) != W8A8_VERSION:
        raise GGUFError(f"{path}: {W8A8_KEY} is {'missing' if version is None else version}; this version reads 1")
    values = scale.load()
    wrong = ~((values >= 0) & (values <= np.finfo(np.float32).max / 127))
    if wrong.any():
        row = int(wrong.argmax())
        raise GGUFError(f"{path}: {name}{SCALE_SUFFIX} has {values[row]} for row {row}, which is no scale")


def _scaled(codes: TensorRecipe, scales: TensorRecipe) -> TensorRecipe:
    """Rows of codes times the scales of the rows."""

    def read_rows(start: int, stop: int) -> NDArray[np.float32]:
        return codes.load_rows(start, stop) * scales.load_rows(start, stop)[:, None]

    return TensorRecipe(codes.shape, codes.sources, read_rows)
