"""Where the files hold a weight that an operation was seen to use, and how to read the same numbers from them."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint.recipes import Ref, stored_ref
from .probe import OwnModel
from .tape import Weight, model_tensors


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
                return lambda stored: stored.transpose(axes).reshape(shape)
        return None
