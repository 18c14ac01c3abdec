"""Batch jobs on Ray Data, on a cluster of two nodes on this machine, with processes and a node killed in the middle."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import mixed_lines, records, run_job, wait_for_lines, write_lines
from fixmin_cli import FIXMIN, TIMEOUT, fixmin
from toy_models import byte_level, write_model

import fixmin_cpp
from fixmin_cpp.batch import BatchReport
from fixmin_cpp.batch_lines import Line
from fixmin_cpp.batch_work import Result

ray = pytest.importorskip("ray", reason="needs fixmin-cpp[ray]")
pytest.importorskip("ray.data", reason="needs fixmin-cpp[ray]")

# What Ray itself does is not for these tests.
pytestmark = [pytest.mark.external, pytest.mark.filterwarnings("default")]

SETTINGS: dict[str, Any] = {"options": {"top_p": 0.9}, "seed": 4, "token_ids": True, "n_parallel": 3}
COMMAND = ["--threads", "1", "--top-p", "0.9", "--seed", "4", "--token-ids", "--parallel", "3"]
N_LINES = 30
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


def patiently(start: Callable[[], Any]) -> Any:
    """Ray gives a node 30 seconds to start, which is in its code; a busy machine takes longer at times."""
    for _ in range(3):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with one CPU each, and this process connected: each connection would cost seconds."""
    from ray.cluster_utils import Cluster

    # A dead node is noticed after five failed calls of its port; one that is only slow has ten seconds for each.
    config = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported anywhere
        head = {**NODE, "include_dashboard": False, "_system_config": config}
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        patiently(lambda: cluster.add_node(**NODE))
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        # Where the cores are busy, one actor could be done with everything before the other one is there.
        ray.data.DataContext.get_current().wait_for_min_actors_s = TIMEOUT
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def job(folder: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Model, input, and the records of a run without Ray."""
    model = write_model(folder / "slow-ray.gguf", byte_level(), embedding_length=256, block_count=8, context_length=256)
    # The first piece is short: when it is delivered, the others are being worked on.
    lines = [b"\n", *mixed_lines(5), *mixed_lines(N_LINES - 5, longer=200), b"\n"]
    source = write_lines(folder / "ray.jsonl", lines)
    run_job(model, source, folder / "local.jsonl", **SETTINGS)
    return model, source, records(folder / "local.jsonl")


def actors() -> list[dict[str, Any]]:
    """All actors of jobs up to now, also dead ones: state, id, pid and node."""
    table = ray._private.state.actors().values()
    return [actor for actor in table if "MapWorker" in actor["ActorClassName"]]


def die_at(monkeypatch: pytest.MonkeyPatch, numbers: Sequence[int], marks: Path | None) -> None:
    """Workers kill themselves at the first result of the pieces that begin with these lines; with `marks` only once.

    From the driver, they would often have been found idle, where a machine is fast or Ray is slow.
    """
    from fixmin_cpp import batch_ray

    class Killed(batch_ray._Worker):
        def _results(self, piece: list[Line]) -> Iterator[Result]:
            for result in super()._results(piece):
                mark = marks / str(piece[0].number) if marks else None
                if piece[0].number in numbers and not (mark and mark.exists()):
                    if mark:
                        mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                yield result

    monkeypatch.setattr(batch_ray, "_Worker", Killed)


def at(n: int, action: Callable[[], object]) -> Callable[[BatchReport], None]:
    """A progress callback that acts once, when the output has so many lines."""

    def progress(report: BatchReport) -> None:
        if report.n_done == n:
            action()

    return progress


def run_on_ray(job: Any, out: Path, **arguments: Any) -> BatchReport:
    return run_job(job[0], job[1], out, **{**SETTINGS, "ray_address": "auto", "ray_lines": 5, **arguments})


def test_a_model_is_sent_to_a_task(cluster, folder):
    """By its path and how it was loaded: the task loads it again."""
    path = write_model(folder / "sent.gguf", byte_level())

    @ray.remote(num_cpus=1)
    def answer(model: fixmin_cpp.Model) -> tuple[Any, ...]:
        return os.getpid(), model.path, model.n_ctx, model.generate("the cat", max_new_tokens=5).token_ids

    with fixmin_cpp.Model(path, n_threads=1, n_ctx=48, kv_type="f32") as model:
        expected = model.generate("the cat", max_new_tokens=5).token_ids
        pid, *rest = ray.get(answer.remote(model))
        assert rest == [str(path), 48, expected]
        assert pid != os.getpid()


def test_two_nodes_give_what_this_process_gives(cluster, job, tmp_path):
    before = {actor["ActorID"] for actor in actors()}
    report = run_on_ray(job, tmp_path / "out")
    assert records(tmp_path / "out") == job[2]
    assert len({actor["Address"]["NodeID"] for actor in actors() if actor["ActorID"] not in before}) == 2
    assert (report.n_done, report.n_resumed) == (N_LINES, 0)
    assert report.n_errors == 1 + 4  # every seventh of 5 and of 25, from the fourth on
    assert not (tmp_path / "out.resume").exists()
    assert ray.is_initialized()  # the connection was there before


def test_workers_killed_in_the_middle(cluster, job, tmp_path, monkeypatch):
    killed_at = (7, 17)  # lines where pieces begin
    before = {actor["ActorID"] for actor in actors()}
    die_at(monkeypatch, killed_at, tmp_path)
    run_on_ray(job, tmp_path / "out")
    assert records(tmp_path / "out") == job[2]
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [*killed_at]
    restarts = [actor["NumRestarts"] for actor in actors() if actor["ActorID"] not in before]
    assert sum(restarts) >= 1  # the job went on with them


def test_begun_here_killed_on_ray_and_ended_on_ray(cluster, job, tmp_path):
    model, source, expected = job
    out = tmp_path / "out"

    def stop() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        run_job(model, source, out, progress=at(8, stop), **SETTINGS)
    assert records(out) == expected[:8]
    command = [*FIXMIN, "batch", str(source), str(out), "-m", str(model), *COMMAND, "--ray", cluster.address]
    with subprocess.Popen([*command, "--ray-lines", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_lines(out, 9, process)
        process.kill()
        process.communicate(timeout=TIMEOUT)
    n_left = out.read_bytes().count(b"\n")
    report = run_on_ray(job, out)
    assert report.n_resumed == n_left < N_LINES
    assert records(out) == expected


def test_errors(cluster, job, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(fixmin_cpp.FixminError, match=r"ray.jsonl, line 5: temperature must be between"):
        run_on_ray(job, out, fail_fast=True)
    assert records(out) == job[2][:3]
    with pytest.raises(fixmin_cpp.ArgumentError, match="room for 2 actors of 1 CPUs, not for 3"):
        run_on_ray(job, out, ray_actors=3)
    with pytest.raises(fixmin_cpp.ArgumentError, match="room for 0 actors of 2 CPUs"):
        run_on_ray(job, out, n_threads=2)
    with pytest.raises(fixmin_cpp.FixminError, match="n_ctx"):
        run_on_ray(job, tmp_path / "new", n_ctx=10**6)


def test_a_piece_is_not_tried_for_ever(cluster, job, tmp_path, monkeypatch):
    monkeypatch.setattr("fixmin_cpp.batch_ray._MAX_ATTEMPTS", 2)
    die_at(monkeypatch, range(7, N_LINES), None)
    with pytest.raises(fixmin_cpp.FixminError, match=r"^lines \d+ to \d+: the actors .* died, again and again"):
        run_on_ray(job, tmp_path / "out")
    found = records(tmp_path / "out")
    assert len(found) <= 5  # those of the piece before line 7, if it was not tried too often beside another one
    assert found == job[2][: len(found)]


def test_a_node_lost_in_the_middle(cluster, job, tmp_path):
    """A third node has room for the actor of the one that dies."""
    patiently(lambda: cluster.add_node(**NODE))
    cluster.wait_for_nodes()
    lost: list[str] = []

    def lose() -> None:
        used = {actor["Address"]["NodeID"] for actor in actors() if actor["State"] == "ALIVE"}
        node = next(n for n in cluster.list_all_nodes() if n.node_id in used and n is not cluster.head_node)
        lost.append(node.node_id)
        cluster.remove_node(node, allow_graceful=False)

    run_on_ray(job, tmp_path / "out", ray_actors=2, progress=at(1, lose))
    assert records(tmp_path / "out") == job[2]
    assert [node["NodeID"] for node in ray.nodes() if not node["Alive"]] == lost


def test_an_instance_of_its_own(job, tmp_path):
    model, _, expected = job
    source = write_lines(tmp_path / "in", [b"\n", *mixed_lines(3)])
    result = fixmin("batch", source, tmp_path / "out", "-m", model, *COMMAND, "--ray", "local", "--json")
    assert result.returncode == 0, result.stderr.decode()  # which has warnings of Ray, too
    assert json.loads(result.stdout)["n_done"] == 3
    assert records(tmp_path / "out") == expected[:3]


def test_actors_that_fit():
    from fixmin_cpp.batch_ray import _pool

    # Nodes of so many CPUs and GPUs; wanted actors and threads; GPUs of each.
    assert _pool([(8, 0), (4, 2)], None, None, 0) == (2, 4)
    assert _pool([(8, 0), (4, 0)], None, 2, 0) == (2, 2)
    assert _pool([(8, 0), (4, 0)], 5, 2, 0) == (5, 2)
    assert _pool([(8, 0), (16, 4), (6, 2)], None, None, 1) == (6, 3)
    assert _pool([(16, 4)], None, None, 0.5) == (8, 2)
    assert _pool([(16, 4)], None, None, 2) == (2, 8)
    assert _pool([(2, 4)], None, 1, 1) == (2, 1)
    for nodes, actors, n_threads, gpus, message in (
        ([(0, 0)], None, None, 0, "has no CPUs"),
        ([(8, 0)], None, None, 1, "has no GPUs for actors of 1"),
        ([(8, 1)], None, None, 2, "has no GPUs for actors of 2"),
        ([(8, 2)], 3, None, 1, "room for 2 actors of 4 CPUs and 1 GPUs, not for 3: its nodes have 8 CPUs and 2 GPUs"),
        ([(8, 0), (4, 0)], 13, 1, 0, "room for 12 actors of 1 CPUs, not for 13: its nodes have 8, 4"),
    ):
        with pytest.raises(fixmin_cpp.ArgumentError, match=message):
            _pool(nodes, actors, n_threads, gpus)
