"""What a comparison finds, and the statistics of it. All `error`s are one standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PAPER",
    "PAPER_SEED_VARIATION",
    "Comparison",
    "Difference",
    "Figure",
    "ModelFacts",
    "Row",
    "Speed",
    "TaskScore",
    "TextFacts",
    "TextScore",
    "difference",
    "ratio",
]

#: Mean held-out validation perplexity of the published models, three seeds (arXiv 2605.09751), by variant.
PAPER = {"fixed": 2.36, "affine": 2.39, "learned": 2.44}
#: How far perplexities of equal runs with other seeds lie apart there, per cent.
PAPER_SEED_VARIATION = 4.8


@dataclass(frozen=True)
class Figure:
    """A mean and its standard error; None: one sample does not tell."""

    value: float
    error: float | None


@dataclass(frozen=True)
class ModelFacts:
    """What a GGUF file holds, without running it."""

    name: str  # in the tables
    source: str  # the argument: a file or a checkpoint's folder
    path: str  # the GGUF file that was measured
    sha256: str  # of that file
    variant: str  # "fixed" (A = I or the reversal of the bits, b = 0), "affine", "table" or "learned"
    types: str  # of the matrices, such as "F32", those of the most weights first
    n_parameters: int  # in all tensors; bits of codes and scales of rows are none
    n_input_parameters: int  # of the embedding table: 0 for codes
    code_bits: int  # stored instead of it: A and b, or a table of codes; 0 where the bits of the id are the code
    file_bytes: int
    n_ctx: int
    vocab_size: int


@dataclass(frozen=True)
class TextFacts:
    """The held-out text."""

    name: str
    sha256: str  # of its UTF-8 bytes
    n_bytes: int
    source: dict[str, Any] = field(default_factory=dict)  # of a mixture: data sets, seed, documents


@dataclass(frozen=True)
class TextScore:
    """How a model predicts the text, window by window. Every token of a window but its first is scored."""

    ctx: int  # tokens of a window
    n_tokens: int  # of the text
    ids_sha256: str  # of the tokens: two models with the same ones read the same windows
    window_nll: list[float]  # nats, the sum over a window's scored tokens
    window_tokens: list[int]  # that were scored
    window_bytes: list[float]  # of the text, for which these tokens stand


@dataclass(frozen=True)
class Speed:
    """Tokens per second: medians of runs in which the models took turns."""

    n_prompt: int  # tokens of a prefill
    n_generate: int  # tokens of a decode
    prefill_tok_s: float
    prefill_tok_s_runs: list[float]
    decode_tok_s: float
    decode_tok_s_runs: list[float]


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task of lm-evaluation-harness, with the standard error that the harness gives."""

    task: str
    metric: str  # "acc", "acc_norm", ...
    filter: str  # of the harness; mostly "none"
    figure: Figure
    n_samples: int | None


@dataclass(frozen=True)
class Difference:
    """From the first model, paired: both models' losses in the same window are subtracted before the error is taken."""

    nll: Figure  # nats per token; above 0: worse than the first
    percent: Figure  # of perplexity: 100 (exp(nll) - 1)


@dataclass(frozen=True)
class Row:
    """A model's line of the table."""

    facts: ModelFacts
    text: TextScore
    nll: Figure  # nats per token
    perplexity: Figure  # exp(nll)
    bits_per_byte: Figure  # of UTF-8: does not depend on the tokenizer
    against_first: Difference | None  # None for the first, and for other tokens or windows than the first's
    speed: Speed | None
    tasks: list[TaskScore]
    paper_perplexity: float | None  # of the published model of this variant


@dataclass(frozen=True)
class Comparison:
    """All rows, in the order of the arguments."""

    rows: list[Row]
    text: TextFacts
    settings: dict[str, Any]
    machine: dict[str, Any]
    notes: list[str]  # what a reader has to know to read the figures


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Figure:
    """The mean per count, Σ sums / Σ counts, and its standard error over windows.

    The error of a ratio with windows as the samples: tokens of a window share their document, so that taking each token
    for a sample of its own would give too small an error. sqrt(n/(n-1) Σ (s - mean c)²) / Σ c over n windows.
    """
    s, c = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    mean = float(s.sum() / c.sum())
    return Figure(mean, _standard_error(s - mean * c, float(c.sum())))


def difference(first: TextScore, other: TextScore) -> Difference | None:
    """Of `other` from `first` on the same windows; None if their windows are not the same tokens."""
    if (first.ids_sha256, first.ctx, first.window_tokens) != (other.ids_sha256, other.ctx, other.window_tokens):
        return None
    nll = ratio(np.subtract(other.window_nll, first.window_nll).tolist(), first.window_tokens)
    factor = 100 * math.exp(nll.value) if nll.value < 700 else math.inf
    return Difference(nll, Figure(factor - 100, None if nll.error is None else factor * nll.error))


def _standard_error(residuals: NDArray[np.float64], total: float) -> float | None:
    n = residuals.size
    return math.sqrt(n / (n - 1) * float((residuals**2).sum())) / total if n > 1 else None
