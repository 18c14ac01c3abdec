"""Which stored tensor is which: by shape, name and place, without running any code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .source import Source
from .spec import TensorRecipe

_NO_WEIGHT = re.compile(
    r"(^|[._])(inv_freqs?|freqs?(_cis)?|rotary|rope|(cos|sin)(_(cached?|table|emb))?|masked_bias|mask|causal_mask|"
    r"attn_mask|tril|triu|position_ids|positions)([._]|$)"
)


def is_no_weight(name: str, shape: tuple[int, ...], values: NDArray[Any] | None) -> bool:
    """Whether a tensor is a mask, a table of positions or the like, by its name or (if given) its values."""
    if _NO_WEIGHT.search(name):
        return True
    if values is None or len(shape) < 2 or shape[-1] != shape[-2] or values.size != shape[-1] ** 2 or shape[-1] < 2:
        return False
    square = values.reshape(shape[-2:])
    below, above = np.tril(np.ones(square.shape, bool)), np.triu(np.ones(square.shape, bool), 1)
    return len(np.unique(square[below])) == 1 and len(np.unique(square[above])) == 1


def leftovers_error(source: Source, names: Iterable[str], why: str) -> CheckpointError:
    listed = "; ".join(f"{n} {source.tensors[n].shape}" for n in names)
    return CheckpointError(
        f"tensors without a place in the model ({why}): {listed}. Give them one with --map, or none with a line 'NAME = ignore'"
    )


def mapped_recipes(
    source: Source, map_file: str | os.PathLike[str] | None, known: Iterable[str]
) -> dict[str, TensorRecipe]:
    return {}
