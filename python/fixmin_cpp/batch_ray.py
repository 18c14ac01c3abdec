"""A batch job on Ray Data: the input is read where the job was started, actors answer, results come in order."""

import contextlib
import itertools
import logging
import os
from collections.abc import Generator, Iterator

import numpy as np
import pyarrow
import ray
import ray.data
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .arguments import as_int
from .batch import ModelFile, Result, Runner
from .batch_lines import InputFile, Line, Settings
from .batch_output import Resumed
from .errors import ArgumentError, FixminError

__all__ = ["RayJob"]

# Ray Data keeps something for every task: a long input is cut into larger pieces rather than into more.
_MAX_PIECES = 16_384
# A task is repeated when its actor or node dies. A line that kills every actor must not keep a cluster busy for ever.
_MAX_RETRIES = 5

_LINES = pyarrow.schema([("number", pyarrow.int64()), ("offset", pyarrow.int64()), ("data", pyarrow.large_binary())])
_RESULTS = pyarrow.schema(
    [
        ("line", pyarrow.int64()),
        ("record", pyarrow.large_binary()),
        ("prompt_tokens", pyarrow.int64()),
        ("completion_tokens", pyarrow.int64()),
        ("error", pyarrow.large_string()),
    ]
)


class RayJob:
    """Runs jobs on the cluster at an address: "auto", "HOST:PORT", or "local" for a Ray instance of its own.

    Where this process is connected to Ray already, that connection is used and stays.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def run(
        self,
        file: ModelFile,
        settings: Settings,
        concurrency: int,
        lines: InputFile,
        resumed: Resumed,
        *,
        actors: int | None,
        lines_per_task: int | None,
    ) -> Generator[Result, None, None]:
        """The results of the lines that are left, in their order, while the cluster works on those that follow.

        A task whose actor dies is run again by another one. Its results are the same, and nothing of them is given
        before the task is done.
        """
        per_task = 4 * concurrency if lines_per_task is None else as_int("ray_lines", lines_per_task, 1)
        per_task = max(per_task, -(-(lines.n_lines - resumed.n_records) // _MAX_PIECES))
        with _connection(self._address):
            n_actors, n_threads = _pool(actors, file.n_threads)
            pieces = _pieces(lines, resumed, per_task)
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            dataset = ray.data.range(len(pieces), override_num_blocks=len(pieces)).map_batches(
                _read,
                fn_args=(lines, pieces),
                batch_size=1,
                batch_format="numpy",
                num_cpus=0,  # the pool may have reserved all of them
                scheduling_strategy=here,  # so that no other node needs the file
            )
            dataset = dataset.map_batches(
                _Worker,
                fn_constructor_args=(file, settings, concurrency, n_threads),
                batch_size=None,  # a block, which is what one call of _read returns
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=n_actors),
                num_cpus=n_threads,
                max_restarts=-1,
                max_task_retries=_MAX_RETRIES,
            )
            dataset.context.execution_options.preserve_order = True
            dataset.context.enable_progress_bars = False
            try:
                for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                    for row in table.to_pylist():
                        yield Result(**row)
            except ray.exceptions.RayError as error:
                raise FixminError(f"Ray: {_reason(error)}") from error


class _Worker:
    """An actor: one model, which answers the lines of one piece at a time."""

    def __init__(self, file: ModelFile, settings: Settings, concurrency: int, n_threads: int) -> None:
        file.check()
        self._model = file.load(n_threads)
        self._runner = Runner(self._model, settings, concurrency)

    def __call__(self, lines: pyarrow.Table) -> pyarrow.Table:
        results = self._runner.run(Line(**row) for row in lines.to_pylist())
        return pyarrow.Table.from_pylist([vars(result) for result in results], _RESULTS)


def _read(piece: dict[str, NDArray[np.int64]], lines: InputFile, pieces: NDArray[np.int64]) -> pyarrow.Table:
    """The lines of a piece of the input, as a table."""
    number, offset, n_lines = (int(n) for n in pieces[piece["id"][0]])
    found = list(itertools.islice(lines.lines(number, offset), n_lines))
    return pyarrow.Table.from_pylist([line._asdict() for line in found], _LINES)


def _pieces(lines: InputFile, resumed: Resumed, per_piece: int) -> NDArray[np.int64]:
    """Where the pieces of the rest of the input begin: int64 [n, 3] of line number, offset and number of lines."""
    rest = lines.lines(resumed.number, resumed.offset)
    pieces = []
    for first in rest:
        n_lines = 1 + sum(1 for _ in itertools.islice(rest, per_piece - 1))
        pieces.append((first.number, first.offset, n_lines))
    return np.array(pieces, np.int64)


def _pool(actors: int | None, n_threads: int | None) -> tuple[int, int]:
    """Number of actors and CPUs of each. Without a wish: one per node, with the CPUs of the smallest node."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cpus = [n for n in cpus if n > 0]
    if not cpus:
        raise ArgumentError("the Ray cluster has no CPUs")
    n_threads = min(cpus) if n_threads is None else as_int("n_threads", n_threads, 1)
    room = sum(n // n_threads for n in cpus)
    n_actors = as_int("ray_actors", actors, 1) if actors is not None else min(room, len(cpus))
    if not 1 <= n_actors <= room:
        raise ArgumentError(
            f"the Ray cluster has room for {room} actors of {n_threads} CPUs, not for {max(n_actors, 1)}: its nodes "
            f"have {', '.join(map(str, cpus))}"
        )
    return n_actors, n_threads


@contextlib.contextmanager
def _connection(address: str) -> Iterator[None]:
    """Connects to Ray, unless that has been done, and makes it talk of problems only."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a new instance would report to its makers
    own = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
    try:
        yield
    finally:
        ray.shutdown()


def _reason(error: BaseException) -> str:
    """The exception of the worker, where Ray's message holds its traceback; otherwise what Ray says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
