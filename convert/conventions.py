"""Read the conventions of a model off recordings of its own code (`trace.Tape`).

Each step of DESIGN §2 is held against the numbers that went in and came out of the checkpoint's matrix products: which
norm makes the input of q, k, v from the residual stream, which attention makes the input of the output projection from
them, which activation makes the input of the second MLP matrix. A step that nothing of DESIGN §2 reproduces is refused
by name. All comparisons are made in float64 against the float32 of the checkpoint's code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import CheckpointError
from .roles import is_no_weight
from .trace import Elementwise, Product, Tape, Weight, model_tensors

# Largest difference, relative to the largest element, that counts as the same function. Float32 rounding leaves 1e-7 to
# 1e-5; the nearest wrong conventions (tanh for erf, 1e-6 for 1e-5) are told apart by which fits better, not by these.
NORM_TOLERANCE = 3e-5
ATTENTION_TOLERANCE = 2e-4
MLP_TOLERANCE = 3e-5
LOGITS_TOLERANCE = 3e-5

USUAL_EPS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-7, 1e-3, 1e-4, torch.finfo(torch.float32).eps)
USUAL_BASES = (10000.0, 500000.0, 1000000.0, 100000.0, 1000.0, 500.0, 100.0, 5000000.0, 10000000.0)


@dataclass
class Branch:
    """One half of a block: what it adds to the residual stream, as it is to be stored."""

    out: Product
    factor: float = 1.0  # on the product, folded into its weights
    bias: Weight | None = None


@dataclass
class Norm:
    weight: Weight | None
    bias: Weight | None


# For every norm of the model, in order: the first product it feeds, its weights, and the product whose result is added
# to the residual stream after it (None for the final norm).
Layers = list[tuple[Product, Norm, Product | None]]


@dataclass
class Step:
    """One norm on the way along the residual stream."""

    where: str
    error: float  # of its result, relative
    stream: Tensor  # what it is applied to, float64 [P, T, D]
    norm: Norm
    branch: Branch | None  # what was added since the norm before


@dataclass
class Block:
    """The products of one block in the first recording, and what was found out about them."""

    qkv: list[Product]
    up: list[Product]
    attention: Branch
    mlp: Branch
    attn_norm: Norm
    ffn_norm: Norm


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


# Relative difference of attention's result, heads, rope style, dimension, base, scale.
Fit = tuple[float, Heads, str, int, float, float]


@dataclass
class Declared:
    """What config.json, the command line and the modules say; each is tried first and believed only if it fits."""

    head_count: int | None = None
    eps: list[float] = field(default_factory=list)
    bases: list[float] = field(default_factory=list)
    rope_dims: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


@dataclass
class Interpretation:
    """What the recordings show. Products and weights are those of the first recording."""

    blocks: list[Block]
    head: Product
    head_factor: float
    final_norm: Norm
    heads: Heads
    gate: NDArray[np.int64] | None  # outputs of the up projections that are the gate, [F]
    up: NDArray[np.int64]  # and the others, [F]
    norm: str
    eps: float
    activation: str
    scale: float
    rope_style: str
    rope_dim: int
    rope_base: float
    number: dict[int, int]  # id of a product -> its number in the recording
    errors: dict[str, float]  # convention -> largest relative difference over all blocks
    sources: dict[str, str]  # convention -> where its value came from


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; infinite if either is not finite."""
    value = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return value if math.isfinite(value) else math.inf


# --- the steps of DESIGN §2, in float64 ------------------------------------------------------------------------------


def apply_norm(x: Tensor, kind: str, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [..., D] -> [..., D]."""
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


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


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    # not in DESIGN §2; tried to name what a checkpoint does
    "relu": F.relu,
    "silu": F.silu,
    "squared relu": lambda x: F.relu(x).square(),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "gated gelu": F.gelu,
    "gated tanh gelu": PLAIN["gelu_tanh"],
    "gated relu": F.relu,
    "gated sigmoid": torch.sigmoid,
}
SUPPORTED = ("gelu", "gelu_tanh", "swiglu")


# --- reading the recordings ------------------------------------------------------------------------------------------


class Reader:
    """Interprets recordings of several prompts of equal length by one model."""

    def __init__(self, tapes: Sequence[Tape], logits: Sequence[Tensor], declared: Declared, model: nn.Module) -> None:
        self.tape, self.declared, self.model = tapes[0], declared, model
        self.tokens = self.tape_length(tapes)
        kept = [self._float_products(t) for t in tapes]
        if len({len(k) for k in kept}) != 1 or not kept[0]:
            raise CheckpointError(
                "the checkpoint's code runs other operations for other prompts, or multiplies by no stored matrix: "
                "its structure cannot be read"
            )
        # The same product in every prompt: x [P, T, in], y [P, T, out], float64.
        self.products = kept[0]
        self.number = {id(p): i for i, p in enumerate(self.products)}
        self._x = [_stack([k[i].x for k in kept]) for i in range(len(kept[0]))]
        self._y = [_stack([k[i].y for k in kept]) for i in range(len(kept[0]))]
        size = self.tokens * kept[0][-1].x.shape[1]  # candidates for the residual stream have T·D elements
        self.early = [torch.stack([o.reshape(-1) for o in outs]) for outs in self._early(tapes, size)]
        self.logits = _stack(logits)
        self.errors: dict[str, float] = {}
        self.sources: dict[str, str] = {}

    @staticmethod
    def tape_length(tapes: Sequence[Tape]) -> int:
        """T: most products have one row per token."""
        rows = [p.x.shape[0] for p in tapes[0].products]
        return max(set(rows), key=rows.count) if rows else 0

    def _float_products(self, tape: Tape) -> list[Product]:
        found = [p for p in tape.products if p.x.is_floating_point() and min(p.weight.value.shape) > 1]
        return [p for p in found if p.x.shape[0] == self.tokens or p is found[-1]]

    def _early(self, tapes: Sequence[Tape], size: int) -> Iterable[list[Tensor]]:
        """Early activations of `size` elements in every recording."""
        self.early_orders = []
        for same in zip(*(t.outputs for t in tapes), strict=False):
            if {(order, out.numel()) for order, out in same} == {(same[0][0], size)}:
                self.early_orders.append(same[0][0])
                yield [out.double() for _, out in same]

    def x(self, product: Product) -> Tensor:
        """Input in all prompts, float64 [P, T, in]."""
        return self._x[self.number[id(product)]]

    def y(self, product: Product) -> Tensor:
        """Output in all prompts, bias included, float64 [P, T, out]."""
        return self._y[self.number[id(product)]]

    # --- structure -----------------------------------------------------------------------------------------------

    def groups(self) -> list[list[Product]]:
        """Consecutive products with the same input."""
        groups: list[list[Product]] = []
        for product in self.products:
            if groups and torch.equal(groups[-1][0].x, product.x):
                groups[-1].append(product)
            else:
                groups.append([product])
        return groups

    def interpret(self, on_input: Callable[[int, Tensor], None]) -> Interpretation:
        """Read everything. `on_input(operation, rows [T, D])` is told what enters block 0 of the first prompt, so that
        inputs which are no codes are refused before anything that follows from them."""
        groups = self.groups()
        head = groups[-1][-1]
        head_factor = self.check_head(head)
        quads = self.quads(groups[:-1], head.x.shape[1])
        read = [self.norm_weights(group[0]) for quad in quads for group in (quad[0], quad[2])]
        final, whole = self.norm_weights(head)
        norms = [norm for norm, _ in read]
        starts = [group[0] for quad in quads for group in (quad[0], quad[2])]
        ends = [group[0] for quad in quads for group in (quad[1], quad[3])]
        layers: Layers = [*zip(starts, norms, ends, strict=True), (head, final, None)]
        order, stream, kind, eps = self.find_input(layers, [w for _, w in (*read, (final, whole)) if w is not None])
        on_input(order, stream[0].float())
        branches = self.follow_stream(layers, stream, kind, eps)
        blocks = [
            Block(quad[0], quad[2], *branches[2 * i : 2 * i + 2], *norms[2 * i : 2 * i + 2])
            for i, quad in enumerate(quads)
        ]
        heads, style, dim, base, scale = self.find_attention(blocks)
        gate, up, activation = self.find_mlp(blocks)
        return Interpretation(
            blocks, head, head_factor, final, heads, gate, up, kind, eps, activation,
            scale, style, dim, base, {id(p): i for i, p in enumerate(self.tape.products)}, self.errors, self.sources,
        )  # fmt: skip

    def check_head(self, head: Product) -> float:
        """The factor between the last product and the logits."""
        y = self.y(head)[..., : self.logits.shape[-1]]
        logits = self.logits[:, -y.shape[1] :]
        if y.shape != logits.shape:
            raise CheckpointError(
                f"output: the last matrix product has {self.y(head).shape[-1]} outputs, the logits {logits.shape[-1]}"
            )
        self.errors["logits"] = difference(y, logits)
        if self.errors["logits"] <= LOGITS_TOLERANCE:
            return 1.0
        factor = float((y * logits).sum() / y.square().sum())
        self.errors["logits"] = difference(y * factor, logits)
        if self.errors["logits"] <= LOGITS_TOLERANCE and factor > 0:
            self.sources["output factor"] = f"the code multiplies the logits by {factor:.6g}; folded into the weights"
            return factor
        raise CheckpointError(
            "output: the logits are not the plain output projection (capped or otherwise changed logits?); "
            f"smallest relative difference {self.errors['logits']:.2g}"
        )

    def quads(self, groups: list[list[Product]], width: int) -> list[list[list[Product]]]:
        """The blocks, each [input projections], [output projection], [up projections], [down projection]."""

        def shapes(quad: list[list[Product]]) -> list[list[tuple[int, ...]]]:
            return [[tuple(p.weight.value.shape) for p in group] for group in quad]

        def is_block(quad: list[list[Product]]) -> bool:
            (qkv, out, up, down) = quad
            ends = all(len(g) == 1 and g[0].y.shape[1] == width for g in (out, down))
            starts = all(p.x.shape[1] == width for g in (qkv, up) for p in g)
            return ends and starts and sum(p.y.shape[1] for p in up) >= down[0].x.shape[1]

        quads: list[list[list[Product]]] = []
        while len(groups) >= 4 and is_block(groups[-4:]) and (not quads or shapes(groups[-4:]) == shapes(quads[0])):
            quads.insert(0, groups[-4:])
            groups = groups[:-4]
        # What is left comes before the blocks: products that compute the codes, on vectors narrower than the model.
        if not quads or any(p.x.shape[1] == width and p.y.shape[1] == width for g in groups for p in g):
            block = f"block {len(quads)} from the end" if quads else "block 0 (counted from the last one)"
            steps = "; ".join(
                " + ".join(f"{p.x.shape[1]}->{p.y.shape[1]} ({'+'.join(p.weight.names)})" for p in g)
                for g in groups[-4:]
            )
            raise CheckpointError(
                f"{block}: its matrix products are not those of attention followed by an MLP, one after the other "
                f"(parallel branches, experts or something else). The last ones, by common input: {steps}"
            )
        return quads

    # --- norms and the residual stream ---------------------------------------------------------------------------

    def norm_weights(self, product: Product) -> tuple[Norm, Elementwise | None]:
        """The affine part of the norm that makes a product's input, and the operation, if it is a whole norm."""
        last = self.producer(product.x.flatten(), product.order)
        if last is None:
            return Norm(None, None), None
        if last.op in ("layer_norm", "rms_norm"):
            return Norm(last.weight, last.bias), last
        if last.op == "mul":
            return Norm(last.weight, None), None
        gain = self.producer(last.x, last.order)
        if gain is not None and gain.op == "mul":
            return Norm(gain.weight, last.weight), None
        return Norm(None, last.weight), None

    def producer(self, flat: Tensor, before: int) -> Elementwise | None:
        for record in reversed(self.tape.elementwise):
            if record.order < before and record.y.numel() == flat.numel() and torch.equal(record.y, flat):
                return record
        return None

    def norm_error(self, stream: Tensor, product: Product, norm: Norm, kind: str, eps: float) -> float:
        x = self.x(product)
        weight = _flat(norm.weight, x.shape[-1])
        return difference(apply_norm(stream[:, -x.shape[1] :], kind, eps, weight, _flat(norm.bias, x.shape[-1])), x)

    def find_input(self, layers: Layers, whole_norms: list[Elementwise]) -> tuple[int, Tensor, str, float]:
        """(operation, its result [P, T, D], norm kind, eps): the activation that is the residual stream of block 0."""
        (first, _, _), width = layers[0], layers[0][0].x.shape[1]
        declared = [n.eps if n.eps is not None else torch.finfo(torch.float32).eps for n in whole_norms]
        kinds = ["rmsnorm" if n.op == "rms_norm" else "layernorm" for n in whole_norms[:1]] or ["layernorm", "rmsnorm"]
        in_code = [v for _, op, v in self.tape.scalars if op in ("add", "clamp_min", "clamp") and 0 < v < 0.1]
        candidates = list(dict.fromkeys([*declared, *in_code, *self.declared.eps, *USUAL_EPS]))
        best: tuple[bool, float, int, Tensor, str, float] | None = None
        closest = math.inf
        for order, outputs in reversed(list(zip(self.early_orders, self.early, strict=True))):
            if order >= first.order or outputs.shape[1] != self.tokens * width:
                continue
            stream = outputs.reshape(len(outputs), self.tokens, width)
            for kind, eps in itertools.product(kinds, candidates):
                # The second norm tells the stream from its normed self and from multiples, which the first cannot.
                steps = list(itertools.islice(self.walk(layers, stream, kind, eps), 1))
                closest = min(closest, steps[0].error)
                if steps[0].error > 100 * NORM_TOLERANCE:
                    continue
                steps = list(itertools.islice(self.walk(layers, stream, kind, eps), 2))
                error = max(step.error for step in steps)
                # A layer norm does not see a shift of all elements: only the real stream is what the code adds to.
                fits = error > NORM_TOLERANCE or not self.was_computed(steps[1].stream), error
                if best is None or fits < best[:2]:
                    best = (*fits, order, stream, kind, eps)
        if best is None:
            raise CheckpointError(
                "block 0: the input of its attention is no layer norm or RMS norm of what enters the block (post-norm, "
                f"an extra or unusual norm?); smallest relative difference {closest:.2g}{self._strays()}"
            )
        *_, order, stream, kind, eps = best
        eps, self.sources["norm_eps"] = self.fit_eps(layers, stream, kind, candidates, set(declared))
        self.sources["norm"] = f"inputs of the products, e.g. {'+'.join(first.weight.names)}"
        return order, stream, kind, eps

    def was_computed(self, stream: Tensor) -> bool:
        """Whether an early operation had this result."""
        flat = stream.reshape(len(stream), -1)
        return any(out.shape == flat.shape and difference(out, flat) < 1e-6 for out in self.early)

    def fit_eps(
        self, layers: Layers, stream: Tensor, kind: str, candidates: list[float], declared: set[float]
    ) -> tuple[float, str]:
        """The eps that reproduces all norms best; among equally good ones the first candidate, declared ones first."""

        norms = len(layers)

        def error(eps: float) -> tuple[int, float]:
            """(norms that are no such norm whatever eps is, largest difference of the ones before)."""
            worst = 0.0
            for i, step in enumerate(self.walk(layers, stream, kind, eps)):
                if step.error > 100 * NORM_TOLERANCE:
                    return norms - i, worst
                worst = max(worst, step.error)
            return 0, worst

        errors = [error(e) for e in candidates]
        failing, least = min(errors)
        good = [e for e, (f, v) in zip(candidates, errors, strict=True) if f == failing and v <= 1.2 * least + 2e-7]
        if failing < norms and least <= NORM_TOLERANCE:
            where = "declared by the norm modules" if good[0] in declared else "the only usual value that fits"
            return good[0], f"{where}; reproduces every norm"

        # Between the candidates: the error of one norm has a single minimum in log eps.
        def total(eps: float) -> float:
            return sum(error(eps))

        fitted = math.exp(_minimum(lambda v: total(math.exp(v)), math.log(1e-13), math.log(0.1)))
        fitted = _rounded(fitted, total)
        return (fitted, "fitted to the norms") if error(fitted) < min(errors) else (good[0], "closest usual value")

    def walk(self, layers: Layers, stream: Tensor, kind: str, eps: float) -> Iterator[Step]:
        """Follow the residual stream from norm to norm."""
        branch = None
        for i, (product, norm, out) in enumerate(layers):
            if i % 2:
                where = f"block {i // 2}: what attention adds, or the feed-forward norm"
            elif i == 0:
                where = "block 0: attention norm"
            else:
                norm_name = "the final norm" if out is None else f"the attention norm of block {i // 2}"
                where = f"block {i // 2 - 1}: what its feed-forward adds, or {norm_name}"
            yield Step(where, self.norm_error(stream, product, norm, kind, eps), stream, norm, branch)
            if out is not None:
                following, next_norm, _ = layers[i + 1]
                stream, branch = self.add_branch(stream, out, following, next_norm, kind, eps)

    def add_branch(
        self, stream: Tensor, out: Product, following: Product, norm: Norm, kind: str, eps: float
    ) -> tuple[Tensor, Branch]:
        """The stream after a branch: plus the product, its bias added late or a constant factor if need be."""
        y = self.y(out)
        best = Branch(out, 1.0, out.bias)
        after = stream + y
        error = self.norm_error(after, following, norm, kind, eps)
        if error <= NORM_TOLERANCE:
            return after, best
        between = range(out.order, following.order)
        scalars = [
            1 / v if op == "div" else v for o, op, v in self.tape.scalars if o in between and op in ("mul", "div") and v
        ]
        late = [
            r.weight for r in self.tape.elementwise
            if r.order in between and r.op == "add" and r.weight is not None and r.weight.value.numel() == y.shape[-1]
        ]  # fmt: skip
        for factor, bias in itertools.product([1.0, *scalars], [None, *late]):
            if bias is not None and out.bias is not None:
                continue
            added = y * factor if bias is None else y * factor + _flat(bias, y.shape[-1])
            attempt = self.norm_error(stream + added, following, norm, kind, eps)
            if attempt < error:
                error, after = attempt, stream + added
                best = Branch(out, factor, bias or out.bias)
        return after, best

    def follow_stream(self, layers: Layers, stream: Tensor, kind: str, eps: float) -> list[Branch]:
        """Check every norm against the residual stream; returns the branches, two per block."""
        branches = []
        self.errors["norm"] = 0.0
        for step in self.walk(layers, stream, kind, eps):
            if step.error > NORM_TOLERANCE:
                raise CheckpointError(
                    f"{step.where}: its result is no {kind} with eps {eps:.3g} of the residual stream (another norm, "
                    "residual connection or order of the branches?); smallest relative difference "
                    f"{step.error:.2g}{self._strays()}"
                )
            if kind == "rmsnorm" and step.norm.bias is not None:
                raise CheckpointError(f"{step.where}: an RMS norm with a bias, which the file format does not have")
            self.errors["norm"] = max(self.errors["norm"], step.error)
            if step.branch is not None:
                branches.append(step.branch)
        return branches

    def _strays(self) -> str:
        """Vectors of weights that multiply something which is no input of a matrix product."""
        inputs = [p.x.flatten() for p in self.products]
        names = {
            n: None
            for r in self.tape.elementwise
            if r.op != "add" and r.weight is not None and r.weight.value.numel() > 1
            and not any(r.y.numel() == x.numel() and torch.equal(r.y, x) for x in inputs)
            for n in r.weight.names
            if not is_no_weight(n)
        }  # fmt: skip
        return f". Weights used elsewhere: {', '.join(list(names)[:8])}" if names else ""

    # --- attention -----------------------------------------------------------------------------------------------

    def side_by_side(self, products: Sequence[Product]) -> Tensor:
        """Outputs of products with a common input, [P, T, sum of out]."""
        return torch.cat([self.y(p) for p in products], -1)

    def find_attention(self, blocks: list[Block]) -> tuple[Heads, str, int, float, float]:
        first = blocks[0]
        y, target = self.side_by_side(first.qkv), self.x(first.attention.out)
        values = self.value_outputs(y, target)
        layouts: list[Heads] = []
        for elements in self.head_elements(y, target, values):
            if elements.size != first.qkv[0].x.shape[1]:
                raise CheckpointError(
                    f"block 0: {elements.shape[0]} heads of size {elements.shape[1]} make {elements.size}, not the "
                    f"embedding length {first.qkv[0].x.shape[1]}; the file format has no head size of its own"
                )
            layouts += self.head_layouts(elements, values, y.shape[-1])
        closest = math.inf
        for stage in (self.fit_likely, self.fit_rearranged, self.fit_any_base):
            for layout in layouts:
                error, heads, *found = stage(layout, y, target)
                closest = min(closest, error)
                if error <= ATTENTION_TOLERANCE:
                    self.check_attention(blocks, heads, *found)
                    return (heads, *found)
        raise CheckpointError(
            "block 0: attention: no combination of heads, order of q, k, v, rotary style, dimension, base and scale "
            "reproduces it (no rotary positions, ALiBi, scaled positions, normed or capped scores, a window?); "
            f"smallest relative difference {closest:.2g}{self._strays()}{self.rounded_frequencies()}"
        )

    def value_outputs(self, y: Tensor, target: Tensor) -> NDArray[np.int64]:
        """For every element of attention's result the output that is its value: the first token sees only itself."""
        got, wanted = y[:, 0], target[:, 0]  # [P, N], [P, M]
        distance = torch.zeros(wanted.shape[1], got.shape[1], dtype=torch.float64)
        for a, b in zip(wanted, got, strict=True):
            torch.maximum(distance, (a[:, None] - b[None, :]).abs(), out=distance)
        nearest = distance.min(1)
        error = float(nearest.values.max() / wanted.abs().max().clamp_min(1e-30))
        if error > ATTENTION_TOLERANCE:
            raise CheckpointError(
                "block 0: attention: the first token's result is not its own value (no causal mask, or values are "
                f"changed on the way); relative difference {error:.2g}{self._strays()}"
            )
        return nearest.indices.numpy()

    def head_elements(self, y: Tensor, target: Tensor, values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Ways to cut attention's result into heads so that the second token weighs all values of a head alike: numbers
        of elements [H, d], with the declared number of heads first, then the fewest heads."""
        size = target.shape[-1]
        step, moved = y[:, 1, values] - y[:, 0, values], target[:, 1] - y[:, 0, values]
        limit = ATTENTION_TOLERANCE * float(target.abs().max())
        counts = [n for n in range(1, size // 2 + 1) if size % n == 0 and size // n % 2 == 0]
        counts.sort(key=lambda n: (n != self.declared.head_count, n))
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
        columns = None if (columns == np.arange(count * d)).all() else columns
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
                    yield Heads(q[order], k, kv, columns)

    def fit_likely(self, heads: Heads, y: Tensor, target: Tensor) -> Fit:
        """The best combination of declared and usual values."""
        d = heads.q.shape[1]
        bases = torch.tensor(self.bases(), dtype=torch.float64)
        best = (math.inf, "half", d, 10000.0, d**-0.5)
        for dim, scale, style in itertools.product(self.likely_dims(d), self.scales(d), ("half", "interleaved")):
            errors = self.attention_errors(heads, y, target, style, dim, bases, scale, few=True)
            least = int(errors.argmin())
            best = min(best, (float(errors[least]), style, dim, float(bases[least]), scale))
            if best[0] <= ATTENTION_TOLERANCE / 20:
                break
        self.sources["rope_base"] = "declared or usual; reproduces attention"
        return self._fitted(heads, y, target, *best[1:])

    def fit_rearranged(self, heads: Heads, y: Tensor, target: Tensor) -> Fit:
        """The same with the elements of every head in another order: the last ones rotated instead of the first, or
        all rotated the other way round, which is the same as exchanging the two elements of a pair. Scores do not
        change if q and k are reordered alike."""
        d = heads.q.shape[1]
        n = np.arange(d)
        orders = [np.roll(n, dim) for dim in self.likely_dims(d) if dim < d]
        for dim in self.likely_dims(d):
            orders.append(np.concatenate([np.roll(n[:dim], dim // 2), n[dim:]]))
            orders.append(np.concatenate([n[:dim] ^ 1, n[dim:]]))
        fits = (self.fit_likely(replace(heads, q=heads.q[:, o], k=heads.k[:, o]), y, target) for o in orders)
        best = min(fits, key=lambda fit: fit[0])
        self.sources["rope_dim"] = "attention of block 0, rows of q and k reordered within each head"
        return best

    def fit_any_base(self, heads: Heads, y: Tensor, target: Tensor) -> Fit:
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
                return float(self.attention_errors(heads, y, target, style, dim, bases, scale, few=True))

            values = self.attention_errors(heads, y[:, :8], target[:, :8], style, dim, grid.exp(), scale, few=True)
            middle = int(values.argmin())
            # Without the right dimension, style and scale the error does not fall towards any base.
            if float(values[middle]) < 0.7 * float(values.median()) or float(values[middle]) < 0.05:
                low, high = float(grid[max(middle - 1, 0)]), float(grid[min(middle + 1, len(grid) - 1)])
                base = math.exp(_minimum(lambda v: error(math.exp(v)), low, high))
                best = min(best, (error(base), style, dim, base, scale))
                if best[0] <= ATTENTION_TOLERANCE / 20:
                    best = (best[0], style, dim, _rounded(base, error), scale)
                    break
        self.sources["rope_base"] = "fitted to the attention of block 0"
        return self._fitted(heads, y, target, *best[1:])

    def _fitted(
        self, heads: Heads, y: Tensor, target: Tensor, style: str, dim: int, base: float, scale: float
    ) -> Fit:  # fmt: skip
        usual = abs(scale * heads.q.shape[1] ** 0.5 - 1) < 1e-6
        self.sources["attention_scale"] = "1/sqrt(head size)" if usual else "a number in the code"
        self.sources["rope_style"] = self.sources["rope_dim"] = "attention of block 0"
        bases = torch.tensor([base], dtype=torch.float64)
        error = float(self.attention_errors(heads, y, target, style, dim, bases, scale))
        return error, heads, style, dim, base, scale

    def likely_dims(self, d: int) -> list[int]:
        """Numbers of rotated elements: of stored frequencies, declared, and the usual fractions of a head."""
        dims = [*(r for _, r in self.frequencies()), *self.declared.rope_dims, d, d // 2, d // 4]
        return [r for r in dict.fromkeys(dims) if 0 < r <= d and r % 2 == 0]

    def attention_errors(
        self, heads: Heads, y: Tensor, target: Tensor, style: str, dim: int, bases: Tensor, scale: float,
        few: bool = False,
    ) -> Tensor:  # fmt: skip
        """Relative difference of attention's result for each base; `few`: two prompts, the first heads only."""
        target = target if heads.columns is None else target[..., torch.from_numpy(heads.columns)]
        count, d = heads.q.shape
        group = count // len(heads.k)
        used = min(len(heads.k), max(1, 2 // group)) if few else len(heads.k)
        y, target = (y[:2], target[:2]) if few else (y, target)
        q, k, v = (y[..., torch.from_numpy(h)] for h in (heads.q[: used * group], heads.k[:used], heads.v[:used]))
        result = attend(rotate(q, style, dim, bases), rotate(k, style, dim, bases), v, scale)
        wanted = target[..., : used * group * d]
        errors = (result.flatten(-2) - wanted).abs().flatten(1).amax(1) / wanted.abs().max().clamp_min(1e-30)
        return torch.nan_to_num(errors, nan=math.inf)

    def check_attention(
        self, blocks: list[Block], heads: Heads, style: str, dim: int, base: float, scale: float
    ) -> None:
        self.errors["attention"] = 0.0
        for i, block in enumerate(blocks):
            y, target = self.side_by_side(block.qkv), self.x(block.attention.out)
            error = self._fitted(heads, y, target, style, dim, base, scale)[0]
            if error > ATTENTION_TOLERANCE:
                raise CheckpointError(
                    f"block {i}: attention: differs from block 0 (rope {style}, dimension {dim}, base {base:g}, "
                    f"scale {scale:g}); relative difference {error:.2g}"
                )
            self.errors["attention"] = max(self.errors["attention"], error)

    def bases(self) -> list[float]:
        """Rotary bases: numbers raised to powers in the code, stored frequencies, declared and usual ones."""
        raised = [v for _, op, v in self.tape.scalars if op == "pow" and v > 4]
        return list(dict.fromkeys([*(b for b, _ in self.frequencies()), *raised, *self.declared.bases, *USUAL_BASES]))

    def frequencies(self) -> list[tuple[float, int]]:
        """(base, dimension) of every tensor of the model that falls as base^(-2i/dimension)."""
        found = {}
        for _, tensor in model_tensors(self.model):
            ratio = _geometric(tensor, 1e-5)
            if ratio:
                exact = float(tensor[-1].double()) ** (-tensor.numel() / (tensor.numel() - 1))
                found[_nice(exact), 2 * tensor.numel()] = None
        return list(found)

    def rounded_frequencies(self) -> str:
        """A remark on tensors that are nearly such frequencies: no base gives them exactly."""
        names = [n for n, t in model_tensors(self.model) if _geometric(t, 2e-2) and not _geometric(t, 1e-5)]
        return (
            f". Stored rotary frequencies are rounded and follow no base exactly: {', '.join(names)}" if names else ""
        )

    def scales(self, d: int) -> list[float]:
        """Attention scales: 1/sqrt(d), what the code multiplies or divides by, declared and usual ones."""
        numbers = {v for _, op, v in self.tape.scalars if op in ("mul", "div") or "scaled_dot" in op}
        numbers = [v for v in numbers if 1e-4 < abs(v) < 1e4]
        spelled = [s for v in numbers for s in (v, 1 / v, v * v, 1 / (v * v)) if s > 0]
        exact = [s for s in spelled if abs(s * d**0.5 - 1) > 1e-6]
        return list(dict.fromkeys([d**-0.5, *self.declared.scales, 1 / d, 1.0, *exact]))

    # --- MLP -----------------------------------------------------------------------------------------------------

    def find_mlp(self, blocks: list[Block]) -> tuple[NDArray[np.int64] | None, NDArray[np.int64], str]:
        size = blocks[0].mlp.out.x.shape[1]
        outputs = sum(p.y.shape[1] for p in blocks[0].up)
        n = np.arange(outputs)
        if outputs == size:
            splits: list[tuple[NDArray[np.int64] | None, NDArray[np.int64]]] = [(None, n)]
        elif outputs == 2 * size:
            splits = [(n[:size], n[size:]), (n[size:], n[:size]), (n[::2], n[1::2]), (n[1::2], n[::2])]
        else:
            raise CheckpointError(f"block 0: feed-forward: {outputs} outputs enter an activation, {size} leave it")
        options = [(s, name) for s in splits for name in (PLAIN if s[0] is None else GATED)]

        def errors(block: Block, few: bool) -> list[float]:
            y, target = self.side_by_side(block.up), self.x(block.mlp.out)
            chosen = [o for o in options if not few or o[1] in SUPPORTED]
            return [difference(_activated(y, *split, name), target) for split, name in chosen]

        first = errors(blocks[0], few=False)
        if min(first) > MLP_TOLERANCE or options[int(np.argmin(first))][1] not in SUPPORTED:
            name = options[int(np.argmin(first))][1]
            known = f"it is {name}, which the file format does not have" if min(first) <= MLP_TOLERANCE else (
                f"no supported activation reproduces it; the closest, {name}, differs by {min(first):.2g}"
            )  # fmt: skip
            raise CheckpointError(f"block 0: feed-forward: {known}")
        options = [o for o in options if o[1] in SUPPORTED]
        table = np.array([errors(block, few=True) for block in blocks])  # [blocks, options]
        worst = table.max(0)
        best = int(np.argmin(worst))
        for i, row in enumerate(table):
            if row[best] > MLP_TOLERANCE:
                raise CheckpointError(
                    f"block {i}: feed-forward: {options[best][1]}, which reproduces the blocks before, does not "
                    f"reproduce it; relative difference {row.min():.2g}"
                )
        (gate, up), activation = options[best]
        rival = [n for n, (_, name) in enumerate(options) if name != activation and worst[n] < 3 * worst[best] + 1e-7]
        self.errors["activation"] = float(worst[best])
        self.sources["activation"] = "results of the feed-forward layers"
        if rival:  # both GELUs fit: the operations decide
            operations = self.tape.operations
            erf, tanh = {"gelu_none", "erf"} & operations, {"gelu_tanh", "tanh"} & operations
            if bool(erf) == bool(tanh):
                raise CheckpointError("block 0: feed-forward: the two GELUs cannot be told apart; give --activation")
            activation = "gelu" if erf else "gelu_tanh"
            self.sources["activation"] = f"operation {next(iter(erf or tanh))} of the code"
        return gate, up, activation


def _activated(y: Tensor, gate: NDArray[np.int64] | None, up: NDArray[np.int64], name: str) -> Tensor:
    if gate is None:
        return PLAIN[name](y)
    return GATED[name](y[..., torch.from_numpy(gate)]) * y[..., torch.from_numpy(up)]


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


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.double() for t in tensors])


def _flat(weight: Weight | None, size: int) -> Tensor | None:
    """A weight as a float64 vector [size]."""
    return None if weight is None else weight.value.double().flatten().expand(size)


def _minimum(function: Callable[[float], float], low: float, high: float, steps: int = 48) -> float:
    """Golden-section search for the minimum of a function with one minimum in low..high."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = function(a), function(b)
    for _ in range(steps):
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = function(a)
        else:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = function(b)
    return a if fa < fb else b


def _rounded(value: float, error: Callable[[float], float]) -> float:
    """The roundest number that fits as well as a fitted one."""
    limit = 1.5 * error(value) + 5e-7
    for digits in range(1, 8):
        short = float(f"{value:.{digits - 1}e}")
        if error(short) <= limit:
            return short
    return value


def _nice(value: float) -> float:
    """A base computed from float32 frequencies, rounded if it is within their rounding of a short number."""
    for digits in range(1, 6):
        short = float(f"{value:.{digits - 1}e}")
        if abs(short / value - 1) < 2e-6:
            return short
    return value
