"""Tensors of the files as recipes: rows taken, stacked and reordered when they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from ..spec import F32, TensorRecipe
from .source import FLOATS, Source


@dataclass(frozen=True)
class Ref:
    """A matrix or vector as rows of numbers in the files: `rows(index)` reads rows start..stop or an index array."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    rows: Callable[[slice | NDArray[np.int64]], F32]
    dtype: str = "F32"  # of what is stored, safetensors spelling


def stored_ref(
    source: Source, name: str, shape: tuple[int, ...], view: Callable[[NDArray[Any]], NDArray[Any]] = lambda a: a
) -> Ref:
    """Rows of `view` of a stored tensor."""
    dtype = source.tensors[name].dtype
    return Ref(shape, (name,), lambda index: source.read(name, lambda stored: view(stored)[index]), dtype)


def constant(shape: tuple[int, ...], value: float) -> TensorRecipe:
    """A tensor that the checkpoint does not store because all its elements are the same."""
    return TensorRecipe(shape, (), lambda start, stop: np.full((stop - start, *shape[1:]), value, np.float32))


def gather(
    parts: Sequence[Ref],
    rows: NDArray[np.int64] | None = None,
    columns: NDArray[np.int64] | None = None,
    factor: float = 1.0,
) -> TensorRecipe:
    """Rows `rows`, in this order (None: all), of the parts laid one below the other; columns reordered.

    CheckpointError for a row that no part has, parts that do not fit together, and integers in the place of weights.
    """
    shapes = ", ".join(f"{' + '.join(p.sources) or 'zeros'} {p.shape}" for p in parts)
    if any(not p.shape or p.shape[1:] != parts[0].shape[1:] for p in parts):
        raise CheckpointError(f"tensors that cannot lie one below the other: {shapes}")
    starts = np.cumsum([0, *(p.shape[0] for p in parts)])
    rows = np.arange(starts[-1]) if rows is None else np.asarray(rows, dtype=np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < starts[-1]:
        raise CheckpointError(f"rows {rows.min()} to {rows.max()} are needed of {shapes}")
    shape = (len(rows), *parts[0].shape[1:])
    used = [p for p, a, b in zip(parts, starts[:-1], starts[1:], strict=True) if ((rows >= a) & (rows < b)).any()]
    sources = tuple(dict.fromkeys(s for p in used for s in p.sources))
    if odd := [p for p in used if p.dtype not in FLOATS]:
        kind = "complex weights" if odd[0].dtype == "C64" else "quantised checkpoints"
        raise CheckpointError(
            f"tensor {odd[0].sources[0]} {odd[0].shape} holds weights of type {odd[0].dtype}: {kind} are not read, "
            "convert the original weights"
        )

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
