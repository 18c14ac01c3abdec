"""Tasks of lm-evaluation-harness (needs fixmin-cpp[compare])."""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..model import Model
from .results import Figure, TaskScore
from .store import Store, file_sha256, fingerprint

__all__ = ["Task", "load_tasks", "run_task"]


class Task:
    """A task or a group of tasks, and a fingerprint of everything that it asks."""

    def __init__(self, name: str, manager: Any) -> None:
        self.name, self.manager = name, manager
        try:
            leaves = manager.load(name)["tasks"]
        except KeyError as error:
            raise ArgumentError(
                f"lm-evaluation-harness knows no task {name!r}: `lm_eval ls tasks` lists them"
            ) from error
        self.fingerprint = fingerprint([_asked(task) for _, task in sorted(leaves.items())])


def _asked(task: Any) -> list[str]:
    """Settings and documents of a task as text. What it shows of functions has an address, which is no part of it."""
    config = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(task.dump_config().items())))
    documents = fingerprint([repr(document) for document in task.eval_docs])
    return [config, documents, *(file_sha256(path) for path in sorted(_code_of(vars(task.config))))]


def _code_of(value: Any) -> set[Path]:
    """The Python files beside those of all functions in a value: what they use may be in any."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return set().union(*map(_code_of, value))
    try:
        source = inspect.getsourcefile(value) if callable(value) else None
    except TypeError:  # of what is built in
        source = None
    return set() if source is None else set(Path(source).parent.glob("*.py"))


def load_tasks(names: Sequence[str], include_path: Path | None) -> list[Task]:
    """Tasks by name, the harness' own and those whose YAML files are in include_path.

    Raises:
        ArgumentError: there is no such task. OSError, or what `datasets` raises: its data cannot be had.
    """
    if not names:
        return []
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    return [Task(name, manager) for name in names]


def run_task(
    task: Task,
    model: Callable[[], Model],
    store: Store,
    key: dict[str, Any],
    *,
    limit: int | None,
    num_fewshot: int | None,
) -> list[TaskScore]:
    """All metrics of a task for a model, which is loaded only if they are not there yet.

    Args:
        limit: of documents; None: all. num_fewshot: None: as the task says.
        key: what else the result follows from.
    """
    settings = {"limit": limit, "num_fewshot": num_fewshot, "lm_eval": metadata.version("lm_eval")}
    key = {**key, **settings, "task": task.name, "fingerprint": task.fingerprint}
    saved = store.load("task", key)
    if saved is None:
        scores = _evaluate(task, model(), limit, num_fewshot)
        saved = [asdict(score) for score in scores]
        store.save("task", key, saved)
    return [TaskScore(**{**score, "figure": Figure(**score["figure"])}) for score in saved]


def _evaluate(task: Task, model: Model, limit: int | None, num_fewshot: int | None) -> list[TaskScore]:
    import lm_eval

    from ..lm_eval_model import FixMinLM

    found = lm_eval.simple_evaluate(
        model=FixMinLM(model),
        tasks=[task.name],
        task_manager=task.manager,
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=1000,  # of metrics without a formula for their error; accuracies have one
        log_samples=False,
    )
    figures = {**found["results"], **found.get("groups", {})}
    shown = {task.name: figures[task.name]} if task.name in figures else figures
    return [score for name, values in shown.items() for score in _scores(name, values, found.get("n-samples", {}))]


def _scores(name: str, values: dict[str, Any], n_samples: dict[str, Any]) -> list[TaskScore]:
    """The harness' "acc,none": 0.5, "acc_stderr,none": 0.02 (or "N/A"), ... as scores."""
    scores = []
    for label, value in values.items():
        metric, comma, filter_name = label.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        figure = Figure(float(value), float(error) if isinstance(error, int | float) else None)
        scores.append(TaskScore(name, metric, filter_name, figure, n_samples.get(name, {}).get("effective")))
    return scores
