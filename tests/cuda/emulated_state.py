"""What the emulated GPU says of itself and is told: the variables of tests/cuda/emulated_device.cpp."""

import ctypes
from typing import NamedTuple

from fixmin_cpp import _core

_LIBRARY = ctypes.CDLL(_core.__file__)


def _variable(name: str) -> ctypes.c_long:
    return ctypes.c_long.in_dll(_LIBRARY, "emulated_" + name)


class Held(NamedTuple):
    """What of a GPU is not given back."""

    bytes: int
    allocations: int
    recordings: int
    devices: int


def held() -> Held:
    return Held(*(_variable(name).value for name in Held._fields))


NOTHING = Held(0, 0, 0, 0)


def fail_allocation(number: int) -> None:
    """The allocation of this number from now, from 1, finds no memory; 0: none."""
    _variable("fail_allocation").value = number


def fail_launch(number: int) -> None:
    """The GPU fails for good at this launch from now, from 1; 0: none."""
    _variable("fail_launch").value = number


def count_weights() -> None:
    """Counts from now on what products of few tokens read of weights."""
    _LIBRARY.emulated_count_weights()


def weight_bytes() -> int:
    """What has been counted: whole sectors of 32 bytes, those that a block of threads reads again once."""
    _LIBRARY.emulated_weight_bytes.restype = ctypes.c_size_t
    return _LIBRARY.emulated_weight_bytes()


def launches(kernel: str, wide: bool = False) -> int:
    """How often this process has launched a kernel (csrc/cuda/kernel_list.h), with narrow or with wide tiles."""
    return _LIBRARY.emulated_launches(kernel.encode(), int(wide))
