"""Fits the float32 polynomials of csrc/numerics/elementary.inl and reports their error; prints C++ constants.

Least squares on Chebyshev nodes with relative weights in float64, rounded to float32, then checked with the same
sequence of float32 fma operations as the kernels (emulated in float64 and rounded after every step).
"""

import math

import numpy as np


def chebyshev_nodes(low: float, high: float, n: int = 4000) -> np.ndarray:
    k = np.arange(n)
    return 0.5 * (low + high) + 0.5 * (high - low) * np.cos(np.pi * (k + 0.5) / n)


def fit(x: np.ndarray, y: np.ndarray, powers: list[int], weight: np.ndarray) -> np.ndarray:
    """Coefficients (float64) of sum c_i x^powers_i that minimise the weighted squared error."""
    scale = np.abs(x).max()
    a = np.stack([(x / scale) ** p for p in powers], axis=1) * weight[:, None]
    c, *_ = np.linalg.lstsq(a, y * weight, rcond=None)
    return c / np.array([scale**p for p in powers])


def fma(a, b, c):
    """float32 fma: exact product and sum in extended precision, rounded once."""
    return (a.astype(np.longdouble) * np.longdouble(b) + np.asarray(c, np.longdouble)).astype(np.float32)


def horner(x: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """coefficients: highest power first, float32."""
    acc = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        acc = (acc.astype(np.longdouble) * x + np.longdouble(c)).astype(np.float32)
    return acc


def show(name: str, c: np.ndarray) -> None:
    print(f"{name}: " + ", ".join(f"{float(v):.9e}f" for v in c))


def exp_coefficients() -> np.ndarray:
    x = chebyshev_nodes(-0.5 * math.log(2) * 1.001, 0.5 * math.log(2) * 1.001)
    y = (np.exp(x) - 1 - x) / (x * x)
    c = fit(x, y, list(range(6)), x * x)[::-1]
    return np.concatenate([c, [1.0, 1.0]]).astype(np.float32)


def exp32(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    n = np.rint((x * np.float32(1 / math.log(2))).astype(np.float32))
    hi = np.float32(0.693359375)
    lo = np.float32(math.log(2) - 0.693359375)
    r = (x.astype(np.longdouble) - n.astype(np.longdouble) * hi).astype(np.float32)
    r = (r.astype(np.longdouble) - n.astype(np.longdouble) * lo).astype(np.float32)
    return np.ldexp(horner(r, c), n.astype(int)).astype(np.float32)


def main() -> None:
    erf = np.vectorize(math.erf)
    erfc = np.vectorize(math.erfc)

    c = exp_coefficients()
    show("exp", c)
    x = np.linspace(-87, 87, 2_000_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    print("  max relative error", np.max(np.abs(exp32(x, c) / exact - 1)), "(eps = 1.19e-7)")

    split = 1.0
    s = chebyshev_nodes(1e-4, split)
    small = fit(s * s, erf(s) / s, list(range(7)), np.ones_like(s))[::-1].astype(np.float32)
    show("erf small", small)
    x = np.linspace(-split, split, 400_001).astype(np.float32)
    approx = (x * horner((x * x).astype(np.float32), small)).astype(np.float32)
    print("  max absolute error", np.max(np.abs(approx - erf(x.astype(np.float64)))))

    t = chebyshev_nodes(split, 4.0)
    # 1 - exp(p): an absolute error e of p moves erf by erfc(t) e
    large = fit(t, np.log(erfc(t)), list(range(9)), erfc(t) + 1e-7)[::-1].astype(np.float32)
    show("log erfc large", large)
    x = np.linspace(split, 4.5, 400_001).astype(np.float32)
    p = horner(np.minimum(x, np.float32(4.0)), large)
    approx = (np.float32(1) - exp32(p, c)).astype(np.float32)
    print("  max absolute error", np.max(np.abs(approx - erf(x.astype(np.float64)))))


if __name__ == "__main__":
    main()
