"""How well a model predicts a text, and how far one model's predictions are from another's (`fixmin perplexity`)."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import MAX_INT32, Prompt, as_int
from .atomic_file import AtomicFile, refuse_inputs
from .errors import ArgumentError, ArgumentTypeError, FixminError
from .model import Model, Score

__all__ = ["Divergence", "Perplexity", "perplexity"]

_ROWS = 32  # rows of log-probabilities in float64 at a time: 16 MiB for 65,536 tokens
_DELTA_QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
_KL_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class Divergence:
    """How far a model is from a base, over the scored tokens; `*_error` are standard errors of the mean.

    p is the probability of the token that the text has; Δp = p - p of the base. Quantiles have keys such as "99.9".
    """

    base_nll: float
    base_perplexity: float
    perplexity_ratio: float  # perplexity / base_perplexity
    kl_mean: float  # KL(base || model), nats per token
    kl_error: float
    kl_quantiles: dict[str, float]
    top1: float  # share of tokens whose most probable successor is the same
    top1_error: float
    delta_p_mean: float
    delta_p_error: float
    delta_p_rms: float
    delta_p_quantiles: dict[str, float]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text; nats, `*_error` are one standard error."""

    n_tokens: int  # tokens of the text
    n_scored: int  # tokens that were predicted
    n_windows: int
    ctx: int
    stride: int
    nll: float  # mean of -log p over the scored tokens
    nll_error: float
    perplexity: float  # exp(nll)
    perplexity_error: float  # perplexity * nll_error
    tok_s: float  # tokens that went through the model per second, the base not counted
    divergence: Divergence | None  # with a base


@dataclass(frozen=True)
class Window:
    """A part of the text that is read from an empty context: ids[begin:end]; those from `scored` on are predicted."""

    begin: int
    end: int
    scored: int

    @property
    def rows(self) -> slice:
        """The rows of the window's logits that predict its scored tokens."""
        return slice(self.scored - 1 - self.begin, self.end - 1 - self.begin)


def windows(n_tokens: int, ctx: int, stride: int) -> list[Window]:
    """Windows of ctx tokens, one every `stride`, that score every token but the first of the text at most once.

    With stride == ctx the first token of each window has no context and is not scored.
    """
    found, scored_until = [], 0
    for begin in range(0, n_tokens, stride):
        end, scored = min(begin + ctx, n_tokens), max(begin + 1, scored_until)
        if scored >= end:
            break
        found.append(Window(begin, end, scored))
        scored_until = end
    return found


def perplexity(
    model: Model | str | os.PathLike[str],
    text: Prompt,
    *,
    ctx: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    base: Model | str | os.PathLike[str] | None = None,
    save_logits: str | os.PathLike[str] | None = None,
    base_logits: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a text, and with a base the divergence from it.

    The text is cut into windows of `ctx` tokens, each read from an empty context. With the default stride (= ctx)
    they do not overlap and every token of a window but its first is scored. A smaller stride repeats ctx - stride
    tokens as context and scores only those that no earlier window has scored (as in Hugging Face's guide to perplexity;
    stride = ctx/2 is close to what llama-perplexity does).

    Args:
        model: a Model, or a GGUF file that is loaded for the call.
        text: text or token ids (a list or an integer array [T]), at least 2 tokens; no start token is added.
        ctx: tokens of a window, 2 to the model's context; None: all of that.
        stride: tokens from the beginning of a window to that of the next, 1 to ctx; None: ctx.
        max_windows: stop after so many; None: the whole text.
        base: another Model or file of the same vocabulary, run side by side on the same windows: KL divergence, Δp,
            agreement. Costs no disk; two windows' logits of ctx x V float32 are in memory.
        save_logits: write the logits of the scored tokens to this file, 4 V bytes for each: 262 KB for 65,536 tokens.
        base_logits: such a file, of another model for the same text, ctx and stride, instead of `base`.
        progress: called with windows done and windows in all.

    Returns:
        A Perplexity.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is out of range, the text too short, the base of another
            vocabulary, base_logits made for another text or other windows.
        FixminError: logits that are not finite. OSError, GGUFError: as Model.
    """
    if base is not None and base_logits is not None:
        raise ArgumentError("give base or base_logits, not both")
    with ExitStack() as stack:
        model = _open(stack, "model", model)
        base_model = None if base is None else _open(stack, "base", base)
        n_ctx, vocab_size = model.info["n_ctx"], model.info["vocab_size"]
        if base_model is not None:
            if base_model.info["vocab_size"] != vocab_size:
                raise ArgumentError(
                    f"the vocabularies differ: base has {base_model.info['vocab_size']} tokens, model {vocab_size}"
                )
            n_ctx = min(n_ctx, base_model.info["n_ctx"])
        ctx = n_ctx if ctx is None else as_int("ctx", ctx, 2, n_ctx)
        stride = ctx if stride is None else as_int("stride", stride, 1, ctx)
        limit = None if max_windows is None else as_int("max_windows", max_windows, 1, MAX_INT32)
        ids = model.token_ids(text)
        if len(ids) < 2:
            raise ArgumentError("text must have at least 2 tokens, got 1: the first one is not predicted")
        parts = windows(len(ids), ctx, stride)[:limit]
        about = _describe(ids, ctx, stride, vocab_size, parts)
        theirs: Iterator[NDArray[np.float32]] | None = None  # the base's logits of each window's scored tokens
        if base_model is not None:
            theirs = (base_model.logits(ids[part.begin : part.end])[part.rows] for part in parts)
        elif base_logits is not None:
            _check_logits(Path(base_logits), about)
            theirs = _read_logits(Path(base_logits), vocab_size, parts)
        if save_logits is not None:
            refuse_inputs(save_logits, model.path, base_logits, base_model.path if base_model is not None else None)
        file = None if save_logits is None else stack.enter_context(AtomicFile(save_logits))
        if file is not None:
            file.write(_header(about))

        losses: list[NDArray[np.float64]] = []
        comparisons: list[_Comparison] = []
        n_read, seconds = 0, 0.0
        for done, part in enumerate(parts):
            window = ids[part.begin : part.end]
            targets = ids[part.scored : part.end]
            start = time.perf_counter()
            if theirs is None and file is None:
                # No logits are needed whole: the engine gives log-probabilities alone.
                losses.append(losses_of(model.score(window))[part.rows])
                seconds += time.perf_counter() - start
            else:
                logits = model.logits(window)[part.rows]
                seconds += time.perf_counter() - start
                if file is not None:
                    file.write(np.ascontiguousarray(logits).view(np.uint8))
                if theirs is not None:
                    base_rows = next(theirs)
                    if not np.isfinite(base_rows).all():
                        raise FixminError("the base's logits are not finite on this text")
                    comparisons.append(compare(base_rows, logits, targets))
                    losses.append(comparisons[-1].losses)
                else:
                    losses.append(negative_log_probabilities(logits, targets))
            n_read += len(window)
            if progress is not None:
                progress(done + 1, len(parts))
        if file is not None:
            file.commit()

    loss = np.concatenate(losses)
    if not np.isfinite(loss).all():
        raise FixminError("the model's logits are not finite on this text")
    nll, nll_error = _mean(loss)
    value = _exp(nll)
    return Perplexity(
        n_tokens=len(ids),
        n_scored=loss.size,
        n_windows=len(parts),
        ctx=ctx,
        stride=stride,
        nll=nll,
        nll_error=nll_error,
        perplexity=value,
        perplexity_error=value * nll_error,
        tok_s=n_read / seconds if seconds > 0 else 0.0,
        divergence=_divergence(comparisons, nll) if comparisons else None,
    )


# --- logits compared ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Comparison:
    """Per scored token, float64 [T] (agree: bool [T])."""

    losses: NDArray[np.float64]  # -log p of the model
    base_losses: NDArray[np.float64]
    kl: NDArray[np.float64]
    agree: NDArray[np.bool_]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """[T, V] -> natural logarithms of probabilities, float64 [T, V]."""
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    return x


def losses_of(score: Score) -> NDArray[np.float64]:
    """-log p of the scored tokens, in nats. FixminError if one is beyond float32, where a score has the last number."""
    if score.logprobs.min(initial=0.0) == np.finfo(np.float32).min:
        raise FixminError("the model's logits are not finite on this text, or further apart than float32 can hold")
    return -score.logprobs.astype(np.float64)


def negative_log_probabilities(logits: NDArray[np.float32], targets: NDArray[Any]) -> NDArray[np.float64]:
    """-log p of targets [T] under logits [T, V], in nats."""
    parts = [-log_softmax(logits[rows])[np.arange(len(targets[rows])), targets[rows]] for rows in _slices(len(targets))]
    return np.concatenate(parts)


def compare(base: NDArray[np.float32], other: NDArray[np.float32], targets: NDArray[np.uint32]) -> _Comparison:
    """Both models' predictions of targets [T] from logits [T, V], in bounded memory."""
    losses, base_losses, divergences, agreements = [], [], [], []
    for rows in _slices(len(targets)):
        p, q = log_softmax(np.asarray(base[rows])), log_softmax(other[rows])
        index = np.arange(len(p))
        losses.append(-q[index, targets[rows]])
        base_losses.append(-p[index, targets[rows]])
        divergences.append((np.exp(p) * (p - q)).sum(1))
        agreements.append(p.argmax(1) == q.argmax(1))
    return _Comparison(*map(np.concatenate, (losses, base_losses, divergences, agreements)))


def _divergence(comparisons: list[_Comparison], nll: float) -> Divergence:
    losses = np.concatenate([c.losses for c in comparisons])
    base_losses = np.concatenate([c.base_losses for c in comparisons])
    kl = np.concatenate([c.kl for c in comparisons])
    agree = np.concatenate([c.agree for c in comparisons]).astype(np.float64)
    delta = np.exp(-losses) - np.exp(-base_losses)
    base_nll = float(base_losses.mean())
    kl_mean, kl_error = _mean(kl)
    top1, top1_error = _mean(agree)
    delta_mean, delta_error = _mean(delta)
    return Divergence(
        base_nll=base_nll,
        base_perplexity=_exp(base_nll),
        perplexity_ratio=_exp(nll - base_nll),
        kl_mean=kl_mean,
        kl_error=kl_error,
        kl_quantiles=_quantiles(kl, _KL_QUANTILES),
        top1=top1,
        top1_error=top1_error,
        delta_p_mean=delta_mean,
        delta_p_error=delta_error,
        delta_p_rms=float(np.sqrt((delta**2).mean())),
        delta_p_quantiles=_quantiles(delta, _DELTA_QUANTILES),
    )


def _read_logits(path: Path, vocab_size: int, parts: list[Window]) -> Iterator[NDArray[np.float32]]:
    """The rows of a file, float32 [n, V], window by window. Not mapped: a file may be cut off meanwhile."""
    with open(path, "rb") as file:
        file.seek(_HEADER_BYTES)
        for part in parts:
            n_rows = part.end - part.scored
            data = file.read(4 * n_rows * vocab_size)
            if len(data) < 4 * n_rows * vocab_size:
                raise ArgumentError(f"{path} is damaged: it has become shorter while it was read")
            yield np.frombuffer(data, "<f4").reshape(n_rows, vocab_size)


def _slices(n: int) -> Iterator[slice]:
    return (slice(i, min(i + _ROWS, n)) for i in range(0, n, _ROWS))


def _mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error; 0 for a single value."""
    error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0
    return float(values.mean()), error


def _quantiles(values: NDArray[np.float64], shares: tuple[float, ...]) -> dict[str, float]:
    return {f"{100 * s:g}": float(v) for s, v in zip(shares, np.quantile(values, shares), strict=True)}


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _open(stack: ExitStack, name: str, model: Any) -> Model:
    if isinstance(model, Model):
        return model
    if not isinstance(model, str | os.PathLike):
        raise ArgumentTypeError(f"{name} must be a Model or the path of a GGUF file, got {type(model).__name__}")
    return stack.enter_context(Model(model))


# --- files of logits: a line of magic, a line of JSON, spaces up to _HEADER_BYTES, float32 rows [n_scored, V] -----

_MAGIC = b"fixmin-logits 1\n"
_HEADER_BYTES = 4096


def _describe(ids: NDArray[np.uint32], ctx: int, stride: int, vocab_size: int, parts: list[Window]) -> dict[str, Any]:
    """What has to be equal for logits to be comparable."""
    return {
        "vocab_size": vocab_size,
        "ctx": ctx,
        "stride": stride,
        "n_tokens": len(ids),
        "n_scored": sum(part.end - part.scored for part in parts),
        "sha256": hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest(),
    }


def _header(about: dict[str, Any]) -> bytes:
    return (_MAGIC + json.dumps(about).encode()).ljust(_HEADER_BYTES - 1) + b"\n"


def _check_logits(path: Path, about: dict[str, Any]) -> None:
    """ArgumentError if a file of logits was not made for `about`."""
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC) or len(header) != _HEADER_BYTES:
        raise ArgumentError(f"{path} is not a file of logits that this program has saved")
    try:
        found = json.loads(header[len(_MAGIC) :])
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} is damaged: its header is not JSON") from error
    for key, value in about.items():
        if not isinstance(found, dict) or found.get(key) != value:
            there = found.get(key) if isinstance(found, dict) else None
            raise ArgumentError(f"{path} was made for other logits: {key} is {there!r} there and {value!r} here")
    shape = (about["n_scored"], about["vocab_size"])
    if path.stat().st_size != _HEADER_BYTES + 4 * shape[0] * shape[1]:
        raise ArgumentError(f"{path} is damaged: {path.stat().st_size} bytes do not fit its header")
