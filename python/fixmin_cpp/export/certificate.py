"""The exported file beside its source: what llama.cpp would compute from it, and which ids it would give a text.

    function   the values to be stored, llama.cpp's graph in float64 with the model's own activation  ~  the engine
    GELU       the same with the GELU that llama.cpp has: what no file can change
    logits     the file as it is stored, with that GELU  ~  the engine: the end-to-end figure
    tokens     llama.cpp's tokenizer, written anew, on a corpus of scripts  ==  the model's own

The first line proves folding, reordering and scaling, as tightly as the source allows: to float32 if it holds floats.
Of a quantised one the engine rounds activations to 8 bits (docs/numerics.md). The third adds what the type costs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from ..convert.gguf_file.formats import BY_GGML_TYPE, bits_per_weight
from ..convert.gguf_file.readback import StoredModel
from ..convert.spec import ModelSpec
from ..evaluate import log_softmax
from ..model import Model
from ..tokenizer import TextTokenizer
from .bpe import LlamaTokenizer
from .corpus import Sample, corpus, tokens_as_text
from .graph import Weights, gelu_erf, gelu_tanh, logits

_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_FUNCTION_TOLERANCE = 1e-4
_FUNCTION_TOLERANCE_8BIT = 5e-2  # of the engine's 8-bit activations; measured: 1e-2
# Texts of a script, none of whose characters is unknown, that may get other ids.
TOKEN_TOLERANCE = 0.02

_SEED = 20261129
# With the text some 60 positions: 15 s of two cores at the published size, most of it spent on reading weights.
_LENGTHS = (1, 2, 7, 17)
_TEXT = "Question: What is the capital of France?\nAnswer:"
_TEXT_IDS = 32


@dataclass(frozen=True)
class SampleResult:
    """Texts of a script: all, those that get other ids, and of both those with characters the model does not know."""

    name: str
    ordinary: bool
    n_texts: int
    n_different: int
    n_unknown: int
    n_unknown_different: int
    example: str | None  # a text that gets other ids, the shortest; of known characters, if there is one

    @property
    def rate(self) -> float:
        """Of the texts whose characters the model knows: the fraction with other ids."""
        n = self.n_texts - self.n_unknown
        return (self.n_different - self.n_unknown_different) / n if n else 0.0


@dataclass(frozen=True)
class Certificate:
    """Figures of one export. Errors of logits are ‖Δ‖ / ‖logits‖, the worst over the prompts."""

    positions: int
    function_error: float
    function_tolerance: float
    gelu_error: float | None  # None: no GELU
    logit_error: float
    logit_tolerance: float  # what the type may cost, and the GELU
    kl_divergence: float  # mean, nats, of the source's engine from the file in llama.cpp
    top1_agreement: float

    @property
    def problems(self) -> list[str]:
        """What speaks against the file."""
        limits = [
            ("its function", self.function_error, self.function_tolerance),
            ("its logits", self.logit_error, self.logit_tolerance),
        ]
        # Written so that NaN is one too.
        return [
            f"{what} differ by {error:.3g} from the source's (limit {limit:.3g})"
            for what, error, limit in limits
            if not error <= limit
        ]

    def figures(self) -> dict[str, float]:
        """What is stored in the file."""
        gelu = {} if self.gelu_error is None else {"gelu_error": self.gelu_error}
        return {
            "function_error": self.function_error,
            "logit_error": self.logit_error,
            "kl_divergence": self.kl_divergence,
            "top1_agreement": self.top1_agreement,
            **gelu,
        }


def certify(
    source: Path,
    stored: StoredModel,
    planned: Weights,
    exported: Path,
    lowest: GGMLQuantizationType,
    progress: Callable[[str], None] = lambda step: None,
) -> Certificate:
    """Measures logits.

    source, stored: the fixmin file. planned: what was to be written, exported: where it is. lowest: the type with the
    fewest bits in it. Memory: the source in the engine, then a matrix and the logits of some 60 positions.
    """
    spec = stored.spec
    tokenizer = TextTokenizer.from_metadata(stored.metadata)
    prompts = make_prompts(spec, tokenizer)
    progress("running the source")
    with Model(source, kv_type="f32", n_ctx=max(map(len, prompts)), n_parallel=1) as model:
        truth = [model.logits(ids) for ids in prompts]
    progress("computing what llama.cpp would, before rounding")
    own = gelu_erf if spec.activation == "gelu" else gelu_tanh
    gelus = [own] if own is gelu_tanh else [own, gelu_tanh]
    meant = logits(planned, prompts, gelus)
    progress("computing what llama.cpp would, from the file")
    (found,) = logits(Weights.of_file(exported), prompts)
    gelu_error = None if spec.activation == "swiglu" else _worst(meant[-1], meant[0])
    kl, top1 = _beside(truth, found)
    floats = all(stored.types[f"{name}.weight"] in _FLOATS for name in _matrices(spec))
    return Certificate(
        positions=sum(map(len, prompts)),
        function_error=_worst(meant[0], truth),
        function_tolerance=_FUNCTION_TOLERANCE if floats else _FUNCTION_TOLERANCE_8BIT,
        gelu_error=gelu_error,
        logit_error=_worst(found, truth),
        logit_tolerance=type_tolerance(lowest) + (gelu_error or 0) + (0 if floats else _FUNCTION_TOLERANCE_8BIT),
        kl_divergence=kl,
        top1_agreement=top1,
    )


def make_prompts(spec: ModelSpec, tokenizer: TextTokenizer | None) -> list[NDArray[np.uint32]]:
    """Prompts of ids [T]: random ones, the first and the last id among them, and a text."""
    rng = np.random.default_rng(_SEED)
    lengths = sorted({min(n, spec.context_length) for n in _LENGTHS})
    prompts = [rng.integers(0, spec.vocab_size, n, dtype=np.uint32) for n in lengths]
    prompts[-1][0], prompts[-1][-1] = 0, spec.vocab_size - 1
    if tokenizer is not None:
        ids = tokenizer.encode(_TEXT)[: min(_TEXT_IDS, spec.context_length)]
        if ids and max(ids) < spec.vocab_size:
            prompts.append(np.array(ids, np.uint32))
    return prompts


def type_tolerance(kind: GGMLQuantizationType) -> float:
    """What storing in a type may cost: it stops files of no use, the proof is the function's."""
    if kind in BY_GGML_TYPE:
        return BY_GGML_TYPE[kind].logit_tolerance
    bits = bits_per_weight(kind)
    return 0.1 if bits > 6 else 0.25 if bits > 5 else 0.5 if bits > 4 else 1.0


def compare_tokens(own: TextTokenizer, exported: LlamaTokenizer, unknown: int | None) -> list[SampleResult]:
    """Ids of the corpus by the model's own tokenizer and by what llama.cpp is told. unknown: the id of no character."""
    names = set(own.control_tokens.values())
    vocab = {i: own.token_bytes(i) for i in range(own.backend.get_vocab_size()) if i not in names}
    samples = corpus(tokens_as_text(vocab), list(own.control_tokens))
    return [compare_sample(sample, own, exported.encode, unknown) for sample in samples]


def compare_sample(
    sample: Sample, own: TextTokenizer, other: Callable[[str], Sequence[int]], unknown: int | None
) -> SampleResult:
    """other: text -> ids. A text counts as unknown that has the unknown id, or whose tokens do not spell it."""
    different, strange, strange_different = [], 0, 0
    for text in sample.texts:
        ids = own.encode(text)
        is_strange = unknown in ids or b"".join(map(own.token_bytes, ids)) != text.encode()
        is_different = ids != list(other(text))
        strange += is_strange
        strange_different += is_strange and is_different
        if is_different:
            different.append((is_strange, len(text), text))
    return SampleResult(
        sample.name,
        sample.ordinary,
        len(sample.texts),
        len(different),
        strange,
        strange_different,
        min(different)[2] if different else None,
    )


def token_problems(results: Sequence[SampleResult]) -> list[str]:
    """Scripts in which too many texts get other ids."""
    return [
        f"{result.name}: {result.n_different} of {result.n_texts} texts, such as {(result.example or '')[:60]!a}"
        for result in results
        if result.ordinary and result.rate > TOKEN_TOLERANCE
    ]


def token_figures(results: Sequence[SampleResult]) -> Mapping[str, Any]:
    """For the file, as JSON: script -> [texts, with other ids, with unknown characters, of these with other ids]."""
    return {r.name: [r.n_texts, r.n_different, r.n_unknown, r.n_unknown_different] for r in results}


def _matrices(spec: ModelSpec) -> list[str]:
    return [name.removesuffix(".weight") for name, recipe in spec.tensors.items() if len(recipe.shape) > 1]


def _worst(ours: Sequence[NDArray[Any]], truth: Sequence[NDArray[Any]]) -> float:
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, truth, strict=True))


def _beside(truth: Sequence[NDArray[Any]], ours: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """Mean KL divergence in nats, and the fraction of positions with the same most likely token."""
    kl, same, count = 0.0, 0, 0
    for theirs, found in zip(truth, ours, strict=True):
        for a, b in zip(theirs, found, strict=True):
            p, q = log_softmax(a[None])[0], log_softmax(b[None])[0]
            kl += float(np.sum(np.exp(p) * (p - q)))
            same += int(a.argmax() == b.argmax())
            count += 1
    return kl / count, same / count
