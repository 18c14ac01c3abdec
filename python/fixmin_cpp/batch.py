"""Many prompts from a file into a file: in order, resumable, in this process or on a Ray cluster."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ._core import __version__
from .arguments import as_int, as_threads
from .atomic_file import refuse_inputs
from .batch_lines import InputFile, Line, Settings
from .batch_output import OutputFile, Resumed
from .batch_work import ModelFile, Result, run_lines
from .errors import ArgumentError, FixminError
from .load_options import LoadArguments, LoadOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

__all__ = ["BatchReport", "run_batch"]

_N_PARALLEL = 64


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


def run_batch(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    task: str = "generate",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    token_ids: bool = False,
    fail_fast: bool = False,
    overwrite: bool = False,
    ray_address: str | None = None,
    ray_actors: int | None = None,
    ray_lines: int | None = None,
    ray_gpus: float | None = None,
    progress: Callable[[BatchReport], object] | None = None,
    **load: "Unpack[LoadArguments]",
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
        fail_fast: the first bad line ends the job; otherwise its record says what was wrong.
        overwrite: do not resume, start again, whatever `target` holds.
        ray_address: "auto", "HOST:PORT", "local" (a Ray instance of its own), or None: this process.
        ray_actors: models in the cluster; None: one per node that has CPUs, with device="cuda" one per GPU.
        ray_lines: lines that an actor gets at a time, and repeats if it dies; None: four times `n_parallel`.
        ray_gpus: that an actor reserves, Ray's num_gpus; None: with device="cuda" 1. A part: so many actors share one.
        progress: called after each line.
        **load: n_threads, n_ctx, kv_type, n_parallel, ...: see Model. So many lines as n_parallel says (64) are worked
            on at a time. With Ray, n_threads is also the CPUs that an actor reserves.

    Raises:
        ArgumentError: an argument is wrong, or `target` belongs to another job (other input, model, options or version)
            or was changed after its job had ended.
        FixminError: a bad line with fail_fast, "FILE, line N: ...". OSError, GGUFError: a file cannot be used.
    """
    n_parallel = as_int("n_parallel", load.get("n_parallel", _N_PARALLEL), 1, 4096)
    n_threads = as_threads(load.get("n_threads")) or None
    if ray_address is None and (ray_actors, ray_lines, ray_gpus) != (None, None, None):
        raise ArgumentError("ray_actors, ray_lines and ray_gpus need ray_address")
    for written in OutputFile.names(target):
        refuse_inputs(written, source, model)
    lines = InputFile.scan(source)
    load_options = LoadOptions.check({**load, "n_threads": n_threads, "n_parallel": n_parallel})
    file = ModelFile.of(model, load_options)
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
                results = _run_on_ray(ray_address, file, settings, lines, resumed, ray_actors, ray_lines, ray_gpus)
            stack.enter_context(contextlib.closing(results))
            for result in _in_order(lines.lines(resumed.number, resumed.offset), results):
                tally.add(result)
                if fail_fast and result.error is not None:
                    raise FixminError(tally.report().first_error)
                output.append(result.record)
                if progress is not None:
                    progress(tally.report())
            lines.check_unchanged()
        output.finish()
        return tally.report()


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
        "n_ctx": file.options.n_ctx,
        "kv_type": file.options.kv_type,
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
        import ray  # noqa: F401  # so that it is named if it is missing, and not what comes with it

        from .batch_ray import run_on_ray
    except ImportError as error:
        raise ImportError(f"a job on Ray needs pip install 'fixmin-cpp[ray]': {error}") from error
    return run_on_ray(*arguments)
