"""Hold a resolved model against the checkpoint's own code over its whole context, block by block."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import CheckpointError
from ...reference.modeling_fixmin import causal_mask, rope_tables
from ..spec import ModelSpec
from ..streaming import embed, load_block, load_output_norm, project, reference_config
from .memory import give_back
from .probe import OwnModel

# Relative to the largest element. Checkpoints compute rotary angles in float32, which at position 1000 are off by 3e-5
# and grow by the attention scores; a wrong convention is off by more than one percent at such lengths.
TOLERANCE = 2e-3
_LOGIT_ROWS = 64
_LONGEST = 1024  # tokens; what only longer prompts would show is not seen


def normed_inputs(spec: ModelSpec, ids: NDArray[Any]) -> Iterator[Tensor]:
    """Inputs of the attention of every block, then of the output projection, float32 [T, D] each, by reference/."""
    config = reference_config(spec)
    x = embed(spec, ids)[None]
    tables = rope_tables(torch.arange(len(ids))[None], config)
    mask = causal_mask(len(ids), 0, None, x)
    for layer in range(spec.block_count):
        block = load_block(spec, config, layer)
        yield block.attn_norm(x)[0]
        x = block(x, *tables, mask, None)
        give_back(cycles=False)
    yield load_output_norm(spec, config)(x)[0]


@torch.no_grad()
def confirm(spec: ModelSpec, own: OwnModel, numbers: Sequence[int]) -> tuple[float, int]:
    """(largest relative difference, tokens) on a prompt as long as the context, at most 1024 tokens.

    numbers: `Interpretation.input_numbers()`.

    Raises CheckpointError naming the first block whose result differs: windows shorter than the context and positions
    that are treated differently far out do not show in the short prompts that conventions are read from.
    """
    length = min(spec.context_length, _LONGEST)
    ids = np.random.default_rng(1).integers(0, spec.vocab_size, length)
    tape, logits = own.trace(ids, inputs_of=numbers)
    # The inputs of the output projection are compared at every position, its results at some.
    kept = np.unique(np.linspace(0, len(logits) - 1, _LOGIT_ROWS).astype(int)) - len(logits)
    logits = logits[kept]
    give_back()
    worst, last = 0.0, torch.empty(0)
    for i, x in enumerate(normed_inputs(spec, ids)):
        seen = tape.inputs.pop(numbers[i])
        x = x[-len(seen) :]
        error = float((x - seen).abs().max() / seen.abs().max())
        worst, last = max(worst, error), x
        if not error <= TOLERANCE:
            where = "embedding" if i == 0 else f"block {i - 1}"
            raise CheckpointError(
                f"{where}: what it computes for a prompt of {length} tokens differs from what the short prompts show "
                f"(an attention window shorter than the context, positions scaled with the length?); relative "
                f"difference {error:.2g}"
            )
    computed = torch.from_numpy(project(spec, [last[kept]])[0])
    error = float((computed - logits).abs().max() / logits.abs().max())
    if not error <= TOLERANCE:
        raise CheckpointError(
            f"output: the logits differ on a prompt of {length} tokens; relative difference {error:.2g}"
        )
    return max(worst, error), length
