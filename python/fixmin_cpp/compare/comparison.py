"""The whole comparison: models, text, measurements, each kept in a folder as soon as it is there."""

import errno
import functools
import math
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _core
from ..arguments import MAX_INT32, as_int
from ..errors import ArgumentError
from ..load_options import LoadArguments, LoadOptions
from ..model import Model
from .corpus import Mixture, mixed_text
from .measure import measure_speed, score_text
from .models import distinct_names, read_facts, resolve_model
from .results import PAPER, Comparison, Figure, ModelFacts, Row, Speed, TaskScore, TextFacts, TextScore, ratio
from .results import difference as paired_difference
from .store import Store
from .tasks import Task, load_tasks, run_task

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

__all__ = ["compare"]


def compare(
    models: Sequence[str | os.PathLike[str]],
    text: str | Mixture,
    out: str | os.PathLike[str] = "compare",
    *,
    text_name: str = "text",
    outtype: str = "f32",
    trust_remote_code: bool = False,
    ctx: int | None = None,
    max_windows: int | None = None,
    speed: bool = True,
    n_prompt: int | None = None,
    n_generate: int | None = None,
    repeat: int = 5,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
    **options: "Unpack[LoadArguments]",
) -> Comparison:
    """Measures models beside each other. What `out` holds of an earlier run is used again, but for changed inputs.

    Args:
        models: GGUF files, or folders of checkpoints, which are converted first. Differences are from the first one.
        text: the held-out text, or a Mixture to stream it from (needs fixmin-cpp[compare] and a network).
        out: folder for parts of the result, made with the first of them if it is not there.
        text_name: of the text, for the captions.
        outtype, trust_remote_code: of conversions, as in fixmin_cpp.convert(). F32: the paper's weights are floats.
        ctx: tokens of a window, read from an empty context; None: the shortest context of the models.
        max_windows: stop after so many; None: the whole text.
        speed: whether to measure it, with n_prompt, n_generate and repeat as in `measure_speed`. All models are in
            memory at once then.
        tasks: names of tasks or groups of lm-evaluation-harness (needs fixmin-cpp[compare]), its own or those in
            include_path, with `limit` documents at most and `num_fewshot` examples; None: all, and as the task says.
        tell: called with what is being done.
        **options: of Model, but for n_ctx.

    Returns:
        A Comparison; `report.write_report` makes files of it.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is out of range; the text is shorter than two windows.
        CheckpointError, CertificationError, GGUFError, UnsupportedError, OSError: of a model. FixminError: a data set
            cannot be reached.
    """
    if not models:
        raise ArgumentError("models must name at least one file or folder")
    if "n_ctx" in options:
        raise ArgumentError("n_ctx is the model's own here: ctx says how long windows are")
    repeat = as_int("repeat", repeat, 1, 10_000)
    for name, value in (("max_windows", max_windows), ("n_prompt", n_prompt), ("n_generate", n_generate)):
        if value is not None:
            as_int(name, value, 1, MAX_INT32)
    if limit is not None:
        as_int("limit", limit, 1, MAX_INT32)
    if num_fewshot is not None:
        as_int("num_fewshot", num_fewshot, 0, MAX_INT32)
    load = LoadOptions.check(options).given()
    if isinstance(text, str) and not text.strip():
        raise ArgumentError(f"{text_name} is empty")
    wanted = load_tasks(tasks, include_path)  # what is not there ends the run before anything takes long
    given, folder = [Path(model) for model in models], Path(out)
    if folder.exists() and not folder.is_dir():  # known now, not after the first measurement
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    names, store = distinct_names(given), Store(folder)
    facts = []
    for path, name in zip(given, names, strict=True):
        file = resolve_model(path, outtype=outtype, trust_remote_code=trust_remote_code, tell=tell)
        facts.append(read_facts(file, str(path), name))

    content, source = (text, {}) if isinstance(text, str) else mixed_text(text, Path(facts[0].path), folder, tell)
    text_name = text_name if isinstance(text, str) else " + ".join(text.names)
    data = content.encode()
    about = TextFacts(text_name, sha256(data).hexdigest(), len(data), source)
    n_ctx = min(one.n_ctx for one in facts)
    ctx = n_ctx if ctx is None else as_int("ctx", ctx, 2, n_ctx)

    measured = _Measured(store, facts, load, tell)
    scores = [measured.text(one, content, about, ctx, max_windows) for one in facts]
    speeds = measured.speed(n_prompt, n_generate, repeat) if speed else [None] * len(facts)
    answers = [measured.tasks(one, wanted, limit, num_fewshot) for one in facts]
    return Comparison(
        rows=[_row(*parts, first=scores[0]) for parts in zip(facts, scores, speeds, answers, strict=True)],
        text=about,
        settings={"ctx": ctx, "max_windows": max_windows, "repeat": repeat, "tasks": list(tasks), "limit": limit}
        | {"num_fewshot": num_fewshot, "outtype": outtype, "kv_type": load.get("kv_type", "f16")},
        machine=_machine(load),
        notes=_notes(facts, scores, isinstance(text, Mixture)),
    )


class _Measured:
    """Measurements, taken from the store where it has them."""

    def __init__(
        self, store: Store, facts: list[ModelFacts], load: dict[str, Any], tell: Callable[[str], None]
    ) -> None:
        self._store, self._facts, self._load, self._tell = store, facts, load, tell
        # Threads and device change no bit of a result; the type of the cache does.
        self._bits = {"kv_type": load.get("kv_type", "f16"), "version": _core.__version__}

    def _model(self, facts: ModelFacts) -> Model:
        self._tell(f"loading {facts.path}")
        return Model(facts.path, **self._load)

    def text(self, facts: ModelFacts, content: str, about: TextFacts, ctx: int, max_windows: int | None) -> TextScore:
        key = {**self._bits, "model": facts.sha256, "text": about.sha256, "ctx": ctx, "max_windows": max_windows}
        saved = self._store.load("text", key)
        if saved is not None and "ids_sha256" in saved:  # the whole of it
            return TextScore(**saved)
        with self._model(facts) as model:
            self._tell(f"perplexity of {facts.name}")
            return score_text(model, content, ctx, max_windows, self._store, key, self._tell)

    def speed(self, n_prompt: int | None, n_generate: int | None, repeat: int) -> list[Speed]:
        """Of all models together: turns of one alone would be no comparison."""
        settings: dict[str, Any] = {"n_prompt": n_prompt, "n_generate": n_generate, "repeat": repeat}
        key = {**self._bits, **settings, "models": [one.sha256 for one in self._facts]}
        key["machine"] = _machine(self._load)
        saved = self._store.load("speed", key)
        if saved is None:
            with ExitStack() as stack:
                models = [stack.enter_context(self._model(one)) for one in self._facts]
                found = measure_speed(models, tell=self._tell, **settings)
            saved = [asdict(one) for one in found]
            self._store.save("speed", key, saved)
        return [Speed(**one) for one in saved]

    def tasks(
        self, facts: ModelFacts, wanted: list[Task], limit: int | None, num_fewshot: int | None
    ) -> list[TaskScore]:
        """Of all tasks, in their order. The model is loaded for the first one that is not there yet."""
        key, scores = {**self._bits, "model": facts.sha256}, []
        with ExitStack() as stack:
            model = functools.cache(lambda: stack.enter_context(self._model(facts)))
            for task in wanted:
                self._tell(f"{task.name} of {facts.name}")
                scores += run_task(task, model, self._store, key, limit=limit, num_fewshot=num_fewshot)
        return scores


def _row(facts: ModelFacts, score: TextScore, speed: Speed | None, tasks: list[TaskScore], *, first: TextScore) -> Row:
    nll = ratio(score.window_nll, score.window_tokens)
    value = math.exp(nll.value) if nll.value < 700 else math.inf
    bits = ratio(score.window_nll, score.window_bytes)
    return Row(
        facts=facts,
        text=score,
        nll=nll,
        perplexity=Figure(value, None if nll.error is None else value * nll.error),
        bits_per_byte=Figure(bits.value / math.log(2), None if bits.error is None else bits.error / math.log(2)),
        against_first=None if score is first else paired_difference(first, score),
        speed=speed,
        tasks=tasks,
        paper_perplexity=PAPER.get(facts.variant),
    )


def _notes(facts: list[ModelFacts], scores: list[TextScore], streamed: bool) -> list[str]:
    notes = []
    others = [one.name for one, score in zip(facts, scores, strict=True) if score.ids_sha256 != scores[0].ids_sha256]
    if others:
        notes.append(
            f"{', '.join(others)}: the text has other tokens than for {facts[0].name}, so perplexities per token "
            "cannot be compared; bits per byte can."
        )
    if len({one.types for one in facts}) > 1:
        notes.append("The models have different weight types, which differ in quality and speed.")
    if streamed:
        notes.append("Nothing says that the models were not trained on some of the streamed documents.")
    return notes


def _machine(load: dict[str, Any]) -> dict[str, Any]:
    """What speeds depend on."""
    found = _core.system_info()
    return {
        "cpu": found["cpu"],
        "isa": found["isa"],
        "threads": max(load.get("n_threads") or 0, 0) or found["default_threads"],
        "device": load.get("device") or os.environ.get("FIXMIN_DEVICE") or "cpu",
        "platform": platform.machine(),
        "version": _core.__version__,
    }
