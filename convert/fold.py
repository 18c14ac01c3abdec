"""The bias of the output projection, folded into the final LayerNorm and the matrix.

What a LayerNorm scales, z, has the sum 0. So along 1/p, for any p without zeros, every row of the matrix may move:

    W·(g∘z + β) + b  =  W'·(p∘z + s·p)      W' = W∘(g/p) + d·(1/p)ᵀ
    W'·(p∘z)   =  W·(g∘z) + d·Σz            the last term is 0
    W'·(s·p)   =  s·W·g + s·D·d             which is W·β + b for  d = (W·β + b - s·W·g)/(s·D)

exact in real arithmetic, for every s. The new gain is p, the new bias of the norm s·p, and the matrix's bias is gone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

# A larger s adds the rounding errors of a quantised W' to every logit, a smaller one makes d, which is rounded with W',
# large beside W. The error of logits in Q8_0 and Q4_0 is flat from 0.2 to 0.5: 4 to 6 % above that of an exact bias.
SHIFT = 0.3


@dataclass(frozen=True)
class Fold:
    """Of one model. gain g, norm_bias β: [D]; new_gain p, new_bias s·p: [D], all float64 but exactly float32."""

    gain: NDArray[np.float64]
    norm_bias: NDArray[np.float64]
    new_gain: NDArray[np.float64]
    new_bias: NDArray[np.float64]

    @classmethod
    def of(cls, gain: F32, norm_bias: F32, shift: float = SHIFT) -> "Fold":
        """For the gain and the bias [D] of the last LayerNorm."""
        g = gain.astype(np.float64)
        # |g|, so that W' has the magnitude of W, but kept off zero, where d/p would burst.
        p = np.maximum(np.abs(g), np.median(np.abs(g)) / 4)
        p[p == 0] = 1
        p = p.astype(np.float32)
        # The file holds float32: what W' is computed for must be what is stored.
        moved = (np.float32(shift) * p).astype(np.float32)
        return cls(g, norm_bias.astype(np.float64), p.astype(np.float64), moved.astype(np.float64))

    def rows(self, matrix: F32, bias: F32) -> F32:
        """Rows of W [n, D] and their biases [n] -> rows of W' [n, D]. Computed in float64."""
        W = matrix.astype(np.float64)
        d = (W @ self.norm_bias + bias - W @ (self.gain / self.new_gain * self.new_bias)) / np.sum(
            self.new_bias / self.new_gain
        )
        return (W * (self.gain / self.new_gain) + d[:, None] / self.new_gain).astype(np.float32)
