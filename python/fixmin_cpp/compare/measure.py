"""Perplexity by windows, and speed in turns."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..benchmark import timed_turn
from ..errors import ArgumentError, FixminError
from ..evaluate import losses_of, windows
from ..model import Model
from .results import Speed, TextScore
from .store import Store

__all__ = ["measure_speed", "score_text"]

_WINDOWS_AT_A_TIME = 4  # scored together
_SAVE_SECONDS = 20.0  # of work that a killed run loses at most


def score_text(
    model: Model,
    text: str,
    ctx: int,
    max_windows: int | None,
    store: Store,
    key: dict[str, Any],
    tell: Callable[[str], None],
) -> TextScore:
    """Scores a text in windows of ctx tokens that do not overlap; goes on where an earlier run was ended.

    Raises:
        ArgumentError: the text has fewer tokens than two windows: there is no error without a second one.
        FixminError: log-probabilities that are not finite.
    """
    ids = model.token_ids(text)
    parts = windows(len(ids), ctx, ctx)[:max_windows]
    if len(ids) <= ctx + 1:
        raise ArgumentError(
            f"the text has {len(ids)} tokens of {model.path}: an error bar takes at least two windows of {ctx}; give a "
            "longer text or a smaller ctx"
        )
    saved = store.load("text", key) or {"window_nll": []}
    losses: list[float] = saved["window_nll"][: len(parts)]
    last = time.monotonic()
    try:
        while len(losses) < len(parts):
            some = parts[len(losses) : len(losses) + _WINDOWS_AT_A_TIME]
            scores = model.score([ids[part.begin : part.end] for part in some])
            try:
                losses += [float(losses_of(score).sum()) for score in scores]
            except FixminError as error:
                raise FixminError(f"{model.path}: {error}") from None
            if time.monotonic() - last > _SAVE_SECONDS:
                store.save("text", key, {"window_nll": losses})
                tell(f"{model.path}: {len(losses)} of {len(parts)} windows")
                last = time.monotonic()
    finally:  # also at Ctrl-C and SIGTERM
        store.save("text", key, {"window_nll": losses})
    sizes = _bytes_of(model, ids, text)
    result = TextScore(
        ctx=ctx,
        n_tokens=len(ids),
        ids_sha256=hashlib.sha256(ids.tobytes()).hexdigest(),
        window_nll=losses,
        window_tokens=[part.end - part.scored for part in parts],
        window_bytes=[float(sizes[part.scored : part.end].sum()) for part in parts],
    )
    store.save("text", key, asdict(result))
    return result


def _bytes_of(model: Model, ids: NDArray[np.uint32], text: str) -> NDArray[np.float64]:
    """How many bytes of the text each token stands for, [T].

    Where a tokenizer changes the text (a normaliser, unknown characters), its tokens' own bytes are scaled so that they
    add up to the text's.
    """
    tokenizer = model.require_tokenizer()
    found, place = np.unique(ids, return_inverse=True)
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in found.tolist()], np.float64)[place]
    scaled: NDArray[np.float64] = sizes * (len(text.encode()) / max(sizes.sum(), 1.0))
    return scaled


def measure_speed(
    models: Sequence[Model],
    *,
    n_prompt: int | None = None,
    n_generate: int | None = None,
    repeat: int = 5,
    tell: Callable[[str], None],
) -> list[Speed]:
    """Prefill and decode of all models in turns A B C A B C ..., so that a slow phase of the machine hits all.

    Args:
        models: all loaded; the same random ids for each.
        n_prompt: tokens of a prefill; None: 512, or what fits the shortest context. n_generate: tokens decoded one by
            one after a single one; None: 64, or what fits.
        repeat: turns that count, after one that warms up.

    Raises:
        ArgumentError: a number does not fit the shortest context.
    """
    context = min(model.n_ctx for model in models)
    n_prompt = min(512, context) if n_prompt is None else n_prompt
    n_generate = min(64, context - 2) if n_generate is None else n_generate
    if not 1 <= n_prompt <= context or not 1 <= n_generate <= context - 2:
        raise ArgumentError(
            f"{n_prompt} tokens of a prompt and {n_generate} to generate do not fit the context of {context}"
        )
    vocab_size = min(model.vocab_size for model in models)
    ids = np.random.default_rng(0).integers(0, vocab_size, n_prompt).astype(np.uint32)
    runs: list[list[tuple[float, float]]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(model.native()) for model in models]
        for i in range(repeat + 1):
            tell(f"speed: turn {i} of {repeat}" if i else "speed: warm-up")
            for engine, run in zip(engines, runs, strict=True):
                run.append(timed_turn(engine, ids, ids[:1], n_generate))
    speeds = []
    for run in runs:
        prefills, decodes = ([float(one) for one in each] for each in zip(*run[1:], strict=True))
        speeds.append(
            Speed(n_prompt, n_generate, float(np.median(prefills)), prefills, float(np.median(decodes)), decodes)
        )
    return speeds
