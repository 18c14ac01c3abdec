"""Threads by the work of a step: the choice on made-up machines, and that it changes no bit."""

import numpy as np
import pytest
from engine_runs import score
from gguf_factory import make_model

from fixmin_cpp import _core
from fixmin_cpp.errors import ArgumentError

MS = 1e6


class Machine:
    """Times of steps: work shared by the threads, 1 us and more for each barrier, and where there are more threads than
    free CPUs, now and then one that is away for a time slice while the others wait for it."""

    def __init__(self, cpus, *, barriers, seed=0, noise=0.05):
        self.cpus, self.barriers, self.busy = cpus, barriers, 0
        self.noise = noise
        self.rng = np.random.default_rng(seed)

    def step(self, work, threads):
        ns = work / threads + (self.barriers * 500 * threads if threads > 1 else 0)
        if threads > 1 and threads + self.busy > self.cpus:
            share = min(1.0, (threads + self.busy - self.cpus) / threads)
            ns = ns * (1 + share / 2) + self.rng.poisson(min(self.barriers / 4, 1 + ns / (3 * MS)) * share) * 3 * MS
        return ns * (1 + self.noise * self.rng.random())


def mean_time(machine, work, threads):
    return sum(machine.step(work, threads) for _ in range(1000)) / 1000


def run(machine, team, work, seconds, n_tokens=1):
    """Nanoseconds per step over so long, and the sizes that were taken."""
    total, sizes = 0.0, []
    while total < seconds * 1e9:
        sizes.append(team.choose(n_tokens, work))
        ns = machine.step(work, sizes[-1])
        team.record(ns)
        total += ns
    return total / len(sizes), sizes


@pytest.mark.parametrize("cpus", [2, 4, 16])
@pytest.mark.parametrize("busy", [0, 1, 2])
@pytest.mark.parametrize(("work", "barriers"), [(0.24 * MS, 20), (3 * MS, 40), (40 * MS, 160)])
def test_never_much_slower_than_the_best_fixed_size(cpus, busy, work, barriers):
    machine = Machine(cpus, barriers=barriers)
    machine.busy = busy
    best = min(mean_time(machine, work, n) for n in range(1, cpus + 1))
    team = _core.TeamSize(cpus)
    run(machine, team, work, 3)
    assert best / run(machine, team, work, 5)[0] > 0.9


def test_follows_what_the_machine_gives():
    machine = Machine(2, barriers=20)
    team = _core.TeamSize(2)
    work = 2 * MS
    run(machine, team, work, 3)
    assert np.mean(run(machine, team, work, 2)[1]) > 1.9
    machine.busy = 1
    run(machine, team, work, 1)
    assert np.mean(run(machine, team, work, 2)[1]) < 1.1
    machine.busy = 0
    run(machine, team, work, 6)
    assert np.mean(run(machine, team, work, 2)[1]) > 1.9


def test_a_small_model_beside_a_busy_process_begins_alone_and_is_hardly_disturbed():
    """From the first step on: two threads take eighty times as long here."""
    team = _core.TeamSize(2)
    sizes, total = [], 0.0
    for _ in range(4000):
        sizes.append(team.choose(1, 0.24 * MS))
        ns = (20 if sizes[-1] == 2 else 0.24) * MS
        total += ns
        team.record(ns)
    assert set(sizes[:200]) == {1}
    assert 2 in sizes  # it has been tried
    assert 0.24 * MS * 4000 / total > 0.9


def test_a_large_step_begins_with_all_threads():
    assert _core.TeamSize(16).choose(1, 40 * MS) == 16
    assert _core.TeamSize(16).choose(1, 4.5 * MS) == 4
    assert _core.TeamSize(3).choose(512, 1000 * MS) == 3


def test_kinds_of_steps_are_apart():
    """Prompts are worth two threads where tokens one by one are not."""
    alone, both = Machine(2, barriers=200), Machine(2, barriers=20)
    team = _core.TeamSize(2)
    tokens, prompts = [], []
    for _ in range(300):
        for _ in range(20):
            tokens.append(team.choose(1, 0.2 * MS))
            team.record(alone.step(0.2 * MS, tokens[-1]))
        prompts.append(team.choose(512, 20 * MS))
        team.record(both.step(20 * MS, prompts[-1]))
    assert np.mean(tokens) < 1.1
    assert np.mean(prompts) > 1.9


def test_one_thread_is_always_one():
    team = _core.TeamSize(1)
    assert {team.choose(n, 1e9) for n in (1, 7, 512)} == {1}
    team.record(1e9)


def test_bits_while_the_size_changes(tmp_path, monkeypatch):
    """A text that is scored again and again for longer than the first trial takes to come."""
    path = str(make_model(tmp_path / "m.gguf", weight_type="Q8_0", context_length=256))
    ids = np.arange(200, dtype=np.uint32) % 100
    expected = score(_core.Engine(path, n_threads=1), ids).tobytes()
    monkeypatch.setenv("FIXMIN_TEAM", "auto")
    engine = _core.Engine(path, n_threads=4, n_batch=16)
    assert {score(engine, ids).tobytes() for _ in range(30)} == {expected}
    assert engine.info["n_threads"] == 4


def test_unknown_team(tmp_path, monkeypatch):
    monkeypatch.setenv("FIXMIN_TEAM", "many")
    with pytest.raises(ArgumentError, match="FIXMIN_TEAM is 'many'; known: auto, fixed"):
        _core.Engine(str(make_model(tmp_path / "m.gguf")), device="cpu")  # whose team it is


def test_a_disturbed_team_is_left_soon():
    """Two threads take 500 ms on a crowded machine where one takes 50: that needs no credit for so long a step."""
    team = _core.TeamSize(2)
    sizes = []
    for _ in range(40):
        sizes.append(team.choose(1, 2.6 * MS))
        team.record((500 if sizes[-1] == 2 else 50) * MS)
    assert sizes.index(1) <= 2
    assert sizes[-20:].count(1) >= 18
