"""Another GGUF file of the same model in other number formats (`fixmin quantize`).

Tensors stream from file to file; the bytes come from `ggml_quantize_chunk`. All metadata is kept. The mixed recipes
(q4_k_m, ...) give the tensors that suffer most a larger format, by the rules that llama.cpp documents in
src/llama-quant.cpp (function llama_tensor_get_type, as of 2025); written here anew, only for what these models have.
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ggml  # noqa: F401  # by convert.gguf_file.formats: better missed here than halfway
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType
from numpy.typing import NDArray

from .. import _core
from ..arguments import Prompt, as_bool, as_threads
from ..atomic_file import AtomicFile, refuse_inputs
from ..convert.gguf_file.formats import (
    BF16,
    F16,
    F32,
    I8,
    OUT_TYPES,
    Q8_0,
    W8A8_KEY,
    W8A8_VERSION,
    bits_per_weight,
    shown,
    unfit,
)
from ..convert.gguf_file.readback import read_gguf
from ..convert.gguf_file.writer import Layout, Progress, TensorPlan, Value, check_loads, scale_plan
from ..convert.spec import ModelSpec, TensorRecipe
from ..errors import ArgumentError, ArgumentTypeError, CheckpointError, naming
from ..state import file_sha256
from .imatrix import read_imatrix
from .smooth import (
    EXPONENTS_KEY,
    Factors,
    SmoothReport,
    applied,
    changed,
    read_smooth,
    search,
    smooth_metadata,
    string_value,
)

_T = GGMLQuantizationType

#: Plain types: every matrix gets them. Name -> (ggml type, general.file_type).
PLAIN: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    **{name: (known.ggml, known.file_type) for name, known in OUT_TYPES.items()},
    "q4_1": (_T.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q5_0": (_T.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q5_1": (_T.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q2_k": (_T.Q2_K, LlamaFileType.MOSTLY_Q2_K),
    "q3_k": (_T.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
    "q4_k": (_T.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "q5_k": (_T.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q6_k": (_T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "iq4_nl": (_T.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL),
    "iq4_xs": (_T.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS),
}

#: Mixed recipes: most matrices get this type, see `_recipe_type` for the others.
MIXED: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "q3_k_s": (_T.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
    "q3_k_m": (_T.Q3_K, LlamaFileType.MOSTLY_Q3_K_M),
    "q3_k_l": (_T.Q3_K, LlamaFileType.MOSTLY_Q3_K_L),
    "q4_k_s": (_T.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "q4_k_m": (_T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_s": (_T.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q5_k_m": (_T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
}

TYPES = (*PLAIN, *MIXED)

# What llama.cpp takes where a row does not divide into super-blocks of 256; F16 where it does not into 32 either.
_FALLBACK = {
    _T.Q2_K: _T.IQ4_NL,
    _T.Q3_K: _T.IQ4_NL,
    _T.IQ4_XS: _T.IQ4_NL,
    _T.Q4_K: _T.Q5_0,
    _T.Q5_K: _T.Q5_1,
    _T.Q6_K: _T.Q8_0,
}

_FLOATS = (F32, F16, BF16)
_FOLDED = ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight")
_PREFIX = "fixmin.quantize."


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor of the new file."""

    name: str
    shape: tuple[int, ...]  # NumPy order
    source_type: str
    type: str
    has_importance: bool
    note: str | None  # why the type is not the one asked for


@dataclass(frozen=True)
class QuantizeReport:
    """What a quantisation did. `path` is where the complete file is."""

    path: Path
    type: str
    source_bytes: int
    n_bytes: int
    n_weights: int
    bits_per_weight: float  # of the whole tensor data
    types: dict[str, int]  # ggml type -> number of tensors
    tensors: tuple[QuantizedTensor, ...]
    seconds: float
    smooth: SmoothReport | None = None


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
    progress: Progress | None = None,
) -> QuantizeReport:
    """Writes a GGUF file's model in another number format.

    Streams tensor by tensor: a few chunks of 4 MB are in memory for each thread. The target appears under its name
    only when it is complete. Norms and biases are stored in F32, codes as they are. Layer 0's queries, keys and
    values, which are folded at load and never read again, get Q8_0 or better unless tensor_types says otherwise.
    Rows that do not divide into the blocks of a type get the one that llama.cpp falls back to. A tensor that has its
    type already is copied byte for byte. The certificate in the metadata remains that of the source file;
    fixmin.quantize.* says so and how this file was made.

    Args:
        source: a GGUF file of architecture "fixmin", in F32, F16 or BF16 (see allow_requantize).
        target: the file to write, none of those that are read.
        type: a plain type for every matrix (f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k, q4_k, q5_k, q6_k,
            iq4_nl, iq4_xs, w8a8), or a mixed recipe of llama.cpp (q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s,
            q5_k_m; q6_k is both). Upper case is the same.
        imatrix: an importance matrix (GGUF) of `fixmin imatrix` or llama-imatrix: columns that meet larger inputs
            are stored more exactly.
        tensor_types: regular expression -> plain type for the matrices whose names contain a match; the first that
            matches counts.
        output_tensor_type: plain type of output.weight.
        allow_requantize: also from a quantised source, whose errors then add to the new ones.
        smooth: only with w8a8: a text (str or token ids), or the path (os.PathLike) of one or of an importance matrix,
            with which the model writes a text. Factors, powers of two, move from channels of activations to weights as
            makes the divergence from the source smallest on one half of the text, and stay if they gain 5 per cent on
            the other; in float32 the logits keep their bits. The new file is written some ten times, and logits take
            up to 256 MB beside it.
        n_threads: threads that quantise; None, 0 or -1: the CPUs of this process.
        progress: called with weights done, weights in all, and the tensor being written.

    Returns:
        A QuantizeReport.

    Raises:
        ArgumentError: an unknown type, a bad expression or one that matches nothing, a quantised source, an importance
            matrix of another model. ArgumentTypeError: a wrong type of argument.
        CheckpointError: a weight is not finite or too large for the type, the new file cannot be loaded, or the target
            is being written by another process. GGUFError: the source or the imatrix is malformed. OSError: a file
            cannot be read or written. MemoryError: loading the new file needs more than there is.
    """
    started = time.perf_counter()
    source_path, target_path = _as_path("source", source), _as_path("target", target)
    name = _as_type("type", type, TYPES)
    rules = _as_rules(tensor_types)
    output_type = None if output_tensor_type is None else _as_type("output_tensor_type", output_tensor_type, PLAIN)
    allow_requantize = as_bool("allow_requantize", allow_requantize)
    threads = as_threads(n_threads)
    imatrix_path = None if imatrix is None else _as_path("imatrix", imatrix)
    refuse_inputs(target_path, source_path, imatrix_path, *_paths_of(smooth))
    if smooth is not None and name != "w8a8":
        raise ArgumentError(f"smooth: is for w8a8, whose rows of activations have one scale; the type is {name}")
    smooth_prompt = None if smooth is None else read_smooth(smooth)
    importance = {} if imatrix_path is None else read_imatrix(imatrix_path)

    stored = read_gguf(source_path)
    chooser = Chooser(name, rules, output_type, stored.spec.block_count, stored.spec.code.kind != "learned")
    if smooth is not None and EXPONENTS_KEY in stored.metadata:
        raise ArgumentError(f"smooth: {source_path} has been smoothed already")
    plans = [chooser.plan(key, recipe) for key, recipe in stored.spec.tensors.items()]
    if unused := [pattern.pattern for pattern, _ in rules if pattern not in chooser.used]:
        raise ArgumentError(f"tensor_types: no matrix of this model has a name that matches {unused[0]!r}")
    _check_requantizing(plans, stored.types, allow_requantize, changes=smooth is not None)
    metadata = _metadata(source_path, name, imatrix, tensor_types, output_type)
    metadata.pop(W8A8_KEY, None)
    if any(plan.type == I8 for plan in plans):
        metadata[W8A8_KEY] = Value(W8A8_VERSION, GGUFValueType.UINT32)
    codes = _code_plans(source_path)

    def layout_of(spec: ModelSpec, changed: Set[str]) -> Layout:
        """The tensors of a model that is the source's but for those that are named."""
        found = [chooser.plan(key, recipe) for key, recipe in spec.tensors.items()]
        types = {key: kind for key, kind in stored.types.items() if key not in changed}
        found = [_finish(plan, types.get(plan.name), importance, source_path) for plan in found]
        if importance and not any(plan.importance is not None for plan in found):
            raise ArgumentError(f"{imatrix}: names no tensor of this model that is quantised")
        return Layout([*_with_scales(found, stored.scales), *codes], metadata)

    if smooth_prompt is None:
        layout, smoothed = layout_of(stored.spec, set()), None
    else:
        layout, factors, smoothed = _smoothed(source_path, target_path, stored.spec, smooth_prompt, layout_of, threads)
        name_of_text = Path(smooth).name if isinstance(smooth, os.PathLike) else "a text"
        metadata[f"{_PREFIX}smooth"] = string_value(name_of_text)
        metadata.update(smooth_metadata(stored.spec, factors, smoothed))
    with AtomicFile(target_path) as file:
        try:
            layout.write(file, {}, threads, progress or (lambda done, total, tensor: None))
        except CheckpointError as error:
            raise CheckpointError(f"{source_path}: {error}") from error
        with naming(target_path):
            check_loads(file)
        file.commit()

    tensors = tuple(
        QuantizedTensor(
            name=plan.name,
            shape=tuple(plan.shape),
            source_type=shown(stored.types.get(plan.name, F32)),  # scales of rows may be new
            type=shown(plan.type),
            has_importance=plan.importance is not None,
            note=plan.note,
        )
        for plan in layout.tensors
    )
    return QuantizeReport(
        path=target_path,
        type=name,
        source_bytes=source_path.stat().st_size,
        n_bytes=target_path.stat().st_size,
        n_weights=layout.n_weights,
        bits_per_weight=8 * sum(plan.n_bytes for plan in layout.tensors) / layout.n_weights,
        types=dict(Counter(tensor.type for tensor in tensors)),
        tensors=tensors,
        seconds=time.perf_counter() - started,
        smooth=smoothed,
    )


# --- factors between activations and weights ---------------------------------------------------------------------


def _smoothed(
    source: Path,
    target: Path,
    spec: ModelSpec,
    smooth: Prompt | Path,
    layout_of: Callable[[ModelSpec, Set[str]], Layout],
    threads: int,
) -> tuple[Layout, Factors, SmoothReport]:
    """The layout of the file with the best factors, these, and what they changed."""

    def layout(factors: Factors) -> Layout:
        return layout_of(applied(spec, factors), changed(factors))

    def write(path: Path, factors: Factors) -> None:
        with AtomicFile(path) as file:
            layout(factors).write(file, {}, threads)
            file.commit()

    factors, report = search(source, spec, smooth, write, target.parent, threads)
    return layout(factors), factors, report


def _paths_of(value: Any) -> tuple[Path, ...]:
    return (Path(value),) if isinstance(value, os.PathLike) else ()


# --- which type --------------------------------------------------------------------------------------------------


class Chooser:
    """The type of each tensor, in the order: stated by name, output, recipe, floor of the folded layer, fallback."""

    def __init__(
        self, name: str, rules: list[tuple[re.Pattern[str], str]], output_type: str | None, n_layers: int, folds: bool
    ) -> None:
        self._name, self._rules, self._output_type = name, rules, output_type
        self._n_layers, self._folds = n_layers, folds
        self.used: set[re.Pattern[str]] = set()

    def plan(self, name: str, recipe: TensorRecipe) -> TensorPlan:
        if len(recipe.shape) == 1:
            return TensorPlan(name, recipe.shape, F32, recipe)
        wanted, note = self._wanted(name)
        fitting = _fitting(wanted, recipe.shape[-1])
        if fitting != wanted:
            note = f"{wanted.name}: {unfit(wanted, recipe.shape[-1])}"
        return TensorPlan(name, recipe.shape, fitting, recipe, note)

    def _wanted(self, name: str) -> tuple[GGMLQuantizationType, str | None]:
        for pattern, stated in self._rules:
            if pattern.search(name):
                self.used.add(pattern)
                return PLAIN[stated][0], f"stated for {pattern.pattern!r}"
        if name == "output.weight" and self._output_type is not None:
            return PLAIN[self._output_type][0], "stated for the output"
        if self._name in PLAIN:
            wanted, note = PLAIN[self._name][0], None
        else:
            wanted = _recipe_type(self._name, name, self._n_layers)
            note = None if wanted == MIXED[self._name][0] else f"recipe {self._name}"
        if name == "token_embd.weight" and wanted == I8:
            return Q8_0, "rows of an embedding are not multiplied"
        if self._folds and name in _FOLDED and bits_per_weight(wanted) < bits_per_weight(Q8_0):
            return Q8_0, "layer 0 is folded at load"
        return wanted, note


def _recipe_type(recipe: str, name: str, n_layers: int) -> GGMLQuantizationType:
    """What a mixed recipe gives the matrix `name` of a model with so many layers."""
    default = MIXED[recipe][0]
    if name == "output.weight":
        return _T.Q6_K
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if not found:
        return default
    layer, part = int(found[1]), found[2]
    eighth = n_layers // 8
    # The first and the last eighth of the layers and every third one between them.
    more = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
    rules: dict[tuple[str, str], GGMLQuantizationType] = {
        ("q3_k_m", "attn_v"): _T.Q5_K if layer < 2 else _T.Q4_K,
        ("q3_k_m", "ffn_down"): _T.Q5_K if layer < n_layers // 16 else _T.Q4_K,
        ("q3_k_m", "attn_output"): _T.Q4_K,
        ("q3_k_l", "attn_v"): _T.Q5_K,
        ("q3_k_l", "ffn_down"): _T.Q5_K,
        ("q3_k_l", "attn_output"): _T.Q5_K,
        ("q4_k_s", "attn_v"): _T.Q5_K if layer < 4 else _T.Q4_K,
        ("q4_k_s", "ffn_down"): _T.Q5_K if layer < eighth else _T.Q4_K,
        ("q4_k_m", "attn_v"): _T.Q6_K if more else _T.Q4_K,
        ("q4_k_m", "ffn_down"): _T.Q6_K if more else _T.Q4_K,
        ("q5_k_m", "attn_v"): _T.Q6_K if more else _T.Q5_K,
        ("q5_k_m", "ffn_down"): _T.Q6_K if more else _T.Q5_K,
    }
    return rules.get((recipe, part), default)


def _fitting(wanted: GGMLQuantizationType, row: int) -> GGMLQuantizationType:
    """The type itself, or what replaces it for rows that do not divide into its blocks."""
    if unfit(wanted, row):
        wanted = _FALLBACK.get(wanted, F16)
    return F16 if unfit(wanted, row) else wanted


def _check_requantizing(
    plans: list[TensorPlan], types: Mapping[str, GGMLQuantizationType], allowed: bool, changes: bool
) -> None:
    """changes: a matrix may get other values, so that one of the same type is not a copy."""
    for plan in plans:
        have = types[plan.name]
        if len(plan.shape) > 1 and have not in _FLOATS and (changes or have != plan.type) and not allowed:
            raise ArgumentError(
                f"{plan.name} is already quantised ({shown(have)}): its errors would add to those of "
                f"{shown(plan.type)}. "
                "Start from an F32, F16 or BF16 file, or allow it (--allow-requantize)"
            )


# --- what is written ---------------------------------------------------------------------------------------------


def _finish(
    plan: TensorPlan, have: GGMLQuantizationType | None, importance: Mapping[str, NDArray[np.float32]], source: Path
) -> TensorPlan:
    """The plan with how to read its rows, and with its importance. `have`: the stored type; None: other values."""
    if len(plan.shape) == 1:
        return plan
    if plan.type == have:
        return TensorPlan(plan.name, plan.shape, have, stored_rows(source, plan.name), plan.note, is_stored=True)
    values = None if plan.type in (*_FLOATS, I8) else importance.get(plan.name)
    if values is not None and values.shape != (plan.shape[-1],):
        raise ArgumentError(
            f"the importance matrix has {values.size} columns for {plan.name}, whose rows have {plan.shape[-1]}: "
            "it was made for another model"
        )
    return TensorPlan(plan.name, plan.shape, plan.type, plan.recipe, plan.note, importance=values)


def _with_scales(plans: list[TensorPlan], scales: Mapping[str, TensorRecipe]) -> Iterator[TensorPlan]:
    """Behind each W8A8 matrix its scales; of one that is copied those of the source."""
    for plan in plans:
        yield plan
        if plan.type == I8:
            yield scale_plan(plan, scales[plan.name] if plan.is_stored else None)


def stored_rows(path: Path, name: str) -> TensorRecipe:
    """The rows of a tensor as bytes, read with plain reads: mapped pages would count as resident memory."""
    tensor = next(t for t in _core.GgufFile(str(path)).tensors if t.name == name)
    shape, offset = tuple(tensor.shape), tensor.offset
    row = tensor.n_bytes // shape[0]

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        with open(path, "rb") as data:
            raw = os.pread(data.fileno(), (stop - start) * row, offset + start * row)
        if len(raw) != (stop - start) * row:
            raise OSError(f"{path}: the file ends within the tensor {name}")
        return np.frombuffer(raw, dtype=np.uint8).reshape(stop - start, row)

    return TensorRecipe(shape, (name,), read_rows)


def _code_plans(path: Path) -> list[TensorPlan]:
    """The table of codes, if there is one: not a matrix of weights."""
    names = [t.name for t in _core.GgufFile(str(path)).tensors if t.name == "token_code.weight"]
    recipes = [stored_rows(path, name) for name in names]
    return [TensorPlan(r.sources[0], r.shape, GGMLQuantizationType.I8, r, is_stored=True) for r in recipes]


def _metadata(
    path: Path,
    name: str,
    imatrix: str | os.PathLike[str] | None,
    tensor_types: Mapping[str, str] | None,
    output_type: str | None,
) -> dict[str, Value]:
    """All keys of the source with their types, and what has changed."""
    kept = {}
    file = _core.GgufFile(str(path))
    types = file.metadata_types
    for key, value in file.metadata.items():
        if key.startswith(_PREFIX) or key in ("general.architecture", "general.alignment"):
            continue
        kind, element = types[key]
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        kept[key] = Value(plain, GGUFValueType(kind), None if element is None else GGUFValueType(element))
    file_type = (PLAIN | MIXED)[name][1]
    kept["general.file_type"] = Value(int(file_type), GGUFValueType.UINT32)
    kept["general.quantization_version"] = Value(2, GGUFValueType.UINT32)
    texts = {
        "tool": f"fixmin-cpp {_core.__version__}",
        "source": path.name,
        "source_sha256": file_sha256(path),
        "type": name,
        "tensor_types": json.dumps(dict(tensor_types or {})),
        "output_tensor_type": output_type or "",
        "imatrix": Path(imatrix).name if imatrix is not None else "",
        "certificate": "fixmin.convert.certificate is that of the source; nobody has made one for this file",
    }
    for key, text in texts.items():
        kept[_PREFIX + key] = Value(text.encode("utf-8", "backslashreplace"), GGUFValueType.STRING)
    return kept


# --- arguments ---------------------------------------------------------------------------------------------------


def _as_path(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ArgumentTypeError(f"{name} must be a str or a path, got {value!r}")
    return Path(value)


def _as_type(name: str, value: Any, known: Any) -> str:
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{name} must be a str, got {value!r}")
    if value.lower() not in known:
        raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value.lower()


def _as_rules(tensor_types: Any) -> list[tuple[re.Pattern[str], str]]:
    if tensor_types is None:
        return []
    if not isinstance(tensor_types, Mapping):
        raise ArgumentTypeError(f"tensor_types must be a dict of expression -> type, got {tensor_types!r}")
    rules = []
    for expression, wanted in tensor_types.items():
        try:
            pattern = re.compile(expression)
        except (re.error, TypeError) as error:
            raise ArgumentError(f"tensor_types: {expression!r} is not a regular expression: {error}") from None
        rules.append((pattern, _as_type(f"tensor_types[{expression!r}]", wanted, PLAIN)))
    return rules
