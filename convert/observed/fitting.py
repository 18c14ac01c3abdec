"""Small numerical helpers of the readers of recordings."""

import math
from collections.abc import Callable

from torch import Tensor


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; infinite if either is not finite."""
    value = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return value if math.isfinite(value) else math.inf


def minimum(function: Callable[[float], float], low: float, high: float, steps: int = 48) -> float:
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


def rounded(value: float, error: Callable[[float], float]) -> float:
    """The roundest number that fits as well as a fitted one."""
    limit = 1.5 * error(value) + 5e-7
    for digits in range(1, 8):
        short = float(f"{value:.{digits - 1}e}")
        if error(short) <= limit:
            return short
    return value


def nice(value: float) -> float:
    """A base computed from float32 frequencies, rounded if it is within their rounding of a short number."""
    for digits in range(1, 6):
        short = float(f"{value:.{digits - 1}e}")
        if abs(short / value - 1) < 2e-6:
            return short
    return value
