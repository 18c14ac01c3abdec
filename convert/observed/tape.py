"""Watch a model compute: which stored weight enters which operation, with which numbers in and out.

Names and module structure say what an author meant; the operations that reach PyTorch's dispatcher say what the code
does. A `Tape` sits below every spelling of it (nn.Linear, `x @ w`, einsum, Conv1D, functional calls, scripted code) and
records each operation that combines a weight with an activation.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Activations of this many elements are kept as candidates for the input of the first block, until that many matrix
# products have been seen.
_MAX_KEPT = 1 << 22
_KEEP_UNTIL_PRODUCT = 12
# Results of so many products, the latest, are recognised when a bias is added to them.
_FOLLOWED = 8


@dataclass(frozen=True)
class Weight:
    """A tensor that depends on the checkpoint alone, as an operation received it."""

    value: Tensor
    names: tuple[str, ...]  # stored tensors (or attributes of modules) that it was made of


@dataclass
class Product:
    """y = x·wᵀ + bias. Rows are tokens: x [T, in], w [out, in], bias [out] or None, y [T, out]."""

    order: int
    weight: Weight
    bias: Weight | None
    x: Tensor
    y: Tensor
    storage: int = 0  # address of y's storage while it lived
    positions: Tensor = field(default_factory=lambda: torch.empty(0))  # of y's elements in that storage, [T, out]
    # Addresses identify tensors only as long as nothing else is given the memory: results at `storage`, old and new.
    alive: list[Tensor] = field(default_factory=list)

    def forget_place(self) -> None:
        """Nothing is looked up by the address of y any more."""
        self.storage, self.positions, self.alive = 0, torch.empty(0), []


@dataclass(frozen=True)
class Elementwise:
    """A norm or an elementwise operation between an activation and a vector of weights; tensors are flat copies."""

    order: int
    op: str  # "layer_norm", "rms_norm", "mul", "add"
    weight: Weight | None
    bias: Weight | None
    x: Tensor
    y: Tensor
    eps: float | None = None


class Tape(TorchDispatchMode):
    """Records while active; see the attributes. Tensors are kept as copies, which in-place changes do not reach."""

    def __init__(self, model: nn.Module, inputs_of: Collection[int] | None = None) -> None:
        """inputs_of: keep nothing but the inputs of these products, numbered in order (None: keep everything)."""
        super().__init__()
        self.inputs_of = inputs_of
        self.inputs: dict[int, Tensor] = {}  # product number -> x [T, in]; only if inputs_of was given
        self._nested = 0
        self._count = 0  # products seen; only if inputs_of was given
        self.products: list[Product] = []
        self.elementwise: list[Elementwise] = []
        self.outputs: list[tuple[int, Tensor]] = []  # early floating-point activations, in order
        self.scalars: list[tuple[int, str, float]] = []  # numbers in the code: (order, operation, value)
        self.operations: set[str] = set()
        self.used: set[str] = set()  # names of all weights that an operation combined with an activation
        self.order = 0
        self._owners: dict[int, list[tuple[str, Tensor]]] = {}
        # Addresses identify tensors only as long as nothing else is given the memory.
        self._derived: dict[int, tuple[tuple[str, ...], Tensor]] = {}
        for name, tensor in model_tensors(model):
            if tensor.numel() and tensor.untyped_storage().data_ptr():
                self._owners.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        if not self._nested:  # nothing is looked up by address any more
            for product in self.products[-_FOLLOWED:]:
                product.forget_place()

    def names_of(self, tensor: Tensor) -> tuple[str, ...] | None:
        """Names of the stored tensors that this one depends on, or None if it is an activation."""
        address = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        if address in self._derived:
            return self._derived[address][0]
        owners = self._owners.get(address, ())
        low, high = _extent(tensor)
        return tuple(n for n, t in owners if _extent(t)[0] <= low and high <= _extent(t)[1]) or None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            self._nested += 1
            with self:  # code under inference_mode gets here undecomposed
                result = func.decompose(*args, **kwargs)
            self._nested -= 1
            if result is not NotImplemented:
                return result
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        names = [self.names_of(t) for t in tensors]
        # Inputs are looked at before the call, which may change them in place.
        op = func.name().removeprefix("aten::").split(".")[0].rstrip("_").lstrip("_")
        pending = self._before(op, args, kwargs) if any(names) and not all(names) else None
        sources = [self._product_of(t) for t in tensors] if op in _COPIES else []
        result = func(*args, **kwargs)
        # A sampling profiler makes detach calls come and go from run to run.
        self.order += op not in _UNCOUNTED
        self.operations.add(op)
        for value in args:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.scalars.append((self.order, op, float(value)))
        if isinstance(kwargs.get("scale"), float):
            self.scalars.append((self.order, op, kwargs["scale"]))
        if op == "gelu":
            self.operations.add(f"gelu_{kwargs.get('approximate', 'none')}")
        if func._schema.is_mutable and not all(names):
            self._overwritten(func, args)
        for out in tree_flatten(result)[0]:
            if isinstance(out, Tensor):
                self._after(op, out, tensors, names, sources)
        if pending is not None:
            pending(result)
            self.used.update(n for group in names if group for n in group)
        return result

    def _overwritten(self, func: Any, args: Any) -> None:
        """Tensors of the model that an activation is written into, such as a key/value cache, are no weights."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                address = value.untyped_storage().data_ptr()
                self._owners.pop(address, None)
                self._derived.pop(address, None)

    def _after(
        self,
        op: str,
        out: Tensor,
        tensors: list[Tensor],
        names: list[tuple[str, ...] | None],
        sources: list[tuple[Product, Tensor] | None],
    ) -> None:
        if tensors and all(names):
            if self.names_of(out) is None and out.numel():
                joined = tuple(dict.fromkeys(n for group in names if group for n in group))
                self._derived[out.untyped_storage().data_ptr()] = (joined, out)
        elif sources and sources[0] is not None and out.shape == tensors[0].shape:
            self._follow_copy(*sources[0], out)
        early = self.inputs_of is None and len(self.products) < _KEEP_UNTIL_PRODUCT
        if early and op not in _UNCOUNTED and out.is_floating_point() and 0 < out.numel() <= _MAX_KEPT:
            self.outputs.append((self.order, out.detach().clone()))

    def _before(self, op: str, args: Any, kwargs: Any) -> Callable[[Any], None] | None:
        """What to record of an operation that combines weights and activations, called with its result."""
        if op in ("mm", "addmm", "bmm", "baddbmm", "convolution"):
            return self._product(op, args)
        if self.inputs_of is not None:
            return None
        if op in ("native_layer_norm", "fused_rms_norm", "rms_norm"):
            x = args[0].detach().clone()
            bias = self._weight(args[3]) if op == "native_layer_norm" else None
            eps = args[4] if op == "native_layer_norm" else args[3] if len(args) > 3 else None
            kind = "layer_norm" if op == "native_layer_norm" else "rms_norm"
            return lambda result: self._add_elementwise(kind, self._weight(args[2]), bias, x, _first(result), eps)
        if op in ("mul", "add") and isinstance(args[1], Tensor):
            weight, x = self._weight(args[0]), args[1]
            if weight is None:
                weight, x = self._weight(args[1]), args[0]
            if weight is None or not x.is_floating_point() or not weight.value.is_floating_point():
                return _nothing
            link = self._product_of(x) if op == "add" else None
            x = x.detach().clone()
            if link is not None:
                return lambda result: self._add_bias(*link, weight, result, x)
            return lambda result: self._add_elementwise(op, weight, None, x, result)
        return _nothing

    def _weight(self, tensor: Tensor | None) -> Weight | None:
        if not isinstance(tensor, Tensor):
            return None
        names = self.names_of(tensor)
        return Weight(tensor.detach(), names) if names else None

    def _add_elementwise(
        self, op: str, weight: Weight | None, bias: Weight | None, x: Tensor, y: Tensor, eps: float | None = None
    ) -> None:
        self.elementwise.append(
            Elementwise(self.order, op, weight, bias, x.flatten(), y.detach().flatten().clone(), eps)
        )

    # --- matrix products ---------------------------------------------------------------------------------------------

    def _product(self, op: str, args: Any) -> Callable[[Any], None]:
        """Write each spelling of a product with a weight as y = x·wᵀ + bias."""
        bias = args[0] if op in ("addmm", "baddbmm") else args[2] if op == "convolution" else None
        a, b = args[1:3] if op in ("addmm", "baddbmm") else args[:2]
        if op == "convolution":
            if b.ndim != 3 or b.shape[2] != 1 or a.shape[0] != 1:
                return _nothing
            a, b = a[0].mT, b[:, :, 0].mT
        # With the weight on the left it is (x·wᵀ)ᵀ = w·xᵀ.
        flip = self.names_of(b) is None
        if flip:
            a, b = b.mT, a.mT
        names = self.names_of(b)
        if names is None or self.names_of(a) is not None:
            return _nothing
        if op in ("bmm", "baddbmm"):
            if any(not torch.equal(part, a[0]) for part in a[1:]):
                return _nothing  # an input of its own per head or expert
            a, b = a[0], b.permute(1, 0, 2).reshape(b.shape[1], -1)  # [T, in], [in, heads·e]

        def by_token(out: Tensor) -> Tensor:
            """The operation's result as [T, out]."""
            if op == "convolution":
                return out[0].mT
            out = out.mT if flip else out
            return out.permute(1, 0, 2).flatten(1) if out.ndim == 3 else out

        if self.inputs_of is not None:
            if self._count in self.inputs_of:
                self.inputs[self._count] = a.detach().clone()
            self._count += 1
            return _nothing
        x = a.detach().clone()

        def record(out: Tensor) -> None:
            y = by_token(out.detach()).clone()
            product = Product(self.order, Weight(b.mT.detach(), names), None, x, y)
            product.storage, product.positions = out.untyped_storage().data_ptr(), by_token(_index_like(out))
            product.alive.append(out)
            for old in self.products[-_FOLLOWED : 1 - _FOLLOWED]:
                old.forget_place()
            if isinstance(bias, Tensor):
                laid_out = bias.expand_as(y) if op == "convolution" else by_token(bias.expand_as(out))
                product.bias = self._as_bias(bias, laid_out)
                if product.bias is None:  # something else is added in the same operation, such as the residual
                    product.y = y - laid_out
            self.products.append(product)

        return record

    def _as_bias(self, bias: Tensor, values: Tensor) -> Weight | None:
        """A bias as a vector of the product's outputs; `values` is the bias laid out like y, [T, out]."""
        names = self.names_of(bias)
        if names is None or not bool((values == values[:1]).all()):
            return None
        return Weight(values[0].detach().clone(), names)

    def _product_of(self, tensor: Tensor) -> tuple[Product, Tensor] | None:
        """The recent product whose result this tensor is a view of, and the storage positions of the view."""
        address = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        for product in reversed(self.products[-_FOLLOWED:]):
            if product.storage == address and tensor.numel() == product.y.numel():
                return product, _index_like(tensor)
        return None

    def _follow_copy(self, product: Product, index: Tensor, out: Tensor) -> None:
        place = torch.empty(int(max(index.max(), product.positions.max())) + 1, dtype=torch.int64)
        place[index.flatten()] = _index_like(out).flatten()
        product.positions = place[product.positions]
        product.storage = out.untyped_storage().data_ptr()
        product.alive.append(out)

    def _add_bias(self, product: Product, index: Tensor, weight: Weight, out: Tensor, x: Tensor) -> None:
        """A vector of weights added to a product: its bias, unless it varies from token to token."""
        if out.shape == x.shape and product.bias is None:
            flat = torch.zeros(int(max(index.max(), product.positions.max())) + 1, dtype=out.dtype)
            flat[index.flatten()] = weight.value.expand_as(out).flatten().to(out.dtype)
            bias = flat[product.positions]
            if bool((bias == bias[:1]).all()):
                flat[index.flatten()] = out.detach().flatten()
                product.bias = Weight(bias[0].clone(), weight.names)
                product.y = flat[product.positions]
                self._follow_copy(product, index, out)
                return
        self._add_elementwise("add", weight, None, x, out)


# Operations that move an activation without changing it.
_COPIES = ("clone", "copy", "to_copy", "contiguous")
# Operations that only give a tensor another handle.
_UNCOUNTED = ("detach", "alias", "lift_fresh")


def model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor a model holds: parameters, buffers, then plain attributes, which no file stores."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{key}".lstrip("."), value


def _nothing(result: Any) -> None:
    """An operation of no interest."""


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last element of its storage that a tensor touches."""
    start = int(tensor.storage_offset())
    reach = sum(int((n - 1) * s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n)
    return start, start + reach


def _index_like(tensor: Tensor) -> Tensor:
    """Positions in its storage of a tensor's elements, int64 of its shape."""
    size = _extent(tensor)[1] + 1
    return torch.arange(size).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
