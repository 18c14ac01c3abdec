"""Read the conventions of attention off the inputs and outputs of the projections around it.

For every block there are the outputs of the projections that make q, k and v, laid side by side, and what attention
makes of them. The first token sees only itself, so its result is its values: that finds v. The second weighs two
values, all elements of a head alike: that finds the heads. Which of the rest is q and which is k, the rotation and the
scale are then tried, likely combinations first.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import CheckpointError
from .fitting import minimum, nice, rounded

# Largest difference, relative to the largest element, that counts as the same function.
TOLERANCE = 2e-4
USUAL_BASES = (10000.0, 500000.0, 1000000.0, 100000.0, 1000.0, 500.0, 100.0, 5000000.0, 10000000.0)


@dataclass
class Heads:
    """Where q, k and v lie among the outputs of a block's input projections, laid side by side.

    q [H, d], k and v [G, d] are output numbers; query head h reads key/value head h // (H/G). `columns` reorders the
    input of the output projection accordingly (None: as it is).
    """

    q: NDArray[np.int64]
    k: NDArray[np.int64]
    v: NDArray[np.int64]
    columns: NDArray[np.int64] | None


@dataclass
class Hints:
    """What the code and the configuration say; each is tried before the usual values, and believed only if it fits."""

    head_count: int | None = None
    bases: list[float] = field(default_factory=list)  # of the rotation
    rope_dims: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)  # that the code multiplies or divides by
    frequencies: dict[str, Tensor] = field(default_factory=dict)  # tensors that may be base^(-2i/dimension)


@dataclass
class Attention:
    """The conventions of attention. Errors are relative to the largest element of its result."""

    heads: Heads
    style: str  # of the rotation, "half" or "interleaved"
    dim: int
    base: float
    scale: float
    error: float  # the largest over all blocks
    factors: list[float] = field(default_factory=list)  # per block, on q: blocks may have scales of their own
    sources: dict[str, str] = field(default_factory=dict)  # convention -> where its value came from


def rotate(x: Tensor, style: str, dim: int, bases: Tensor) -> Tensor:
    """x [P, T, heads, d] -> [bases, P, T, heads, d], the first `dim` elements of every head rotated by position."""
    theta = bases[:, None] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / max(dim, 1))  # [bases, dim/2]
    positions = torch.arange(x.shape[-3], dtype=torch.float64)
    angle = positions[:, None, None] * theta[:, None, None, None]  # [bases, 1, T, 1, dim/2]
    a, b = (x[..., : dim // 2], x[..., dim // 2 : dim]) if style == "half" else (x[..., :dim:2], x[..., 1:dim:2])
    a, b = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    turned = torch.cat((a, b), -1) if style == "half" else torch.stack((a, b), -1).flatten(-2)
    return torch.cat((turned, x[..., dim:].expand(*turned.shape[:-1], -1)), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention: q [..., T, H, d], k and v [..., T, G, d] -> [..., T, H, d]."""
    group = q.shape[-2] // k.shape[-2]
    k, v = k.repeat_interleave(group, -2), v.repeat_interleave(group, -2)
    scores = torch.einsum("...ihd,...jhd->...hij", q, k) * scale
    later = torch.ones(q.shape[-3], q.shape[-3], dtype=torch.bool).triu(1)
    return torch.einsum("...hij,...jhd->...ihd", scores.masked_fill(later, -math.inf).softmax(-1), v)


class AttentionReader:
    """Finds the attention that turns projections y into results z, per block float64 [P, T, N] and [P, T, H·d].

    P prompts of T tokens. `remark` adds to the message of a refusal.
    """

    def __init__(
        self, y: Sequence[Tensor], z: Sequence[Tensor], width: int, hints: Hints, remark: Callable[[], str]
    ) -> None:
        self.y, self.z, self.width, self.hints, self.remark = y, z, width, hints, remark
        sequences = ((name, _geometric(t, 1e-5)) for name, t in hints.frequencies.items())
        # (base, dimension) of stored frequencies
        self.stored = list(dict.fromkeys((nice(r ** (-hints.frequencies[n].numel())), 2 * hints.frequencies[n].numel())
                                         for n, r in sequences if r))  # fmt: skip

    def find(self) -> Attention:
        """Read block 0, then check all blocks. CheckpointError naming the first block that nothing reproduces."""
        y, z = self.y[0], self.z[0]
        values = self.value_outputs(y, z)
        layouts: list[Heads] = []
        for elements in self.head_elements(y, z, values):
            if elements.size != self.width:
                raise CheckpointError(
                    f"block 0: {elements.shape[0]} heads of size {elements.shape[1]} make {elements.size}, not the "
                    f"embedding length {self.width}; the file format has no head size of its own"
                )
            layouts += self.head_layouts(elements, values, y.shape[-1])
        closest = math.inf
        for stage in (self.fit_likely, self.fit_rearranged, self.fit_any_base):
            for layout in layouts:
                found = stage(layout)
                closest = min(closest, found.error)
                if found.error <= TOLERANCE:
                    return self.check_blocks(found)
        raise CheckpointError(
            "block 0: attention: no combination of heads, order of q, k, v, rotary style, dimension, base and scale "
            "reproduces it (no rotary positions, ALiBi, scaled positions, normed or capped scores, a window?); "
            f"smallest relative difference {closest:.2g}{self.remark()}{self.rounded_frequencies()}"
        )

    def check_blocks(self, found: Attention) -> Attention:
        """Hold all blocks against what was found for block 0."""
        d = found.heads.q.shape[1]
        for i in range(len(self.y)):
            found.factors.append(1.0)
            error = self.error(found, i)
            for scale in self.scales(d) if error > TOLERANCE else ():
                other = self.error(replace(found, scale=scale), i)
                if other < error:
                    error, found.factors[i] = other, scale / found.scale
            if error > TOLERANCE:
                raise CheckpointError(
                    f"block {i}: attention: differs from block 0 (rope {found.style}, dimension {found.dim}, base "
                    f"{found.base:g}, scale {found.scale:g}); relative difference {error:.2g}{self.remark()}"
                )
            found.error = max(found.error, error)
        return found

    def value_outputs(self, y: Tensor, z: Tensor) -> NDArray[np.int64]:
        """For every element of attention's result the output that is its value: the first token sees only itself."""
        got, wanted = y[:, 0], z[:, 0]  # [P, N], [P, M]
        distance = torch.zeros(wanted.shape[1], got.shape[1], dtype=torch.float64)
        for a, b in zip(wanted, got, strict=True):
            torch.maximum(distance, (a[:, None] - b[None, :]).abs(), out=distance)
        nearest = distance.min(1)
        error = float(nearest.values.max() / wanted.abs().max().clamp_min(1e-30))
        if error > TOLERANCE:
            raise CheckpointError(
                "block 0: attention: the first token's result is not its own value (no causal mask, or values are "
                f"changed on the way); relative difference {error:.2g}{self.remark()}"
            )
        return nearest.indices.numpy()

    def head_elements(self, y: Tensor, z: Tensor, values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Ways to cut attention's result into heads so that the second token weighs all values of a head alike: numbers
        of elements [H, d], with the declared number of heads first, then the fewest heads."""
        size = z.shape[-1]
        step, moved = y[:, 1, values] - y[:, 0, values], z[:, 1] - y[:, 0, values]
        limit = TOLERANCE * float(z.abs().max())
        counts = [n for n in range(1, size // 2 + 1) if size % n == 0 and size // n % 2 == 0]
        counts.sort(key=lambda n: (n != self.hints.head_count, n))
        found = []
        for strided, count in itertools.product((False, True), counts):
            elements = np.arange(size).reshape(-1, count).T if strided else np.arange(size).reshape(count, -1)
            a, b = step[:, elements], moved[:, elements]
            weight = (a * b).sum(-1, keepdim=True) / a.square().sum(-1, keepdim=True).clamp_min(1e-30)
            if float((b - weight * a).abs().max()) <= limit:
                found.append(elements)
            if len(found) == 2:  # finer cuts of the same heads fit too
                break
        return found

    def head_layouts(self, elements: NDArray[np.int64], values: NDArray[np.int64], outputs: int) -> Iterable[Heads]:
        """Ways to find q and k among the outputs that are not v. elements [H, d] of attention's result; values [H·d]
        the output that each of them is the value of."""
        count, d = elements.shape
        values = values[elements]
        group_of: dict[tuple[int, ...], int] = {}
        groups = np.array([group_of.setdefault(tuple(row), len(group_of)) for row in values])
        order = np.argsort(groups, kind="stable")
        kv = np.array(list(group_of), dtype=np.int64)  # [G, d]
        if len(np.unique(kv)) != kv.size or count % len(kv) or (np.bincount(groups) != count // len(kv)).any():
            return
        if outputs != count * d + 2 * kv.size:
            raise CheckpointError(
                f"block 0: attention: {outputs} outputs of the input projections are not {count} query heads and "
                f"2 x {len(kv)} key and value heads of size {d}"
            )
        columns = elements[order].reshape(-1)
        reordered = None if (columns == np.arange(count * d)).all() else columns
        free = np.ones(outputs, dtype=bool)
        free[kv] = False
        seen: set[bytes] = set()
        # k beyond q, the usual order, first
        for first in np.flatnonzero(free)[::-1]:
            k = kv + (first - kv[0, 0])
            if k.min() < 0 or k.max() >= outputs or not free[k].all():
                continue
            rest = free.copy()
            rest[k] = False
            ascending = np.flatnonzero(rest).reshape(count, d)
            options = [ascending]
            if len(kv) == count:  # q laid out like v
                options.insert(0, values + (ascending.min() - values.min()))
            for q in options:
                fits = q.min() >= 0 and q.max() < outputs and rest[q].all() and len(np.unique(q)) == q.size
                # Nobody cuts q into more pieces than v.
                fits = fits and _runs(q) <= _runs(kv)
                key = q.tobytes() + k.tobytes()
                if fits and key not in seen:
                    seen.add(key)
                    yield Heads(q[order], k, kv, reordered)

    def fit_likely(self, heads: Heads) -> Attention:
        """The best combination of what the code says and of usual values."""
        d = heads.q.shape[1]
        bases = torch.tensor(self.bases(), dtype=torch.float64)
        best = (math.inf, "half", d, 10000.0, d**-0.5)
        for dim, scale, style in itertools.product(self.likely_dims(d), self.scales(d), ("half", "interleaved")):
            errors = self.errors(heads, style, dim, bases, scale, few=True)
            least = int(errors.argmin())
            best = min(best, (float(errors[least]), style, dim, float(bases[least]), scale))
            if best[0] <= TOLERANCE / 20:
                break
        return self._fitted(heads, *best[1:], "declared or usual; reproduces attention")

    def fit_rearranged(self, heads: Heads) -> Attention:
        """The same with the elements of every head in another order: the last ones rotated instead of the first, or
        all rotated the other way round, which is the same as exchanging the two elements of a pair. Scores do not
        change if q and k are reordered alike."""
        d = heads.q.shape[1]
        n = np.arange(d)
        orders = [np.roll(n, dim) for dim in self.likely_dims(d) if dim < d]
        for dim in self.likely_dims(d):
            orders.append(np.concatenate([np.roll(n[:dim], dim // 2), n[dim:]]))
            orders.append(np.concatenate([n[:dim] ^ 1, n[dim:]]))
        fits = (self.fit_likely(replace(heads, q=heads.q[:, o], k=heads.k[:, o])) for o in orders)
        best = min(fits, key=lambda fit: fit.error)
        best.sources["rope_dim"] = "attention of block 0, rows of q and k reordered within each head"
        return best

    def fit_any_base(self, heads: Heads) -> Attention:
        """Any rotary base and dimension. A grid of 0.5 in log base meets every basin: the largest angle in 8
        positions, 8·b^-x·x, then moves by less than 1 rad."""
        d = heads.q.shape[1]
        step = 2 if d <= 64 else 8
        dims = list(dict.fromkeys([*self.likely_dims(d), *range(step, d + 1, step)]))
        grid = torch.linspace(math.log(4), math.log(1e9), 40, dtype=torch.float64)
        best = (math.inf, "half", d, 10000.0, d**-0.5)
        for dim, scale, style in itertools.product(dims, self.scales(d)[:4], ("half", "interleaved")):

            def error(base: float, style: str = style, dim: int = dim, scale: float = scale) -> float:
                bases = torch.tensor([base], dtype=torch.float64)
                return float(self.errors(heads, style, dim, bases, scale, few=True))

            values = self.errors(heads, style, dim, grid.exp(), scale, few=True, tokens=8)
            middle = int(values.argmin())
            # Without the right dimension, style and scale the error does not fall towards any base.
            if float(values[middle]) < 0.7 * float(values.median()) or float(values[middle]) < 0.05:
                low, high = float(grid[max(middle - 1, 0)]), float(grid[min(middle + 1, len(grid) - 1)])
                base = math.exp(minimum(lambda v: error(math.exp(v)), low, high))
                best = min(best, (error(base), style, dim, base, scale))
                if best[0] <= TOLERANCE / 20:
                    best = (best[0], style, dim, rounded(base, error), scale)
                    break
        return self._fitted(heads, *best[1:], "fitted to the attention of block 0")

    def _fitted(self, heads: Heads, style: str, dim: int, base: float, scale: float, origin: str) -> Attention:
        usual = abs(scale * heads.q.shape[1] ** 0.5 - 1) < 1e-6
        sources = {
            "rope_style": "attention of block 0",
            "rope_dim": "attention of block 0",
            "rope_base": origin,
            "attention_scale": "1/sqrt(head size)" if usual else "a number in the code",
        }
        found = Attention(heads, style, dim, base, scale, 0.0, sources=sources)
        found.error = self.error(found, 0)
        return found

    def error(self, found: Attention, block: int) -> float:
        """Relative difference of a block's result from what these conventions give."""
        bases = torch.tensor([found.base], dtype=torch.float64)
        return float(self.errors(found.heads, found.style, found.dim, bases, found.scale, block))

    def errors(
        self, heads: Heads, style: str, dim: int, bases: Tensor, scale: float, block: int = 0,
        few: bool = False, tokens: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Relative difference of the result for each base; `few`: two prompts, the first heads, the first tokens."""
        prompts = 2 if few else None
        y, z = self.y[block][:prompts, :tokens], self.z[block][:prompts, :tokens]
        z = z if heads.columns is None else z[..., torch.from_numpy(heads.columns)]
        count, d = heads.q.shape
        group = count // len(heads.k)
        used = min(len(heads.k), max(1, 2 // group)) if few else len(heads.k)
        q, k, v = (y[..., torch.from_numpy(h)] for h in (heads.q[: used * group], heads.k[:used], heads.v[:used]))
        result = attend(rotate(q, style, dim, bases), rotate(k, style, dim, bases), v, scale)
        wanted = z[..., : used * group * d]
        errors = (result.flatten(-2) - wanted).abs().flatten(1).amax(1) / wanted.abs().max().clamp_min(1e-30)
        return torch.nan_to_num(errors, nan=math.inf)

    # --- what is tried -----------------------------------------------------------------------------------------

    def likely_dims(self, d: int) -> list[int]:
        """Numbers of rotated elements: of stored frequencies, declared, and the usual fractions of a head."""
        dims = [*(r for _, r in self.stored), *self.hints.rope_dims, d, d // 2, d // 4]
        return [r for r in dict.fromkeys(dims) if 0 < r <= d and r % 2 == 0]

    def bases(self) -> list[float]:
        return list(dict.fromkeys([*(b for b, _ in self.stored), *self.hints.bases, *USUAL_BASES]))

    def scales(self, d: int) -> list[float]:
        """1/sqrt(d), then what the code multiplies or divides by, once or on both q and k, and other usual ones."""
        numbers = [v for v in self.hints.numbers if 1e-4 < v < 1e4]
        spelled = [s for v in numbers for s in (v, 1 / v, v * v, 1 / (v * v))]
        return list(dict.fromkeys([d**-0.5, *(s for s in spelled if abs(s * d**0.5 - 1) > 1e-6), 1 / d, 1.0]))

    def rounded_frequencies(self) -> str:
        """A remark on tensors that are nearly such frequencies: no base gives them exactly."""
        names = [n for n, t in self.hints.frequencies.items() if _geometric(t, 2e-2) and not _geometric(t, 1e-5)]
        return f". Stored rotary frequencies are rounded and follow no base: {', '.join(names)}" if names else ""


def _geometric(tensor: Tensor, tolerance: float) -> float | None:
    """The ratio of a falling sequence 1, r, r², ... that a tensor is within a tolerance relative to each element."""
    if tensor.ndim != 1 or not tensor.is_floating_point() or not 2 <= tensor.numel() <= 512:
        return None
    t = tensor.double()
    if float(t[0]) != 1.0 or not 0 < float(t[-1]) < 1:
        return None
    ratio = float(t[-1]) ** (1 / (len(t) - 1))
    powers = ratio ** torch.arange(len(t), dtype=torch.float64)
    return ratio if float((t / powers - 1).abs().max()) < tolerance else None


def _runs(numbers: NDArray[np.int64]) -> int:
    """Pieces of consecutive numbers that a set of numbers consists of."""
    return 1 + int((np.diff(np.sort(numbers, axis=None)) > 1).sum())
