"""Read the conventions of a model off recordings of its own code (`tape.Tape`).

Each step of the forward pass (docs/design.md) is held against the numbers that went in and came out of the checkpoint's
matrix products: which norm makes the input of q, k, v from the residual stream, which attention makes the input of the
output projection from them, which activation makes the input of the second MLP matrix. A step that nothing of it
reproduces is refused by name. All comparisons are made in float64 against the float32 of the checkpoint's code.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...errors import CheckpointError
from ..checkpoint.source import is_no_weight
from .attention import Attention, AttentionReader, Hints
from .fitting import difference, minimum, rounded
from .tape import Elementwise, Product, Tape, Weight

# Largest difference, relative to the largest element, that counts as the same function. Float32 rounding leaves 1e-7 to
# 1e-5; the nearest wrong conventions (tanh for erf, 1e-6 for 1e-5) are told apart by which fits better, not by these.
NORM_TOLERANCE = 3e-5
MLP_TOLERANCE = 3e-5
LOGITS_TOLERANCE = 3e-5

USUAL_EPS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-7, 1e-3, 1e-4, torch.finfo(torch.float32).eps)


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
class Interpretation:
    """What the recordings show. Products and weights are those of the first recording."""

    blocks: list[Block]
    head: Product
    head_factor: float
    final_norm: Norm
    attention: Attention
    gate: NDArray[np.int64] | None  # outputs of the up projections that are the gate, [F]
    up: NDArray[np.int64]  # and the others, [F]
    norm: str
    eps: float
    activation: str
    number: dict[int, int]  # id of a product -> its number in the recording
    errors: dict[str, float]  # convention -> largest relative difference over all blocks
    sources: dict[str, str]  # convention -> where its value came from

    def input_numbers(self) -> list[int]:
        """Numbers in the recording of the first product of every block, then of the output projection."""
        return [self.number[id(b.qkv[0])] for b in self.blocks] + [self.number[id(self.head)]]


# --- the steps of the forward pass, in float64 ------------------------------------------------------------------------


def apply_norm(x: Tensor, kind: str, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [..., D] -> [..., D]."""
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    # not in the file format; tried to name what a checkpoint does
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

    def __init__(self, tapes: Sequence[Tape], logits: Sequence[Tensor], eps: Sequence[float], hints: Hints) -> None:
        """eps and hints: what is declared; tried first. Empties the products of all recordings but the first."""
        self.tape, self.declared_eps, self.hints = tapes[0], eps, hints
        rows = [p.x.shape[0] for p in self.tape.products]
        self.tokens = max(set(rows), key=rows.count) if rows else 0  # T: most products have one row per token
        kept = [self._float_products(t) for t in tapes]
        if len({len(k) for k in kept}) != 1 or not kept[0]:
            raise CheckpointError(
                "the checkpoint's code runs other operations for other prompts, or multiplies by no stored matrix: "
                "its structure cannot be read"
            )
        # The same product in every prompt: x [P, T, in], y [P, T, out], as they were recorded.
        self.products = kept[0]
        self.number = {id(p): i for i, p in enumerate(self.products)}
        self._x, self._y = [], []
        for same in zip(*kept, strict=True):
            self._x.append(torch.stack([p.x for p in same]))
            self._y.append(torch.stack([p.y for p in same]))
            for other in same[1:]:  # only the stacks are used from here on
                other.x = other.y = torch.empty(0)
        size = self.tokens * kept[0][-1].x.shape[1]  # candidates for the residual stream have T·D elements
        self.early = [torch.stack([o.reshape(-1) for o in outs]) for outs in self._early(tapes, size)]
        self.logits = torch.stack([t.double() for t in logits])
        self.errors: dict[str, float] = {}
        self.sources: dict[str, str] = {}

    def _float_products(self, tape: Tape) -> list[Product]:
        types = {p.x.dtype for p in tape.products if p.x.is_floating_point()} - {torch.float32, torch.float64}
        if types:
            raise CheckpointError(
                f"the checkpoint's code computes matrix products in {types.pop()} (autocast?), too coarse to read "
                "conventions from; have it compute in float32"
            )
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
        return self._x[self.number[id(product)]].double()

    def y(self, product: Product) -> Tensor:
        """Output in all prompts, bias included, float64 [P, T, out]."""
        return self._y[self.number[id(product)]].double()

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
            Block(quad[0], quad[2], branches[2 * i], branches[2 * i + 1], norms[2 * i], norms[2 * i + 1])
            for i, quad in enumerate(quads)
        ]
        attention = self.find_attention(blocks)
        gate, up, activation = self.find_mlp(blocks)
        number = {id(p): i for i, p in enumerate(self.tape.products)}
        return Interpretation(
            blocks, head, head_factor, final, attention, gate, up, kind, eps, activation, number, self.errors,
            self.sources | attention.sources,
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
        candidates = list(dict.fromkeys([*declared, *in_code, *self.declared_eps, *USUAL_EPS]))
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

        fitted = math.exp(minimum(lambda v: total(math.exp(v)), math.log(1e-13), math.log(0.1)))
        fitted = rounded(fitted, total)
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
            added = y * factor if (shift := _flat(bias, y.shape[-1])) is None else y * factor + shift
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

    # --- attention and MLP -------------------------------------------------------------------------------------

    def side_by_side(self, products: Sequence[Product]) -> Tensor:
        """Outputs of products with a common input, [P, T, sum of out]."""
        return torch.cat([self.y(p) for p in products], -1)

    def find_attention(self, blocks: list[Block]) -> Attention:
        scalars = self.tape.scalars
        numbers = [v for _, op, v in scalars if op in ("mul", "div") or "scaled_dot" in op]
        # A trained scale is a weight with one element.
        trained = [r.weight.value for r in self.tape.elementwise if r.op == "mul" and r.weight is not None]
        numbers += [float(w) for w in trained if w.numel() == 1]
        hints = replace(
            self.hints,
            bases=[*(v for _, op, v in scalars if op == "pow" and v > 4), *self.hints.bases],
            numbers=sorted(set(numbers)) + self.hints.numbers,
        )
        y, z = [self.side_by_side(b.qkv) for b in blocks], [self.x(b.attention.out) for b in blocks]
        found = AttentionReader(y, z, blocks[0].qkv[0].x.shape[1], hints, self._strays).find()
        self.errors["attention"] = found.error
        return found

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


def _flat(weight: Weight | None, size: int) -> Tensor | None:
    """A weight as a float64 vector [size]."""
    return None if weight is None else weight.value.double().flatten().expand(size)
