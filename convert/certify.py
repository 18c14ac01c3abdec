"""The proof that a GGUF file computes the function of a checkpoint, as a chain of which every link is measured.

    codes        engine's code of every token id, lifted  ==  what the checkpoint's own code feeds its first block
    conventions  the file's conventions, checkpoint's weights, reference/ in float32  ~  checkpoint's own code: 1e-4
    weights      every stored weight  within  the rounding of its type of the checkpoint's weight
    engine       every block of the engine, and its output projection  ~  that step of reference/, started from the
                 engine's own state, with the weights of the file and the engine's rounding of activations
    logits       engine's logits  ~  checkpoint's own code: the end-to-end figure, its tolerance set by the type

For a float type the last line alone is nearly the whole proof. For a quantised one it is not: a wrong GELU or eps
disappears below the rounding of 4-bit weights, which is why conventions, weights and engine are proved apart, each as
tightly as float32 allows, and the end-to-end figures then say what the rounding costs. Without the checkpoint's code
the links that need it fall away and `against` says so: the certificate then covers the conversion, not the conventions.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from .. import _core
from ..errors import naming
from ..evaluate import log_softmax
from ..quantization.smooth import remembered
from .checkpoint.source import Source
from .gguf_file.formats import BY_GGML_TYPE, OUT_TYPES
from .gguf_file.readback import StoredModel, read_gguf
from .gguf_file.writer import tokenizer_metadata
from .observed.torch_threads import torch_threads
from .overrides import OVERRIDES, option
from .resolve import resolve
from .spec import ModelSpec, Resolved, TensorRecipe

OWN_CODE = "the checkpoint's own code"
REFERENCE = "the reference implementation (the checkpoint's code was not run)"

CONVENTIONS_TOLERANCE = 1e-4
# Same weights, same rounding of activations, same start: at most positions nothing is left but float32 sums in another
# order (measured: 5e-7). At the others such a difference turned the rounding of an activation over; the positions that
# see it then differ by up to the rounding itself (measured: 6e-3), which is what the limit of the worst one allows for.
ENGINE_TOLERANCE = 1e-4
ENGINE_WORST_TOLERANCE_8BIT = 0.1

_SEED = 20260509
_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 17, 33, 129)
_TEXTS = (
    "Question: What is the capital of France?\nAnswer:",
    "Once upon a time, there was a small village by the sea.",
)
_TEXT_IDS = 64
_STEP_LENGTH = 64
_CHUNK = 1 << 20
_ID_CHUNK = 4096  # token ids at a time in the check of the codes: 16 MB of lifted vectors at width 1024


class Runner(Protocol):
    """What is certified: an opened GGUF file. `_core.Engine` is one; tests put oracles in its place."""

    def codes(self, ids: NDArray[np.uint32]) -> NDArray[np.uint8]: ...  # [T, K]
    def logits(self, ids: NDArray[np.uint32]) -> NDArray[np.float32]: ...  # [T, V]
    def hidden_states(self, ids: NDArray[np.uint32], layer: int) -> NDArray[np.float32]: ...  # [T, D], layer blocks on
    def close(self) -> None: ...


OpenRunner = Callable[[Path, int], Runner]  # path, longest prompt in tokens


def open_engine(path: Path, n_ctx: int) -> Runner:
    """The native engine with a float32 cache, so that it is compared at its most exact."""
    return _core.Engine(str(path), kv_type="f32", n_ctx=n_ctx)


@dataclass(frozen=True)
class Check:
    """One line of a certificate. `tolerance` None: reported, not judged."""

    name: str
    measured: float
    tolerance: float | None
    detail: str

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.tolerance is None or self.measured <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """Figures of one certification. Errors of logits are ‖Δ‖ / ‖logits‖, the worst over the prompts.

    None where a link does not apply: codes of a learned embedding, conventions without the checkpoint's code.
    """

    against: str
    outtype: str
    code_ids: int | None = None  # token ids whose codes were compared
    code_mismatches: int | None = None
    conventions_error: float | None = None  # reference/ with the checkpoint's weights, against its own code
    weights: int = 0  # stored numbers compared
    weight_error: float = math.inf  # worst difference, in units of what the rounding of the type allows
    engine_error: float = math.inf  # a block of the engine against that of reference/, same weights: median
    engine_worst_error: float = math.inf  # and at the worst position of the worst block
    engine_worst_tolerance: float = 0.0
    tokens: int = 0  # positions at which logits were compared
    logit_error: float = math.inf  # engine against `against`
    logit_tolerance: float = 0.0
    max_logit_difference: float = math.inf
    kl_divergence: float = math.inf  # mean over the positions, nats, of `against` from the engine
    top1_agreement: float = 0.0  # fraction of the positions with the same most likely token
    problems: tuple[str, ...] = field(default=())  # what else speaks against the file

    @property
    def checks(self) -> list[Check]:
        """The certificate line by line."""
        checks = []
        if self.code_mismatches is not None:
            checks.append(Check("codes", self.code_mismatches, 0, f"mismatches in all {self.code_ids:,} token ids"))
        if self.conventions_error is not None:
            detail = f"relative error of the reference model against {OWN_CODE}, same weights"
            checks.append(Check("conventions", self.conventions_error, CONVENTIONS_TOLERANCE, detail))
        return [
            *checks,
            Check("weights", self.weight_error, 1.0, f"of the rounding of the type, worst of {self.weights:,} weights"),
            Check("engine", self.engine_error, ENGINE_TOLERANCE, "relative error of a block, same weights, median"),
            Check("engine, worst", self.engine_worst_error, self.engine_worst_tolerance, "block and position"),
            Check("logits", self.logit_error, self.logit_tolerance, f"relative error against {self.against}"),
            Check("max difference", self.max_logit_difference, None, f"of a logit, {self.tokens} positions"),
            Check("KL divergence", self.kl_divergence, None, "mean, nats"),
            Check("top-1", self.top1_agreement, None, "fraction of positions with the same most likely token"),
        ]

    @property
    def passed(self) -> bool:
        return not self.problems and all(check.passed for check in self.checks)

    def figures(self) -> dict[str, bool | int | float]:
        """What is stored under `fixmin.convert.certificate.`: the numbers, and whether all of them are good."""
        numbers = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("against", "outtype", "problems")
        }
        return {"passed": self.passed, **{k: v for k, v in numbers.items() if v is not None}}

    def lines(self) -> list[str]:
        """For people: one line for each check and problem; the problem alone if nothing was measured for it."""
        if self.problems and not self.weights:
            return [f"FAILED {problem}" for problem in self.problems]
        lines = [f"certified against {self.against}"]
        for check in self.checks:
            limit = "" if check.tolerance is None else f" (limit {check.tolerance:g})"
            verdict = "      " if check.tolerance is None else "ok    " if check.passed else "FAILED"
            lines.append(f"  {verdict} {check.name:14} {check.measured:.3g}{limit} {check.detail}")
        return lines + [f"  FAILED {problem}" for problem in self.problems]


def pending(resolved: Resolved, outtype: str) -> Certificate:
    """A certificate of the same form as the one to come, which nothing has passed yet."""
    own = resolved.reference_logits is not None
    has_codes = resolved.spec.code.kind != "learned"
    return Certificate(
        against=OWN_CODE if own else REFERENCE,
        outtype=outtype,
        code_ids=0 if has_codes else None,
        code_mismatches=resolved.spec.vocab_size if has_codes else None,
        conventions_error=math.inf if own else None,
    )


def certify(
    path: str | os.PathLike[str],
    resolved: Resolved,
    open_runner: OpenRunner = open_engine,
    progress: Callable[[str], None] = lambda step: None,
) -> Certificate:
    """Measure every link for a file and the checkpoint it came from.

    Memory: the engine's, then at most one block of the model and the logits of some 300 positions; plus what
    the checkpoint's own code holds. Raises GGUFError for a file that cannot be read or run.
    """
    path = Path(path)
    stored = read_gguf(path)
    outtype = _outtype(stored)
    resolved = replace(resolved, spec=remembered(stored.metadata, resolved.spec))
    problems = (*_differences(stored.spec, resolved.spec), *_other_tokens(stored, resolved.spec))
    certificate = replace(pending(resolved, outtype), problems=problems)
    if certificate.problems:
        return certificate  # another function: no figure could mean anything
    spec = resolved.spec
    prompts = make_prompts(spec)

    progress("running the engine")
    runner = open_runner(path, max(len(p) for p in prompts))
    try:
        if spec.code.kind != "learned":
            progress("comparing codes")
            mismatches = count_code_mismatches(runner, resolved)
            certificate = replace(certificate, code_ids=spec.vocab_size, code_mismatches=mismatches)
        engine = [runner.logits(p) for p in prompts]
        # One prompt is enough: a block is the same function at every position.
        steps = max((n for n, p in enumerate(prompts) if len(p) <= _STEP_LENGTH), key=lambda n: len(prompts[n]))
        states = [runner.hidden_states(prompts[steps], layer) for layer in range(spec.block_count + 1)]
    finally:
        runner.close()

    progress("comparing weights")
    weights, weight_error = compare_weights(stored, spec)

    from .streaming import embed, reference_logits, step_errors  # imports torch, which writing can do without

    progress("running the reference model on the weights of the file")
    rounded = rounded_products(stored)
    errors = np.stack(step_errors(stored.spec, states, engine[steps], rounded))
    if not np.array_equal(states[0], embed(stored.spec, prompts[steps]).numpy()):
        errors[:] = math.inf

    progress("running the reference model on the weights of the checkpoint")
    truth = reference_logits(replace(stored.spec, tensors=spec.tensors), prompts)
    if resolved.reference_logits is not None:
        progress("running the checkpoint's own code")
        own = [resolved.reference_logits(p) for p in prompts]
        certificate = replace(certificate, conventions_error=_worst_error(truth, own))
        truth = own
    difference, kl, top1 = _end_to_end(engine, truth)
    return replace(
        certificate,
        weights=weights,
        weight_error=weight_error,
        engine_error=float(np.median(errors)),
        engine_worst_error=float(errors.max()),
        engine_worst_tolerance=ENGINE_WORST_TOLERANCE_8BIT if rounded else ENGINE_TOLERANCE,
        tokens=sum(len(p) for p in prompts),
        logit_error=_worst_error(engine, truth),
        logit_tolerance=OUT_TYPES[outtype].logit_tolerance,
        max_logit_difference=difference,
        kl_divergence=kl,
        top1_agreement=top1,
    )


def verify(
    gguf_path: str | os.PathLike[str],
    checkpoint_dir: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    open_runner: OpenRunner = open_engine,
    progress: Callable[[str], None] = lambda step: None,
    **options: Any,
) -> Certificate:
    """Certify a file anew, against the checkpoint it says it came from.

    Of weights other than the file's own nothing is measured: `problems` says that it is another checkpoint.

    overrides and options: for `resolve`, as in the conversion. What was stated there as a plain value, and which
    tensors were allowed to be missing or unexpected, need not be repeated: the file remembers it, and `progress` is
    told. Files and trust_remote_code must be: a GGUF file has no say in which code is run and which files are read.

    Raises GGUFError for a file that cannot be read, CheckpointError for a checkpoint that cannot.
    """
    with naming(gguf_path):
        stored = read_gguf(gguf_path)
        _outtype(stored)
        overrides = {**remembered_overrides(stored.metadata), **(overrides or {})}
        allowed = remembered_allowances(stored.metadata)
        if any(allowed.values()):
            names = ", ".join(f"{option(kind)} {name}" for kind, some in allowed.items() for name in some)
            progress(f"as in the conversion, which the file remembers: {names}")
        progress("hashing the weights")
        with Source(Path(checkpoint_dir)) as source:
            sha256, expected = source.sha256(), stored.metadata.get("fixmin.convert.sha256")
        if not isinstance(expected, str) or sha256 != expected:
            made = f"the file was made from {stored.metadata.get('fixmin.convert.source')!r} ({expected or 'unknown'})"
            problem = f"{checkpoint_dir} is another checkpoint: its weights have SHA-256 {sha256}, {made}"
            return Certificate(against="nothing", outtype=_outtype(stored), problems=(problem,))
        with (
            torch_threads(Path(checkpoint_dir)),
            resolve(checkpoint_dir, overrides=overrides, remembered=allowed, log=progress, **options) as resolved,
        ):
            return certify(gguf_path, resolved, open_runner, progress)


def remembered_overrides(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What was stated in the conversion, as the writer stored it: names and plain values. {} if it is unreadable."""
    try:
        stated = json.loads(metadata.get("fixmin.convert.overrides", "{}"))
    except (TypeError, ValueError):
        return {}
    plain = isinstance(stated, dict) and all(name in OVERRIDES and name != "affine" for name in stated)
    return stated if plain else {}


def remembered_allowances(metadata: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """allow_missing and allow_unexpected of the conversion; () where the file holds none or something else."""
    found = {}
    for name in ("allow_missing", "allow_unexpected"):
        names = metadata.get(f"fixmin.convert.{name}")
        plain = isinstance(names, list) and all(isinstance(text, str) for text in names)
        found[name] = tuple(names or ()) if plain else ()
    return found


# --- the links --------------------------------------------------------------------------------------------------


def make_prompts(spec: ModelSpec) -> list[NDArray[np.uint32]]:
    """Prompts of ids [T]: random ones of every small length and some longer, the first and last id, and text."""
    rng = np.random.default_rng(_SEED)
    lengths = sorted({min(n, spec.context_length) for n in _LENGTHS})
    prompts = [rng.integers(0, spec.vocab_size, n, dtype=np.uint32) for n in lengths]
    prompts[-1][0], prompts[-1][-1] = 0, spec.vocab_size - 1
    if spec.tokenizer_json is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(spec.tokenizer_json))
        tokenizer.no_truncation()  # as where the file is used; what tokenizer.json says of it may even panic
        tokenizer.no_padding()
        limit = min(_TEXT_IDS, spec.context_length)
        texts = [np.array(tokenizer.encode(t, add_special_tokens=False).ids[:limit], dtype=np.uint32) for t in _TEXTS]
        prompts += [ids for ids in texts if ids.size and ids.max() < spec.vocab_size]
    return prompts


def count_code_mismatches(runner: Runner, resolved: Resolved) -> int:
    """Number of token ids whose code in the engine, lifted, is not what the checkpoint feeds its first block.

    Without the checkpoint's code the codes of the spec take its place.
    """
    spec = resolved.spec
    mismatches = 0
    # The checkpoint's code takes no sequence longer than its context.
    step = min(_ID_CHUNK, spec.context_length)
    for start in range(0, spec.vocab_size, step):
        ids = np.arange(start, min(start + step, spec.vocab_size), dtype=np.uint32)
        codes = runner.codes(ids)
        if resolved.reference_input is None:
            wrong = codes != spec.code.codes(ids)
        else:
            wrong = spec.code.lift_codes(codes, spec.embedding_length) != resolved.reference_input(ids)
        mismatches += int(np.count_nonzero(wrong.any(axis=1)))
    return mismatches


def compare_weights(stored: StoredModel, spec: ModelSpec) -> tuple[int, float]:
    """Number of weights compared, and the worst difference in units of what the rounding of its type allows."""

    def compare(name: str, start: int, stop: int, true: NDArray[np.float32]) -> float:
        return rounding_error(true, stored.spec.tensors[name].load_rows(start, stop), stored.types[name])

    total, worst = 0, 0.0
    n_threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(n_threads, "compare") as pool:
        waiting: deque[Future[float]] = deque()
        for name, start, stop, recipe in _chunks(spec):
            # The checkpoint is read in this thread (its readers need not be thread-safe), a few chunks ahead.
            true = recipe.load_rows(start, stop)
            total += true.size
            waiting.append(pool.submit(compare, name, start, stop, true))
            if len(waiting) > n_threads:
                worst = _max(worst, waiting.popleft().result())
        for result in waiting:
            worst = _max(worst, result.result())
    return total, worst


def rounding_error(true: NDArray[np.float32], stored: NDArray[np.float32], ggml_type: GGMLQuantizationType) -> float:
    """Worst |stored - true| over rows [m, n] (or a vector), in units of what correct rounding to the type allows.

    F32 allows no difference: 0.0 or infinity.
    """
    if ggml_type == GGMLQuantizationType.F32:
        return 0.0 if np.array_equal(true, stored) else math.inf
    bound = BY_GGML_TYPE[ggml_type]
    blocks = (-1, true.shape[-1] if ggml_type == GGMLQuantizationType.I8 else GGML_QUANT_SIZES[ggml_type][0])
    error = np.abs(stored - true).reshape(blocks).max(axis=1)
    # 2^-20: the arithmetic of this comparison and of ggml's scale is float32.
    allowed = np.abs(true).reshape(blocks).max(axis=1) * np.float32(bound.block_error * (1 + 2.0**-20))
    allowed += np.float32(bound.floor)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(error > 0, error / allowed, 0)
    return float(ratio.max(initial=0.0))


def rounded_products(stored: StoredModel) -> dict[str, int]:
    """The matrices whose products the engine takes with 8-bit activations (docs/numerics.md): the quantised ones, but
    not the queries, keys and values of layer 0 that it folds with the code. Name -> activations that share a scale."""
    floats = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
    folded = set()
    if stored.spec.code.kind != "learned":
        folded = {f"blk.0.{name}.weight" for name in ("attn_q", "attn_k", "attn_v")}
    others = {*folded, "token_embd.weight", "token_code.weight"}
    return {
        name: stored.spec.tensors[name].shape[-1] if t == GGMLQuantizationType.I8 else 32
        for name, t in stored.types.items()
        if t not in floats and name not in others
    }


def _end_to_end(
    engine: Sequence[NDArray[np.float32]], truth: Sequence[NDArray[np.float32]]
) -> tuple[float, float, float]:
    """Largest difference of a logit, mean KL divergence in nats, fraction of positions with the same best token."""
    largest, kl, same, count = 0.0, 0.0, 0, 0
    for ours, theirs in zip(engine, truth, strict=True):
        for a, b in zip(ours, theirs, strict=True):  # row by row: float64 copies of all would be twice the logits
            largest = _max(largest, float(np.abs(a - b).max()))
            p, q = log_softmax(b[None])[0], log_softmax(a[None])[0]
            kl += float(np.sum(np.exp(p) * (p - q)))
            same += int(a.argmax() == b.argmax())
            count += 1
    return largest, kl / count, same / count


# --- helpers ----------------------------------------------------------------------------------------------------


def _worst_error(ours: Sequence[NDArray[np.float32]], truth: Sequence[NDArray[np.float32]]) -> float:
    worst = 0.0
    for a, b in zip(ours, truth, strict=True):
        if a.shape != b.shape:
            return math.inf
        with np.errstate(over="ignore"):  # beside a norm that overflows, any difference would look small
            difference, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
        worst = _max(worst, difference / norm if 0 < norm < math.inf else math.inf if difference else 0.0)
    return worst


def _max(a: float, b: float) -> float:
    """The larger one, or NaN if either is: `max` would lose it."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _chunks(spec: ModelSpec) -> Iterator[tuple[str, int, int, TensorRecipe]]:
    for name, recipe in spec.tensors.items():
        step = max(1, _CHUNK // math.prod(recipe.shape[1:]))
        for start in range(0, recipe.shape[0], step):
            yield name, start, min(start + step, recipe.shape[0]), recipe


def _outtype(stored: StoredModel) -> str:
    """The `--outtype` of a file, from general.file_type."""
    by_number = {int(t.file_type): name for name, t in OUT_TYPES.items()}
    number = stored.metadata.get("general.file_type")
    if not isinstance(number, int) or number not in by_number:
        raise _core.GGUFError(f"general.file_type {number!r} is not one that the converter writes")
    return by_number[number]


def _differences(stored: ModelSpec, spec: ModelSpec) -> Iterator[str]:
    """Conventions and shapes in which a file differs from the checkpoint."""
    skip = ("code", "tensors", "conventions", "name", "tokenizer_json", "weights_sha256",
            "bos_token_id", "eos_token_ids", "pad_token_id")  # fmt: skip
    for item in fields(ModelSpec):
        ours, theirs = getattr(stored, item.name), getattr(spec, item.name)
        if item.name not in skip and ours != theirs and not _same_float32(ours, theirs):
            yield f"{item.name} is {ours!r} in the file, {theirs!r} in the checkpoint"
    for name in ("kind", "width", "matrix", "shift", "table", "lift", "values"):
        ours, theirs = getattr(stored.code, name), getattr(spec.code, name)
        same = np.array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs
        if not same and not _same_float32(ours, theirs):
            yield f"the code's {name} in the file is not that of the checkpoint"
    shapes = {name: recipe.shape for name, recipe in spec.tensors.items()}
    for name in sorted(shapes.keys() | stored.tensors.keys()):
        ours = stored.tensors[name].shape if name in stored.tensors else "missing"
        theirs = shapes.get(name, "missing")
        if ours != theirs:
            yield f"tensor {name} is {ours} in the file, {theirs} in the checkpoint"


def _other_tokens(stored: StoredModel, spec: ModelSpec) -> Iterator[str]:
    """What a file says of tokens that is not what the checkpoint says."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | np.ndarray):
            return [plain(one) for one in (value if isinstance(value, list) else value.tolist())]
        return value.decode() if isinstance(value, bytes) else value

    for key, made in tokenizer_metadata(spec).items():
        ours, theirs = plain(stored.metadata.get(key)), plain(made.value)
        if ours != theirs:
            short = isinstance(theirs, int) or key == "tokenizer.ggml.model"
            yield f"{key} is {ours!r} in the file, {theirs!r} in the checkpoint" if short else f"{key} is another one"


def _same_float32(a: Any, b: Any) -> bool:
    """Whether two numbers, or tuples of them, are equal once rounded to the float32 that a file holds."""
    if isinstance(a, (float, tuple)) and isinstance(b, (int, float, tuple)):
        return np.array_equal(np.asarray(a, dtype=np.float32), np.asarray(b, dtype=np.float32))
    return False
