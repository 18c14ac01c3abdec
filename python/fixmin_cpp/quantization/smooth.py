"""Factors between the channels of activations and the columns of weights (`fixmin quantize ... w8a8 --smooth`).

W8A8 has one scale for a whole row of activations, so a channel that is much larger than the others leaves them few of
the 127 steps. Where a norm or a linear map stands in front of a product, a factor can be moved from that channel to the
weights that read it: the map is divided, the columns are multiplied, and the model is the same (SmoothQuant, Xiao et
al. 2023, arXiv:2211.10438). Here factors are powers of two: dividing and multiplying by them rounds nothing, so that in
float32 even the logits keep their bits.
"""

import dataclasses
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from .. import _core
from ..arguments import Prompt
from ..convert.gguf_file.writer import Value
from ..convert.spec import ModelSpec, TensorRecipe
from ..errors import ArgumentError, GGUFError
from ..evaluate import Divergence, perplexity
from ..model import Model
from .imatrix import read_imatrix

#: How much of the imbalance goes to the weights; what is best differs from model to model, and is measured.
ALPHAS = (0.25, 0.5, 0.75)
#: Logits that measurements keep on the disk: values, 4 bytes each.
_MOST_LOGITS = 1 << 26
#: With fewer tokens, chance decides.
_FEWEST_TOKENS = 128
#: What divergence may be left for factors to be worth it: less than this is chance.
_LEAST_GAIN = 0.95
_LARGEST_EXPONENT = 30
#: Of a smoothed file: `packed`, and the report as JSON.
EXPONENTS_KEY = "fixmin.smooth.exponents"
REPORT_KEY = "fixmin.smooth.report"

F32 = NDArray[np.float32]
#: Of each group powers of two, one for each channel.
Factors = Sequence[tuple["Group", F32]]


@dataclass(frozen=True)
class Group:
    """Matrices that read the same channels, and what makes these. Names are those of GGUF tensors.

    `divided`: vectors and rows of matrices, one for each channel; `multiplied`: matrices with the channels as columns.
    A channel of `divided` is read as `heads_per_kv_head` columns where query heads share a value head.
    """

    kind: str
    divided: tuple[str, ...]
    multiplied: tuple[str, ...]
    head_dim: int = 0
    heads_per_kv_head: int = 1

    def columns(self, channels: F32) -> F32:
        """What the columns of `multiplied` meet, of a value for each channel."""
        if self.heads_per_kv_head == 1:
            return channels
        return np.repeat(channels.reshape(-1, self.head_dim), self.heads_per_kv_head, axis=0).reshape(-1)

    def channels(self, columns: F32) -> F32:
        """The largest value of the columns of each channel."""
        if self.heads_per_kv_head == 1:
            return columns
        heads = columns.reshape(-1, self.heads_per_kv_head, self.head_dim)
        return np.ascontiguousarray(heads.max(axis=1)).reshape(-1)


@dataclass(frozen=True)
class SmoothReport:
    """What was chosen and what it changed: KL(source || quantised), nats per token, on text it was not chosen by."""

    n_tokens: int  # that were predicted and compared
    alpha: float | None  # None: no factors, as the best gained too little
    kinds: tuple[str, ...]  # of the groups that got factors
    n_channels: int  # whose factor is not 1
    kl_before: float
    kl_after: float
    kl_best: float  # with the best factors, also if they were left out
    top1_before: float  # share of tokens whose most probable successor is the source's
    top1_after: float

    def summary(self) -> str:
        if self.alpha is None:
            return (
                f"Smoothing: none, as the best factors changed KL from {self.kl_before:.2e} to {self.kl_best:.2e} "
                f"on {self.n_tokens} tokens: less than {100 * (1 - _LEAST_GAIN):.0f} % may be chance."
            )
        return (
            f"Smoothing: {self.n_channels} channels of {', '.join(self.kinds)}, alpha {self.alpha}: "
            f"KL {self.kl_before:.2e} -> {self.kl_after:.2e}, top-1 {self.top1_before:.4f} -> {self.top1_after:.4f} "
            f"on {self.n_tokens} tokens that it was not chosen by."
        )


def smooth_by(path: Path) -> str | Path:
    """What `--smooth` is given, "-" for a text from stdin. ArgumentError: that is not UTF-8."""
    if str(path) != "-":
        return path
    return _decoded(sys.stdin.buffer.read() if sys.stdin else b"", "stdin")


def read_smooth(smooth: Prompt | os.PathLike[str]) -> Prompt | Path:
    """A text, or the path of an importance matrix, of either or of the path of a text.

    Raises ArgumentError for a file that is neither, or where the name of a file stands for a text. OSError.
    """
    if not isinstance(smooth, os.PathLike):
        if isinstance(smooth, str) and os.path.isfile(smooth):
            raise ArgumentError(f"smooth: {smooth!a} is the name of a file; give a Path, or the text itself")
        return smooth
    path = Path(smooth)
    data = path.read_bytes()
    return path if data[:4] == b"GGUF" else _decoded(data, str(path))


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{name}: is neither UTF-8 text ({error}) nor an importance matrix") from None


def groups(spec: ModelSpec) -> list[Group]:
    """Where factors can be absorbed exactly. The norm and q, k, v of layer 0 are folded and multiplied with nothing."""

    def there(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in spec.tensors)

    found = []
    for layer in range(spec.block_count):
        p = f"blk.{layer}."
        if layer > 0 or spec.code.kind == "learned":
            qkv = there(*(f"{p}attn_{part}.weight" for part in "qkv"))
            found.append(Group("qkv", there(f"{p}attn_norm.weight", f"{p}attn_norm.bias"), qkv))
        shared = spec.head_count // spec.head_count_kv
        head_dim = spec.tensors[f"{p}attn_v.weight"].shape[0] // spec.head_count_kv
        value = there(f"{p}attn_v.weight", f"{p}attn_v.bias")
        found.append(Group("attn_output", value, (f"{p}attn_output.weight",), head_dim, shared))
        reads = there(f"{p}ffn_gate.weight", f"{p}ffn_up.weight")
        found.append(Group("gate_up", there(f"{p}ffn_norm.weight", f"{p}ffn_norm.bias"), reads))
        if f"{p}ffn_gate.weight" in spec.tensors:  # act(gate) * up is linear in up
            found.append(Group("down", there(f"{p}ffn_up.weight", f"{p}ffn_up.bias"), (f"{p}ffn_down.weight",)))
    if "output.weight" in spec.tensors:
        found.append(Group("output", there("output_norm.weight", "output_norm.bias"), ("output.weight",)))
    return found


class Smoother:
    """Factors of a model's groups, from its weights and the mean squares of what they meet."""

    def __init__(self, spec: ModelSpec, squares: Mapping[str, F32]) -> None:
        self._spec = spec
        self._imbalances: list[tuple[Group, F32, F32]] = []  # group, log2 of channels, log2 of the largest weights
        for group in groups(spec):
            mean_squares = next((squares[name] for name in group.multiplied if name in squares), None)
            if mean_squares is None:
                continue
            columns = np.max([_largest(spec.tensors[name]) for name in group.multiplied], axis=0)
            if mean_squares.shape != columns.shape:
                raise ArgumentError(
                    f"the importance matrix has {mean_squares.size} columns for {group.multiplied[0]}, whose rows have "
                    f"{columns.size}: it was made for another model"
                )
            with np.errstate(divide="ignore"):
                activations = np.log2(group.channels(np.sqrt(mean_squares)))
                self._imbalances.append((group, activations, np.log2(group.channels(columns))))
        if not any(np.isfinite(activations).any() for _, activations, _ in self._imbalances):
            raise ArgumentError("the importance matrix has no inputs of any matrix that could be smoothed")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group.kind for group, _, _ in self._imbalances))

    def factors(self, alpha: float, kinds: Sequence[str]) -> list[tuple[Group, F32]]:
        """Of each group of these kinds the powers of two, float32 [channels]; 1 for channels that are always zero."""
        found = []
        for group, activations, weights in self._imbalances:
            if group.kind not in kinds:
                continue
            known = np.isfinite(activations) & np.isfinite(weights)
            exponents = np.zeros_like(activations)
            exponents[known] = alpha * activations[known] - (1 - alpha) * weights[known]
            if known.any():
                exponents[known] -= np.median(exponents[known])
            exponents = np.clip(np.rint(exponents), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
            found.append((group, np.exp2(exponents).astype(np.float32)))
        return found


def applied(spec: ModelSpec, factors: Factors) -> ModelSpec:
    """The same model with factors moved; `changed` names the tensors."""
    tensors = dict(spec.tensors)
    for group, values in factors:
        for name in group.divided:
            tensors[name] = _divided(tensors[name], values)
        for name in group.multiplied:
            tensors[name] = _multiplied(tensors[name], group.columns(values))
    return dataclasses.replace(spec, tensors=tensors)


def packed(spec: ModelSpec, factors: Factors) -> NDArray[np.int8]:
    """The exponents of all groups of a model one after the other, zeros for those without factors."""
    found = {group: np.log2(values).astype(np.int8) for group, values in factors}
    return np.concatenate([found.get(group, np.zeros(_n_channels(spec, group), np.int8)) for group in groups(spec)])


def remembered(metadata: Mapping[str, Any], spec: ModelSpec) -> ModelSpec:
    """The model that a file holds, given what it was made from: with the factors that its metadata has.

    Raises GGUFError if they are not those of such a model.
    """
    if (exponents := metadata.get(EXPONENTS_KEY)) is None:
        return spec
    exponents = np.asarray(exponents)
    sizes = [_n_channels(spec, group) for group in groups(spec)]
    if (
        exponents.dtype != np.int8
        or exponents.shape != (sum(sizes),)
        or np.abs(exponents.astype(int)).max() > _LARGEST_EXPONENT
    ):
        raise GGUFError(f"{EXPONENTS_KEY} must be {sum(sizes)} INT8 from -{_LARGEST_EXPONENT} to {_LARGEST_EXPONENT}")
    parts = np.split(np.exp2(exponents.astype(np.float32)), np.cumsum(sizes)[:-1])
    return applied(spec, list(zip(groups(spec), parts, strict=True)))


def smooth_metadata(spec: ModelSpec, factors: Factors, report: SmoothReport) -> dict[str, Value]:
    """What a file says of its smoothing: factors, without which nobody could compare it with a checkpoint, if it has
    any."""
    found = {REPORT_KEY: string_value(json.dumps(dataclasses.asdict(report)))}
    if report.alpha is not None:
        exponents = packed(spec, factors).tolist()
        found[EXPONENTS_KEY] = Value(exponents, GGUFValueType.ARRAY, GGUFValueType.INT8)
    return found


def string_value(text: str) -> Value:
    return Value(text.encode("utf-8", "backslashreplace"), GGUFValueType.STRING)


def _n_channels(spec: ModelSpec, group: Group) -> int:
    return spec.tensors[group.divided[0]].shape[0]


def changed(factors: Factors) -> set[str]:
    """Names of the tensors that are not those of the source."""
    return {name for group, _ in factors for name in (*group.divided, *group.multiplied)}


def _largest(recipe: TensorRecipe) -> F32:
    """The largest magnitude of each column; a few rows are in memory at a time."""
    step = max(1, (1 << 22) // recipe.shape[1])
    parts = [
        np.abs(recipe.load_rows(i, min(i + step, recipe.shape[0]))).max(0) for i in range(0, recipe.shape[0], step)
    ]
    largest: F32 = np.max(parts, axis=0)
    return largest


def _divided(recipe: TensorRecipe, factors: F32) -> TensorRecipe:
    def read_rows(start: int, stop: int) -> F32:
        by = factors[start:stop]
        return recipe.load_rows(start, stop) / (by if len(recipe.shape) == 1 else by[:, None])

    return dataclasses.replace(recipe, read_rows=read_rows)


def _multiplied(recipe: TensorRecipe, factors: F32) -> TensorRecipe:
    return dataclasses.replace(recipe, read_rows=lambda start, stop: recipe.load_rows(start, stop) * factors)


def mean_squares(model: Model, ids: NDArray[np.uint32]) -> dict[str, F32]:
    """Matrix -> mean squares of what its columns meet, float32 [n], over ids [T] in chunks of 512 at most."""
    size = min(512, model.info["n_ctx"])
    with model.native() as engine:
        squares = _core.InputSquares(engine)
        for begin in range(0, len(ids), size):
            if len(chunk := ids[begin : begin + size]) > 1:
                squares.add(engine, chunk)
        return {name: (sums / count).astype(np.float32) for name, (sums, count) in squares.sums.items() if count}


def own_text(source: Path, n_threads: int) -> NDArray[np.uint32]:
    """What the model itself writes, ids [T]: a text where there is none. The same at every call."""
    n_texts, length = 8, 128
    with Model(source, n_threads=n_threads, device="cpu") as model:
        starts = np.random.default_rng(0).integers(0, model.info["vocab_size"], (n_texts, 1), dtype=np.uint32)
        room = min(length, model.info["n_ctx"] - 1)
        texts = model.generate([list(map(int, s)) for s in starts], max_new_tokens=room, temperature=1.0, seed=0)
    parts = [np.array([*start, *text.token_ids], dtype=np.uint32) for start, text in zip(starts, texts, strict=True)]
    return np.concatenate(parts)


def search(
    source: Path,
    spec: ModelSpec,
    smooth: Prompt | Path,
    write: Callable[[Path, Factors], None],
    folder: Path,
    n_threads: int,
) -> tuple[Factors, SmoothReport]:
    """The factors that make the quantised model's divergence from the source smallest.

    Args:
        source: the model as a file of floats.
        spec: the same.
        smooth: a text that both read, of whose first tokens, as many as 256 MB of logits hold, one half chooses factors
            and the other one says what they gain; or the path of an importance matrix, with which it is a text that the
            model writes.
        write: makes the quantised file at a path with such factors.
        folder: where a file of the new size and the logits have room.

    Raises ArgumentError for a text of fewer than 128 tokens, OSError where there is no room.
    """
    text: Prompt
    if isinstance(smooth, Path):
        squares = read_imatrix(smooth)
        text = own_text(source, n_threads)
    else:
        text, squares = smooth, None
    load: dict[str, Any] = {"kv_type": "f32", "n_threads": n_threads, "device": "cpu"}
    with ExitStack() as stack:
        with Model(source, **load) as model:
            ids = np.asarray(model.token_ids(text), np.uint32)
            if len(ids) < _FEWEST_TOKENS:
                raise ArgumentError(f"smooth: the text must have at least {_FEWEST_TOKENS} tokens, got {len(ids)}")
            n = min(len(ids), max(_FEWEST_TOKENS, _MOST_LOGITS // spec.vocab_size))
            chooses, tells = ids[: n // 2], ids[n // 2 : n]
            if squares is None:
                squares = mean_squares(model, np.concatenate([chooses, ids[n:]]))
            smoother = Smoother(spec, squares)
            _require_space(folder, 4 * n * spec.vocab_size + source.stat().st_size)
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".smooth-")))
            windows = {"ctx": min(512, model.info["n_ctx"], len(chooses))}
            logits = [temporary / "chooses", temporary / "tells"]
            for half, saved in zip((chooses, tells), logits, strict=True):
                perplexity(model, half, save_logits=saved, **windows)

        def measure(factors: Factors, half: NDArray[np.uint32], base_logits: Path) -> tuple[Divergence, int]:
            trial = temporary / "trial.gguf"
            trial.unlink(missing_ok=True)
            write(trial, factors)
            with Model(trial, **load) as model:
                found = perplexity(model, half, base_logits=base_logits, **windows)
            assert found.divergence is not None
            return found.divergence, found.n_scored

        def choose(alpha: float, kinds: Sequence[str]) -> float:
            return measure(smoother.factors(alpha, kinds), chooses, logits[0])[0].kl_mean

        kinds = smoother.kinds
        least, alpha = min((choose(alpha, kinds), alpha) for alpha in ALPHAS)
        for kind in smoother.kinds:  # which may be better left alone
            fewer = tuple(other for other in kinds if other != kind)
            if fewer and (kl := choose(alpha, fewer)) < least:
                least, kinds = kl, fewer
        before, n_tokens = measure([], tells, logits[1])
        best, _ = measure(smoother.factors(alpha, kinds), tells, logits[1])
    gains = best.kl_mean < _LEAST_GAIN * before.kl_mean
    kinds, after = (kinds, best) if gains else ((), before)
    factors = smoother.factors(alpha, kinds)
    report = SmoothReport(
        n_tokens=n_tokens,
        alpha=alpha if gains else None,
        kinds=kinds,
        n_channels=sum(int((values != 1).sum()) for _, values in factors),
        kl_before=before.kl_mean,
        kl_after=after.kl_mean,
        kl_best=best.kl_mean,
        top1_before=before.top1,
        top1_after=after.top1,
    )
    return factors, report


def _require_space(folder: Path, n_bytes: int) -> None:
    if (free := shutil.disk_usage(folder).free) < n_bytes:
        text = f"smoothing needs {n_bytes / 1e6:,.0f} MB for a while, of which {free / 1e6:,.0f} MB are free"
        raise OSError(errno.ENOSPC, text, str(folder))
