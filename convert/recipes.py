"""Turn a weight that an operation was seen to use into a recipe that reads the same numbers from the files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .probe import OwnModel
from .source import Source
from .spec import F32, TensorRecipe
from .trace import Weight, model_tensors


@dataclass(frozen=True)
class Ref:
    """A matrix or vector as rows of numbers in the files: `rows(index)` reads rows start..stop or an index array."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    rows: Callable[[slice | NDArray[np.int64]], F32]


class Locator:
    """Finds weights of a running model in its checkpoint's files."""

    def __init__(self, own: OwnModel) -> None:
        self.source = own.source
        self.file_name = own.file_name
        self.tensors = dict(model_tensors(own.model))
        self.computed: list[str] = []  # weights that no file holds as they are used

    def locate(self, weight: Weight) -> Ref:
        """Where the values are: a view of one stored tensor, one with its axes permuted, or computed by the code."""
        names = sorted(weight.names, key=lambda n: n not in self.file_name)
        for name in names:
            if name in self.file_name:
                view = self._strided(weight.value, name) or self._rearranged(weight.value, name)
                if view is not None:
                    return stored_ref(self.source, self.file_name[name], tuple(weight.value.shape), view)
        values = weight.value.float().numpy().copy()
        self.computed.append("+".join(names))
        sources = tuple(self.file_name[n] for n in names if n in self.file_name)
        return Ref(values.shape, sources, lambda index: values[index])

    def _strided(self, value: Tensor, name: str) -> Callable[[NDArray[Any]], NDArray[Any]] | None:
        """The view of the stored tensor that shares memory with `value`."""
        base = self.tensors[name]
        if not base.is_contiguous() or base.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
            return None
        shape, stride = tuple(value.shape), tuple(value.stride())
        offset = value.storage_offset() - base.storage_offset()

        def view(stored: NDArray[Any]) -> NDArray[Any]:
            flat = stored.reshape(-1)[offset:]
            strides = tuple(s * flat.itemsize for s in stride)
            return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)

        return view

    def _rearranged(self, value: Tensor, name: str) -> Callable[[NDArray[Any]], NDArray[Any]] | None:
        """The stored tensor with its axes in another order and reshaped, if that gives `value` exactly."""
        base = self.tensors[name]
        if base.numel() != value.numel() or base.ndim > 4:
            return None
        shape = tuple(value.shape)
        for axes in itertools.permutations(range(base.ndim)):
            moved = base.permute(axes).reshape(shape)
            if torch.equal(moved, value):
                return lambda stored, axes=axes: stored.transpose(axes).reshape(shape)
        return None


def stored_ref(
    source: Source, name: str, shape: tuple[int, ...], view: Callable[[NDArray[Any]], NDArray[Any]] = lambda a: a
) -> Ref:
    """Rows of `view` of a stored tensor."""
    return Ref(shape, (name,), lambda index: source.read(name, lambda stored: view(stored)[index]))


def constant(shape: tuple[int, ...], value: float) -> TensorRecipe:
    """A tensor that the checkpoint does not store because all its elements are the same."""
    return TensorRecipe(shape, (), lambda start, stop: np.full((stop - start, *shape[1:]), value, np.float32))


def gather(
    parts: Sequence[Ref],
    rows: NDArray[np.int64] | None = None,
    columns: NDArray[np.int64] | None = None,
    factor: float = 1.0,
) -> TensorRecipe:
    """Rows `rows`, in this order (None: all), of the parts laid one below the other; columns reordered."""
    starts = np.cumsum([0, *(p.shape[0] for p in parts)])
    rows = np.arange(starts[-1]) if rows is None else np.asarray(rows, dtype=np.int64)
    shape = (len(rows), *parts[0].shape[1:])
    used = [p for p, a, b in zip(parts, starts[:-1], starts[1:], strict=True) if ((rows >= a) & (rows < b)).any()]
    sources = tuple(dict.fromkeys(s for p in used for s in p.sources))

    def read(start: int, stop: int) -> F32:
        wanted = rows[start:stop]
        out = np.empty((stop - start, *shape[1:]), np.float32)
        for part, low, high in zip(parts, starts[:-1], starts[1:], strict=True):
            here = np.flatnonzero((wanted >= low) & (wanted < high))
            if len(here):
                index = wanted[here] - low
                run = len(index) == index[-1] - index[0] + 1 and bool((np.diff(index) == 1).all())
                out[here] = part.rows(slice(int(index[0]), int(index[-1]) + 1) if run else index)
        out = out if columns is None else out[:, columns]
        return out if factor == 1.0 else out * np.float32(factor)

    return TensorRecipe(shape, sources, read)
