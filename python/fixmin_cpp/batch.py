"""Many prompts from a file into a file: in order, resumable, in this process or on a Ray cluster."""

import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import __version__, _core
from .arguments import as_int
from .batch_lines import InputFile, Line, NativeEntry, Request, Settings, parse_line, write_record
from .batch_output import OutputFile, Resumed
from .errors import ArgumentError, FixminError, naming
from .generation import TokenLogprob
from .model import Model
from .state import file_sha256

__all__ = ["BatchReport", "ModelFile", "Result", "run_batch", "run_lines"]


@dataclass(frozen=True)
class BatchReport:
    """How far a job is; at its end, what it did. Tokens and seconds are those of this run.

    n_resumed == n_lines: there was nothing left to do.
    """

    path: str  # the output
    n_lines: int  # of input, blank ones not counted
    n_done: int  # of them, with a record in the output
    n_resumed: int  # of those, from earlier runs
    n_errors: int  # records that say what was wrong with their line, in the whole output
    prompt_tokens: int
    completion_tokens: int
    seconds: float  # from the first line of this run, loading included
    tok_s: float  # completion tokens per second, for scores and embeddings those of the texts
    first_error: str | None = None  # of this run: "FILE, line N: what is wrong with it"


@dataclass(frozen=True)
class Result:
    """What becomes of one line."""

    line: int
    record: bytes  # the line of output
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None  # what was wrong with it, if the record says so


@dataclass(frozen=True)
class ModelFile:
    """A file and how to load it, on whatever machine."""

    path: str
    sha256: str
    n_threads: int | None
    n_ctx: int | None
    kv_type: str
    n_parallel: int

    @classmethod
    def of(cls, path: str | os.PathLike[str], **settings: Any) -> "ModelFile":
        """Reads the file for its hash."""
        if not os.path.isfile(path):
            os.stat(path)  # raises the error that says what is missing
            raise ArgumentError(f"{os.fspath(path)}: not a regular file")  # reading a pipe could wait for ever
        return cls(os.path.abspath(path), file_sha256(path), **settings)

    def load(self, n_threads: int | None = None) -> Model:
        """The model; `n_threads` counts where the job names none."""
        return Model(
            self.path,
            n_threads=n_threads if self.n_threads is None else self.n_threads,
            n_ctx=self.n_ctx,
            kv_type=self.kv_type,
            n_parallel=self.n_parallel,
        )

    def vocab_size(self) -> int:
        """From the header; beyond any token id if it does not say: loading it tells what is wrong with the file."""
        with naming(self.path):
            return int(_core.GgufFile(self.path).metadata.get("fixmin.vocab_size", 2**32))

    def check(self) -> None:
        """Raises FixminError if the file of that name is another one here."""
        if file_sha256(self.path) != self.sha256:
            raise FixminError(f"{self.path} on {os.uname().nodename} is another file than where the job was started")


def run_batch(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    task: str = "generate",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    token_ids: bool = False,
    n_parallel: int = 64,
    fail_fast: bool = False,
    overwrite: bool = False,
    n_threads: int | None = None,
    n_ctx: int | None = None,
    kv_type: str = "f16",
    ray_address: str | None = None,
    ray_actors: int | None = None,
    ray_lines: int | None = None,
    progress: Callable[[BatchReport], object] | None = None,
) -> BatchReport:
    """Answers every line of a JSON Lines file by a line of another one, in the same order; see docs/batch.md.

    A run that was ended, however, is continued by the same call: the output is then that of a run without a break,
    timings and dates apart. A job that is done already is left as it is; lines that its input has got since are
    answered.

    Args:
        model: a GGUF file; with Ray, of the same path on every node.
        source: the input, a regular file. Memory does not depend on its size.
        target: the output. `target`.resume beside it says which job it belongs to, once that is done `target`.done.
        task: "generate", "score" (log-probability of every token), or "embed" (mean of the last hidden states).
        options: GenerationArguments for lines that do not give them.
        seed: 0 to 2^64-1. A line without a seed gets one that depends on this one and its number only.
        token_ids: records of generated texts hold their token ids too.
        n_parallel: lines that a model works on at a time.
        fail_fast: the first bad line ends the job; otherwise its record says what was wrong.
        overwrite: do not resume, start again, whatever `target` holds.
        n_threads, n_ctx, kv_type: see Model. With Ray, n_threads is also the CPUs that an actor reserves.
        ray_address: "auto", "HOST:PORT", "local" (a Ray instance of its own), or None: this process.
        ray_actors: models in the cluster; None: one per node that has CPUs.
        ray_lines: lines that an actor gets at a time, and repeats if it dies; None: four times `n_parallel`.
        progress: called after each line.

    Raises:
        ArgumentError: an argument is wrong, or `target` belongs to another job (other input, model, options or version)
            or was changed after its job had ended.
        FixminError: a bad line with fail_fast, "FILE, line N: ...". OSError, GGUFError: a file cannot be used.
    """
    n_parallel = as_int("n_parallel", n_parallel, 1, 4096)
    if ray_address is None and (ray_actors, ray_lines) != (None, None):
        raise ArgumentError("ray_actors and ray_lines need ray_address")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise ArgumentError(f"{os.fspath(target)} is the input: give the output another name")
    lines = InputFile.scan(source)
    file = ModelFile.of(model, n_threads=n_threads, n_ctx=n_ctx, kv_type=kv_type, n_parallel=n_parallel)
    settings = Settings.check(task, seed, options or {}, token_ids, file.vocab_size())
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(OutputFile(target, _identity(settings, lines, file), lines, overwrite=overwrite))
        resumed = output.resume(lines.lines())
        tally = _Tally(os.fspath(target), lines, resumed, task)
        if resumed.n_records < lines.n_lines:
            if ray_address is None:
                rest = lines.lines(resumed.number, resumed.offset)
                results = run_lines(stack.enter_context(file.load()), settings, rest, n_parallel)
            else:
                results = _run_on_ray(ray_address, file, settings, lines, resumed, ray_actors, ray_lines)
            stack.enter_context(contextlib.closing(results))
            for result in _in_order(lines.lines(resumed.number, resumed.offset), results):
                tally.add(result)
                if fail_fast and result.error is not None:
                    raise FixminError(tally.report().first_error)
                output.append(result.record)
                if progress is not None:
                    progress(tally.report())
        output.finish()
        return tally.report()


# Finished results may wait for a slow line before them; so many lines per place are begun at the most.
_AHEAD = 4


def run_lines(
    model: Model, settings: Settings, lines: Iterable[Line], n_parallel: int
) -> Generator[Result, None, None]:
    """Answers lines, n_parallel at a time, and gives the results in their order.

    Reads `lines` only as far ahead as it works on them. Errors other than those of a line end it. The model stays the
    caller's; closing it cancels what runs.
    """
    window: deque[Future[Result]] = deque()
    # Their requests meet in the model's scheduler, where each of these threads sleeps until its answer is complete.
    pool = ThreadPoolExecutor(n_parallel, "fixmin-batch")
    try:
        for line in lines:
            window.append(pool.submit(answer, model, settings, line))
            while window and (window[0].done() or len(window) >= _AHEAD * n_parallel):
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def answer(model: Model, settings: Settings, line: Line) -> Result:
    """The record for a line: its answer, or what is wrong with the line."""
    entry: Any = NativeEntry(line.number, {})  # in whose form a line is answered that cannot be read
    try:
        entry = parse_line(line)
        outputs = [_OUTPUTS[settings.task](model, settings, request) for request in entry.requests(settings)]
    except FixminError as error:
        if model.closed:
            raise  # the line is not to blame
        return Result(line.number, write_record(entry.failure(error)), error=str(error))
    usages = [output["usage"] for output in outputs]
    return Result(
        line.number,
        write_record(entry.answer(outputs)),
        sum(usage["prompt_tokens"] for usage in usages),
        sum(usage["completion_tokens"] for usage in usages),
    )


def _generate(model: Model, settings: Settings, request: Request) -> dict[str, Any]:
    completion = model.generate(request.prompt, **request.arguments)
    if completion.finish_reason == "cancelled":
        raise FixminError("the model was closed")
    timings = completion.timings
    return {
        "text": completion.text,
        **({"token_ids": completion.token_ids} if settings.token_ids else {}),
        "finish_reason": completion.finish_reason,
        **_logprobs(logprobs=completion.logprobs, prompt_logprobs=completion.prompt_logprobs),
        "usage": _usage(timings.n_prompt, completion.n_drawn),
        "seed": completion.seed,
        "timings": {"prefill_s": round(timings.prefill_s, 6), "decode_s": round(timings.decode_s, 6)},
    }


def _score(model: Model, settings: Settings, request: Request) -> dict[str, Any]:
    score = model.score(request.prompt)
    return {
        "token_ids": score.token_ids,
        "logprobs": _floats(score.logprobs),
        "nll": score.nll,
        "perplexity": score.perplexity if score.perplexity < float("inf") else None,
        "usage": _usage(len(score.token_ids), 0),
    }


def _embed(model: Model, settings: Settings, request: Request) -> dict[str, Any]:
    states = model.hidden_states(request.prompt, model.info["block_count"])  # [T, D], before the last norm
    mean = states.mean(axis=0, dtype=np.float64).astype(np.float32)
    return {"embedding": _floats(mean), "usage": _usage(len(states), 0)}


_OUTPUTS: dict[str, Callable[[Model, Settings, Request], dict[str, Any]]] = {
    "generate": _generate,
    "score": _score,
    "embed": _embed,
}


class _Tally:
    """Counts results."""

    def __init__(self, path: str, lines: InputFile, resumed: Resumed, task: str) -> None:
        self._started = time.monotonic()
        self._input = lines.path
        self._generates = task == "generate"
        n_resumed = resumed.n_records
        self._report = BatchReport(path, lines.n_lines, n_resumed, n_resumed, resumed.n_errors, 0, 0, 0.0, 0.0)

    def add(self, result: Result) -> None:
        now = self._report
        error = None if result.error is None else f"{self._input}, line {result.line}: {result.error}"
        self._report = replace(
            now,
            n_done=now.n_done + 1,
            n_errors=now.n_errors + (error is not None),
            prompt_tokens=now.prompt_tokens + result.prompt_tokens,
            completion_tokens=now.completion_tokens + result.completion_tokens,
            first_error=now.first_error or error,
        )

    def report(self) -> BatchReport:
        seconds = time.monotonic() - self._started
        n_tokens = self._report.completion_tokens if self._generates else self._report.prompt_tokens
        return replace(self._report, seconds=round(seconds, 3), tok_s=round(n_tokens / max(seconds, 1e-9), 1))


def _in_order(lines: Iterable[Line], results: Iterable[Result]) -> Iterator[Result]:
    """Passes the results on if there is exactly one for each line, in their order."""
    for line, result in itertools.zip_longest(lines, results):
        if line is None or result is None or line.number != result.line:
            due, came = (f"line {item[0]}" if item else "none" for item in (line, result and (result.line,)))
            raise FixminError(f"the answer to {due} was due and that to {came} came; run the job again to go on")
        yield result


def _identity(settings: Settings, lines: InputFile, file: ModelFile) -> dict[str, Any]:
    """What a resumed job must have in common with its beginning. Threads and n_parallel change no answer."""
    return {
        "fixmin": __version__,
        "input": lines.sha256,
        "model": file.sha256,
        "n_ctx": file.n_ctx,
        "kv_type": file.kv_type,
        "task": settings.task,
        "seed": settings.seed,
        "token_ids": settings.token_ids,
        **{f"option {name}": value for name, value in sorted(settings.options.items())},
    }


def _run_on_ray(*arguments: Any) -> Generator[Result, None, None]:
    # Ray Data reads it when it is imported. Half of the cluster would stay reserved for a command that was killed, for
    # three minutes of the run that goes on.
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "20")
    try:
        from .batch_ray import run_on_ray
    except ImportError as error:
        raise ImportError(f"a job on Ray needs pip install 'fixmin-cpp[ray]': {error}") from error
    return run_on_ray(*arguments)


def _logprobs(**fields: list[TokenLogprob] | None) -> dict[str, Any]:
    return {name: [asdict(token) for token in tokens] for name, tokens in fields.items() if tokens is not None}


def _usage(n_prompt: int, n_completion: int) -> dict[str, int]:
    return {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "total_tokens": n_prompt + n_completion}


def _floats(values: NDArray[np.float32]) -> list[float]:
    """float32 as the doubles with the shortest decimals that read back as the same float32."""
    return [float(str(value)) for value in values]
