"""A batch job on Ray Data: the input is read where the job was started, actors answer, results come in order."""

import contextlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import ray
import ray.data

from .arguments import as_int
from .batch_lines import InputFile, Line, Settings
from .batch_output import Resumed
from .batch_work import ModelFile, Result, run_lines
from .errors import ArgumentError, FixminError
from .load_options import on_ray
from .model import Model

__all__ = ["run_on_ray"]

# Ray Data keeps something for every task: a long input is cut into larger pieces rather than into more.
_MAX_PIECES = 16_384
# Ray repeats a task whenever its actor or node dies. A line that kills every actor must not keep a cluster for ever.
_MAX_ATTEMPTS = 6

_LINES = pyarrow.schema([("number", pyarrow.int64()), ("offset", pyarrow.int64()), ("data", pyarrow.large_binary())])
_RESULTS = pyarrow.schema(
    [
        ("line", pyarrow.int64()),
        ("record", pyarrow.large_binary()),
        ("prompt_tokens", pyarrow.int64()),
        ("completion_tokens", pyarrow.int64()),
        ("error", pyarrow.large_string()),
        ("fatal", pyarrow.large_string()),  # why there are no results; the job ends
    ]
)


def run_on_ray(
    address: str,
    file: ModelFile,
    settings: Settings,
    lines: InputFile,
    resumed: Resumed,
    actors: int | None,
    lines_per_task: int | None,
    gpus: float | None,
) -> Generator[Result, None, None]:
    """The results of the lines that are left, in their order, while the cluster works on those that follow.

    A task whose actor dies is run again by another one. Its results are the same, and nothing of them is given before
    the task is done. Where this process is connected to Ray already, that connection is used and stays.

    Args:
        address: "auto", "HOST:PORT", or "local" for a Ray instance of its own.
        actors: number of models. lines_per_task, gpus: see run_batch.
    """
    device, n_gpus = on_ray(file.options.device, gpus)
    file = replace(file, options=replace(file.options, device=device))
    per_task = 4 * file.options.n_parallel if lines_per_task is None else as_int("ray_lines", lines_per_task, 1)
    per_task = max(per_task, -(-(lines.n_lines - resumed.n_records) // _MAX_PIECES))
    with _connection(address):
        nodes = [
            (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
            for node in ray.nodes()
            if node["Alive"]
        ]
        n_actors, n_threads = _pool(nodes, actors, file.options.n_threads, n_gpus)
        pieces = _pieces(lines, resumed, per_task)
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        attempts = ray.remote(_Attempts).options(num_cpus=0, label_selector=here).remote(_MAX_ATTEMPTS)
        # Not range(): its tasks want a CPU each and would wait for those of the pool for ever.
        dataset = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
            lambda batch: _read(lines, batch),
            batch_size=1,
            batch_format="numpy",
            num_cpus=0,  # the pool may have reserved all of them ...
            compute=ray.data.TaskPoolStrategy(size=1),  # ... and without a limit each piece would have its process
            label_selector=here,  # so that no other node needs the file
        )
        dataset = dataset.map_batches(
            _Worker,
            fn_constructor_args=(file, settings, n_threads, attempts),
            # A block, which is what one call of _read returns; with GPUs Ray wants to be told its rows.
            batch_size=per_task if n_gpus else None,
            batch_format="pyarrow",
            # Two pieces at a time: as the lines of one come to an end, the scheduler takes those of the next.
            compute=ray.data.ActorPoolStrategy(
                size=n_actors, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
            num_cpus=n_threads,
            num_gpus=n_gpus or None,
        )
        dataset.context.execution_options.preserve_order = True
        dataset.context.enable_progress_bars = False
        try:
            tables: Iterator[pyarrow.Table] = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
            for table in tables:
                for row in table.to_pylist():
                    if (reason := row.pop("fatal")) is not None:
                        raise FixminError(reason)
                    yield Result(**row)
        except ray.exceptions.RayError as error:
            raise FixminError(f"Ray: {_last_line(error)}") from error


class _Worker:
    """An actor: one model, which answers the lines of pieces."""

    def __init__(
        self, file: ModelFile, settings: Settings, n_threads: int, attempts: "ray.actor.ActorHandle[_Attempts]"
    ) -> None:
        self._attempts = attempts
        self._settings = settings
        self._n_parallel = file.options.n_parallel
        self._model: Model | Exception
        try:
            self._model = file.load(n_threads)
        except Exception as error:
            self._model = error  # raised from here, it would make Ray start actor after actor

    def __call__(self, lines: pyarrow.Table) -> pyarrow.Table:
        # An exception would reach the driver as the text of a traceback, which says everything but in its last line.
        try:
            rows = [vars(result) for result in self._results([Line(**row) for row in lines.to_pylist()])]
        except Exception as error:
            rows = [{"line": lines["number"][0].as_py(), "fatal": str(error) or type(error).__name__}]
        return pyarrow.Table.from_pylist(rows, _RESULTS)

    def _results(self, piece: list[Line]) -> Iterator[Result]:
        if isinstance(self._model, Exception):
            raise self._model
        first, last = piece[0].number, piece[-1].number
        if not ray.get(self._attempts.begin.remote(first)):
            raise FixminError(f"lines {first} to {last}: the actors or nodes that began them died, again and again")
        return run_lines(self._model, self._settings, piece, self._n_parallel)


class _Attempts:
    """How often each piece was begun: an actor of its own, which outlives those that die of a piece."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._begun: Counter[int] = Counter()

    def begin(self, first: int) -> bool:
        """Counts the piece that begins with this line; False: it has been tried often enough."""
        self._begun[first] += 1
        return self._begun[first] <= self._limit


def _read(lines: InputFile, batch: Any) -> pyarrow.Table:
    """The lines of a piece of the input, as a table; `batch` has one row, arrays by name."""
    piece = {name: int(column[0]) for name, column in batch.items()}
    found = itertools.islice(lines.lines(piece["number"], piece["offset"]), piece["n_lines"])
    return pyarrow.Table.from_pylist([line._asdict() for line in found], _LINES)


def _pieces(lines: InputFile, resumed: Resumed, per_piece: int) -> list[dict[str, int]]:
    """Where the pieces of the rest of the input begin, and how many lines each has."""
    rest = lines.lines(resumed.number, resumed.offset)
    pieces = []
    for first in rest:
        n_lines = 1 + sum(1 for _ in itertools.islice(rest, per_piece - 1))
        pieces.append({"number": first.number, "offset": first.offset, "n_lines": n_lines})
    return pieces


def _pool(
    nodes: Sequence[tuple[int, int]], actors: int | None, n_threads: int | None, n_gpus: float
) -> tuple[int, int]:
    """Number of actors and CPUs of each, on nodes of so many CPUs and GPUs.

    Without a wish: with GPUs as many as they have room for, else one per node, with the CPUs of the smallest node.
    """
    most = [(cpus, _per_node(gpus, n_gpus) if n_gpus else cpus) for cpus, gpus in nodes]
    most = [(cpus, n) for cpus, n in most if cpus > 0 and n > 0]
    if not most:
        raise ArgumentError("the Ray cluster has no " + (f"GPUs for actors of {n_gpus:g}" if n_gpus else "CPUs"))
    if n_threads is None:
        n_threads = min(max(1, cpus // n) if n_gpus else cpus for cpus, n in most)
    n_threads = as_int("n_threads", n_threads, 1)
    room = sum(min(cpus // n_threads, n) for cpus, n in most)
    wanted = room if n_gpus else min(room, len(most))
    n_actors = wanted if actors is None else as_int("ray_actors", actors, 1)
    if not 1 <= n_actors <= room:
        each = f"{n_threads} CPUs" + (f" and {n_gpus:g} GPUs" if n_gpus else "")
        have = (f"{cpus} CPUs and {gpus} GPUs" if n_gpus else str(cpus) for cpus, gpus in nodes if cpus > 0)
        raise ArgumentError(
            f"the Ray cluster has room for {room} actors of {each}, not for {max(n_actors, 1)}: its nodes have "
            f"{', '.join(have)}"
        )
    return n_actors, n_threads


def _per_node(gpus: int, each: float) -> int:
    """Actors that get `each` GPUs on a node: parts are of one GPU."""
    return gpus * int(1 / each + 1e-9) if each < 1 else gpus // int(each)


@contextlib.contextmanager
def _connection(address: str) -> Iterator[None]:
    """Connects to Ray, unless that has been done, and makes it talk of problems only."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there is no bar
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a new instance would report to its makers
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **own)
    try:
        yield
    finally:
        ray.shutdown()


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
