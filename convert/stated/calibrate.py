"""Settle what the files leave open by the model's own loss on a text."""

import itertools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError
from ...evaluate import negative_log_probabilities
from ..checkpoint.source import Source
from .files import Files, Item, State

# A calibration decides if the alternative costs this much more, in nats per token and in standard errors.
_MARGIN, _SIGMAS = 0.01, 4.0
# Random logits cost log V. A file with right conventions and trained weights is far below.
_SENSIBLE = 0.8
_WINDOW, _WINDOWS = 128, 8  # tokens, windows of the final comparison
_ROUNDS = 8  # over all items, one at a time; it ends when nothing changes
# Combinations that are tried: at most this many, and at most so many weights are read for them. 470 million weights
# take four seconds, so the published checkpoints get a quarter of an hour.
_JOINT, _JOINT_WEIGHTS = 1024, 10**11


class Losses:
    """Per-token losses of the model on a text, for any choice of items; computed by reference/, one block at a time."""

    def __init__(self, source: Source, files: Files, path: str | os.PathLike[str], context: int) -> None:
        tokenizer = source.tokenizer()
        if tokenizer is None:
            raise CheckpointError("--calibrate needs the checkpoint's tokenizer.json")
        try:
            data = sys.stdin.buffer.read() if str(path) == "-" and sys.stdin else Path(path).read_bytes()
            text = data.decode()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--calibrate {path}: {error}") from None
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        size = min(_WINDOW, context)
        if len(ids) < 2 * size:
            raise CheckpointError(f"--calibrate {path}: {len(ids)} tokens; at least {2 * size} are needed")
        if ids.max() >= files.vocab_size:
            raise CheckpointError(f"tokenizer.json gives id {ids.max()}, the model has {files.vocab_size}")
        count = min(_WINDOWS, len(ids) // size)
        starts = np.linspace(0, len(ids) - size, count).astype(int)
        # The most varied one first: repetitions are predicted well by wrong models too.
        self.windows = sorted((ids[s : s + size] for s in starts), key=lambda window: -len(np.unique(window)))
        self.files = files
        self._known: dict[tuple[Any, ...], NDArray[np.float64]] = {}

    def of(self, state: State, windows: int) -> NDArray[np.float64]:
        """Losses in nats of the predicted tokens of the first windows."""
        from ..streaming import reference_logits

        key = (windows, *((k, v if isinstance(v, (str, int, float, tuple)) else id(v)) for k, v in state.items()))
        if key not in self._known:
            prompts = self.windows[:windows]
            losses = []
            for ids, logits in zip(prompts, reference_logits(self.files.spec(state), prompts), strict=True):
                losses.append(negative_log_probabilities(logits[:-1], ids[1:]))
            self._known[key] = np.nan_to_num(np.concatenate(losses), nan=1e9, posinf=1e9)
        return self._known[key]


def choose(
    items: list[Item], state: State, origins: dict[str, str], losses: Losses, tell: Callable[[str], None]
) -> dict[str, str]:
    """Choose the values of open items by loss; fills state and origins. Returns item -> why undecided.

    All combinations of as many items as is affordable on one window, since one wrong convention hides the others; then,
    on all windows, one item at a time until none gets better.
    """
    movable = [i for i in items if i.origin is None]
    # Wrong ones of these cost little and hide nothing.
    soft = ("norm_eps", "rope_base", "rope_dim", "activation", "attention_scale")
    spec = losses.files.spec(state)
    affordable = min(_JOINT, _JOINT_WEIGHTS // sum(math.prod(t.shape) for t in spec.tensors.values()))
    tell(f"calibrating {', '.join(i.name for i in movable)} on {sum(map(len, losses.windows))} tokens")
    joint: list[Item] = []
    for item in movable:
        if item.name not in soft and math.prod(len(i.options) for i in [*joint, item]) <= affordable:
            joint.append(item)
    combos = itertools.product(*(range(len(i.options)) for i in joint))
    states = [state | {i.name: i.options[n][1] for i, n in zip(joint, combo, strict=True)} for combo in combos]
    best_state = min(states, key=lambda s: losses.of(s, 1).mean())
    state.update(best_state)
    for windows in (1, *[len(losses.windows)] * _ROUNDS):
        before = dict(state)
        for item in movable:
            tries = [state | {item.name: value} for _, value in item.options]
            best_state = min(tries, key=lambda s: losses.of(s, windows).mean())
            state.update(best_state)
        if windows == len(losses.windows) and all(state[i.name] is before[i.name] for i in movable):
            break
    windows = len(losses.windows)
    best = losses.of(state, windows)
    uniform = math.log(losses.files.vocab_size)
    if best.mean() > _SENSIBLE * uniform:
        raise CheckpointError(
            f"calibration: with the best conventions the loss is {best.mean():.3f} nats per token, and {uniform:.3f} "
            "is guessing: the conventions tried do not contain the right ones (recoded ids, another layout?), or the "
            "text is unlike what the model was trained on"
        )
    undecided: dict[str, str] = {}
    for item in movable:
        others = []
        for label, value in item.options:
            if value is not state[item.name] and value != state[item.name]:
                extra = losses.of(state | {item.name: value}, windows) - best
                others.append(
                    (float(extra.mean()), float(extra.mean() / (extra.std() / len(extra) ** 0.5 + 1e-12)), label)
                )
        if not others:
            origins[item.name] = f"only possibility; loss {best.mean():.4g} nats per token"
            continue
        margin, sigmas, label = min(others)
        text = f"calibration: {best.mean():.4g} nats per token, {label} {margin:+.3g} ({sigmas:.1f} standard errors)"
        origins[item.name] = text
        if margin < _MARGIN or sigmas < _SIGMAS:
            undecided[item.name] = text
    return undecided
