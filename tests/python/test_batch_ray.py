"""Batch jobs on Ray Data, on a cluster of two nodes on this machine, with processes killed in the middle."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import mixed_lines, records, run_job, wait_for_lines, write_lines
from fixmin_cli import FIXMIN, TIMEOUT
from toy_models import byte_level, write_model

import fixmin_cpp
from fixmin_cpp.batch import BatchReport

ray = pytest.importorskip("ray", reason="needs fixmin-cpp[ray]")

# What Ray itself does is not for these tests.
pytestmark = pytest.mark.filterwarnings("default")

SETTINGS: dict[str, Any] = {"options": {"top_p": 0.9}, "seed": 4, "token_ids": True, "n_parallel": 3}
N_LINES = 240


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes with one CPU each; nothing is reported anywhere, and nothing listens but on loopback."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Not 127.0.0.1, in whose place Ray puts the address of the machine when it connects.
        node = {"num_cpus": 1, "object_store_memory": 80 << 20}
        head = {**node, "node_ip_address": "127.0.0.2", "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**node, node_ip_address="127.0.0.3")
        cluster.wait_for_nodes()
        yield cluster.address
        cluster.shutdown()


@pytest.fixture(scope="module")
def slow_model_path(folder: Path) -> Path:
    return write_model(folder / "slow-ray.gguf", byte_level(), embedding_length=128, block_count=6, context_length=256)


@pytest.fixture(scope="module")
def job(slow_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Model, input, and the records of a run without Ray."""
    folder = tmp_path_factory.mktemp("ray")
    source = write_lines(folder / "in.jsonl", [b"\n", *mixed_lines(N_LINES), b"\n"])
    run_job(slow_model_path, source, folder / "local.jsonl", **SETTINGS)
    return slow_model_path, source, records(folder / "local.jsonl")


def actors() -> list[dict[str, Any]]:
    """Those of the job that runs: pid, node and restarts."""
    table = ray._private.state.actors().values()
    return [actor for actor in table if actor["State"] == "ALIVE" and "MapWorker" in actor["ActorClassName"]]


def at(n: int, action: Callable[[], None]) -> Callable[[BatchReport], None]:
    """A progress callback that acts once, after so many lines."""
    return lambda report: action() if report.n_done == n else None


def test_two_nodes_give_what_this_process_gives(address, job, tmp_path):
    model, source, expected = job
    seen: list[dict[str, Any]] = []
    progress = at(N_LINES // 2, lambda: seen.extend(actors()))
    report = run_job(model, source, tmp_path / "out", ray_address=address, ray_lines=9, progress=progress, **SETTINGS)
    assert records(tmp_path / "out") == expected
    assert len({actor["Address"]["NodeID"] for actor in seen}) == 2
    assert (report.n_done, report.n_resumed) == (N_LINES, 0)
    assert report.n_errors == sum(i % 7 == 3 for i in range(N_LINES))
    assert not (tmp_path / "out.resume").exists()
    assert not ray.is_initialized()


def test_a_worker_killed_in_the_middle(address, job, tmp_path):
    model, source, expected = job
    killed: list[int] = []
    restarted: list[dict[str, Any]] = []

    def kill() -> None:
        killed.extend(actor["Pid"] for actor in actors())
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    def look(report: BatchReport) -> None:
        if report.n_done == 40:
            kill()
        if report.n_done == N_LINES - 10:
            restarted.extend(actors())

    run_job(model, source, tmp_path / "out", ray_address=address, ray_lines=7, progress=look, **SETTINGS)
    assert len(killed) == 2
    assert records(tmp_path / "out") == expected
    assert any(actor["NumRestarts"] >= 1 and actor["Pid"] not in killed for actor in restarted)


def test_the_process_that_started_it_killed_and_started_again(address, job, tmp_path):
    model, source, expected = job
    out = tmp_path / "out"
    command = [*FIXMIN, "batch", str(source), str(out), "-m", str(model), "--json", "--ray", address]
    command += ["--ray-lines", "5", "--ray-actors", "2", "--threads", "1", "--top-p", "0.9", "--seed", "4"]
    command += ["--token-ids", "--parallel", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_lines(out, 60, process)
        process.kill()
        process.communicate(timeout=TIMEOUT)
    assert records(out)[: len(records(out)) - 1] == expected[: len(records(out)) - 1]
    result = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result.stderr.decode()
    summary = json.loads(result.stdout)
    assert 60 <= summary["n_resumed"] < N_LINES
    assert records(out) == expected


def test_a_piece_is_not_tried_for_ever():
    from fixmin_cpp.batch_ray import _Attempts

    attempts = _Attempts(2)
    begun = [attempts.begin(first) for first in (1, 6, 1, 1, 6, 6)]
    assert begun == [True, True, True, False, True, False]


def test_a_job_begun_here_ends_there(address, job, tmp_path):
    model, source, expected = job

    def stop() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        run_job(model, source, tmp_path / "out", progress=at(100, stop), **SETTINGS)
    report = run_job(model, source, tmp_path / "out", ray_address=address, **SETTINGS)
    assert report.n_resumed == 100
    assert records(tmp_path / "out") == expected


def test_errors(address, job, tmp_path):
    model, source, expected = job
    out = tmp_path / "out"
    with pytest.raises(fixmin_cpp.FixminError, match=r"line 5: temperature must be between"):
        run_job(model, source, out, ray_address=address, fail_fast=True, **SETTINGS)
    assert records(out) == expected[:3]
    with pytest.raises(fixmin_cpp.ArgumentError, match="room for 2 actors of 1 CPUs, not for 3"):
        run_job(model, source, out, ray_address=address, ray_actors=3, **SETTINGS)
    with pytest.raises(fixmin_cpp.ArgumentError, match="room for 0 actors of 2 CPUs"):
        run_job(model, source, out, ray_address=address, n_threads=2, **SETTINGS)
    with pytest.raises(fixmin_cpp.FixminError, match="n_ctx"):
        run_job(model, source, tmp_path / "new", ray_address=address, n_ctx=10**6, **SETTINGS)
