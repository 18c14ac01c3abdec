"""Hold a model in PyTorch without holding its weights in memory.

`Unwritten` lets a constructor run without writing the large parameters that it initialises at random; `map_weights`
then puts the checkpoint's file in their place, mapped, and has the pages of every module dropped when its forward
returns. What a model computes stays the same; the weights of a 1.9 GB checkpoint take the 0.3 GB of its largest module.
"""

import contextlib
import ctypes
import gc
import mmap
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ..checkpoint.source import Source

# Elements from which on a parameter is worth it: 4 MB of float32.
_LARGE = 1 << 20
# glibc keeps freed pieces of up to this many bytes, and returns larger ones to the system.
_KEPT = 1 << 25
# Uses of a storage of which one tensor is the only owner: the tensor, and the Python object that asks.
_SOLE_USES = 2


class InitialValuesUsed(BaseException):
    """Something read what `Unwritten` did not write; no `except Exception` of the checkpoint's code may catch it."""


class Unwritten(TorchDispatchMode):
    """While active, large tensors filled at random stay unwritten, and what changes them in place does nothing.

    The random numbers are drawn all the same, so that whatever the constructor draws afterwards is what it would be.
    Reading such a tensor raises InitialValuesUsed. Only what a file replaces may be left like this: see `alive`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[int, Tensor] = {}  # address of the storage -> the tensor, kept so that none reuses it
        self._kept: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args and isinstance(args[0], Tensor) else None
        schema = func._schema
        target = target if _writes_only_first(schema) else None
        others = tree_flatten((args if target is None else args[1:], kwargs))[0]
        if any(self._holds(t) for t in others) and not _is_view(schema):
            raise InitialValuesUsed(func.name())
        if target is None:
            return func(*args, **kwargs)
        random = any(a.name == "generator" for a in schema.arguments)
        if not self._holds(target):
            if func.name() not in ("aten::normal_", "aten::uniform_") or not _is_large(target):
                return func(*args, **kwargs)
            self._tensors[_address(target)] = target.detach()
        if random:
            func(self._scratch(target), *args[1:], **kwargs)
        return target

    def _scratch(self, like: Tensor) -> Tensor:
        """Memory to draw into, of the shape and type of `like`.

        Small ones are pieces of one that is kept: freed, the allocator would hand its pages, written by then, to the
        next parameter.
        """
        if like.nbytes > _KEPT:
            return torch.empty_like(like)
        if self._kept is None:
            self._kept = torch.empty(_KEPT, dtype=torch.uint8)
        return self._kept[: like.nbytes].view(like.dtype).view(like.shape)

    def alive(self) -> set[int]:
        """Addresses of the unwritten storages that something outside still holds. Call it once, at the end."""
        addresses = set()
        while self._tensors:
            address, tensor = self._tensors.popitem()
            if _uses(tensor) > _SOLE_USES:
                addresses.add(address)
        return addresses

    def _holds(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == "cpu" and _address(value) in self._tensors


def map_weights(model: nn.Module, source: Source, file_name: Mapping[str, str]) -> set[str]:
    """Replace large float32 parameters by the tensors of the file, mapped. Returns their names in the model.

    file_name: name in the model -> name in the file, shapes checked. Left alone, for the caller to copy: tensors of
    other types and of .bin files, and parameters whose memory something else uses as well.
    """
    mapped: dict[str, Tensor] = {}
    done: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored = source.tensors.get(file_name.get(name, ""))
        if stored is None or stored.dtype != "F32" or stored.offset < 0 or parameter.dtype != torch.float32:
            continue
        if id(parameter) not in done:
            if not _is_large(parameter) or _uses(parameter) > _SOLE_USES:
                continue
            parameter.data = torch.from_numpy(source.map_private(stored.name))
            done.add(id(parameter))
        mapped[name] = parameter
    if mapped and _madvise is not None:
        _drop_after_use(model, {id(p): (p.data_ptr(), p.nbytes, p._version) for p in mapped.values()}, _madvise)
    return set(mapped)


def _drop_after_use(
    model: nn.Module, places: Mapping[int, tuple[int, int, int]], dont_need: Callable[[int, int], object]
) -> None:
    """Have every module drop the pages of its mapped parameters after its forward. places: address, bytes, version."""

    def drop(module: nn.Module, args: Any, output: Any) -> None:
        dropped = 0
        for parameter in module.parameters():
            address, size, version = places.get(id(parameter), (0, 0, 0))
            # What the code has written to its weights exists nowhere else.
            if size and parameter.data_ptr() == address and parameter._version == version:
                first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
                dont_need(first, last - first)
                dropped += last - first
        if dropped > _KEPT:  # a block, not each of its parts
            give_back(cycles=False)

    for module in model.modules():
        if any(id(p) in places for p in module.parameters()):
            with contextlib.suppress(RuntimeError):  # modules compiled by TorchScript may take no hooks
                module.register_forward_hook(drop)


def give_back(cycles: bool = True) -> None:
    """Return free memory to the system, with `cycles` after collecting what only cycles hold (modules that know their
    parents). Large activations leave glibc with a GB of holes between what is still in use."""
    if cycles:
        gc.collect()
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


def _libc(name: str) -> Any:
    """A function of the C library, or None."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform != "win32" else None


def _dont_need() -> Callable[[int, int], object] | None:
    """madvise(address, bytes, MADV_DONTNEED), or None where it does not exist."""
    function = _libc("madvise")
    if function is None or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda address, size: function(address, size, mmap.MADV_DONTNEED)


_madvise = _dont_need()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _uses(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


def _is_large(tensor: Tensor) -> bool:
    """Whether a tensor is large and all of its storage."""
    if tensor.device.type != "cpu" or tensor.numel() < _LARGE or not tensor.is_contiguous():
        return False
    return tensor.nbytes == tensor.untyped_storage().nbytes()


def _writes_only_first(schema: Any) -> bool:
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    return bool(written) and written[0] and not any(written[1:])


def _is_view(schema: Any) -> bool:
    return all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
