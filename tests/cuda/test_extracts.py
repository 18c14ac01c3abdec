"""Tokens that are drawn from what a GPU says of the logits: those of the CPU, which sees the logits."""

import json
import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulation import SEARCH_PATH
from test_races import program

pytestmark = pytest.mark.slow

#: Barriers of blocks in extracts.cuh; each is left out once.
N_BARRIERS = 11
OFF = dict(top_k=0, top_p=1.0, min_p=0.0)


def bits(allowed):
    padded = np.zeros(-len(allowed) % 32 + len(allowed), bool)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


def rows_of(v: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    normal = rng.normal(0, 3, v)
    holes = np.where(rng.random(v) < 0.97, -np.inf, normal)
    holes[v // 2] = 1.0
    return {
        "normal": normal,
        "peaked": normal - 30 * rng.random(v) ** 0.2,
        "falling": 20 - 4 * np.log1p(np.arange(v)) + rng.normal(0, 0.3, v),  # low ids are the frequent ones
        "flat": rng.normal(0, 0.01, v),
        "ties": np.round(normal),
        "equal": np.full(v, -1.5),
        "signed zeros": np.where(rng.random(v) < 0.5, 0.0, -0.0),
        "steep": normal * 1e37,
        "mostly -infinity": holes,
        "one left": np.where(np.arange(v) == v - 1, 2.0, -np.inf),
        "none left": np.full(v, -np.inf),
        "nan": np.where(np.arange(v) == v - 2, np.nan, normal),
        "infinity": np.where(np.arange(v) == 3, np.inf, normal),
    }


def random_settings(rng: np.random.Generator) -> dict[str, float]:
    """One of the chains that the extracts are for, and sometimes something that they are not for."""
    pick = rng.choice
    one = dict(temperature=pick([0.0, 0.3, 0.8, 1.0, 1.7, 1e-30, 1e30], p=[0.15, 0.1, 0.3, 0.2, 0.15, 0.05, 0.05]))
    one |= dict(top_k=int(pick([0, 0, 1, 3, 40, 256, 300])), top_p=pick([1.0, 1.0, 0.1, 0.5, 0.95, 0.9999, 1 - 1e-7]))
    one |= dict(min_p=pick([0.0, 0.0, 0.001, 0.05, 0.5, 1.0]), min_keep=int(pick([0, 0, 0, 2, 30, 255, 257])))
    rare = [
        dict(xtc_probability=0.5),
        dict(typical_p=0.6),
        dict(dynatemp_range=0.3),
        dict(top_n_sigma=1.0),
        dict(mirostat=2),
        dict(presence_penalty=0.5),
        dict(min_new_tokens=6),
        dict(ban=3),
        dict(ban=1, only=7),
    ]
    if rng.random() < 0.3:
        one |= pick(rare)
    return one | dict(seed=int(rng.integers(1 << 62)), step=int(rng.integers(10)))


def draw(path: Path, folder: Path, rows, masks, samples, **environment) -> list[tuple[str, str]]:
    v = len(rows[0])
    np.concatenate([rows]).astype(np.float32).tofile(folder / "rows")
    np.concatenate([*masks, np.zeros(1, np.uint32)]).tofile(folder / "masks")
    lines = "".join(" ".join(f"{name}={value}" for name, value in one.items()) + "\n" for one in samples)
    done = draw_only(path, folder, v, lines, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(line.split()) for line in done.stdout.splitlines()]


def draw_only(path: Path, folder: Path, v: int, lines: str, **environment) -> subprocess.CompletedProcess[str]:
    command = [path.with_name("extracts_main"), str(v), folder / "rows", folder / "masks"]
    env = {"PATH": SEARCH_PATH, "TSAN_OPTIONS": "halt_on_error=1", **environment}
    return subprocess.run(command, input=lines, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checked():
    return program("address,undefined")


@pytest.mark.parametrize(("v", "n_samples"), [(77, 600), (1024, 300), (5000, 300), (12345, 200), (65536, 150)])
def test_tokens_are_those_of_the_rows(checked, tmp_path, v, n_samples):
    rng = np.random.default_rng(v)
    rows = rows_of(v, rng)
    masks = [bits(rng.random(v) < share) for share in (0.9, 0.02, 0.0005)] + [bits(np.ones(v, bool))]
    samples = []
    for _ in range(n_samples):
        one = random_settings(rng) | dict(row=int(rng.integers(len(rows))))
        samples.append(one | (dict(mask=int(rng.integers(len(masks)))) if rng.random() < 0.3 else {}))
    found = draw(checked, tmp_path, list(rows.values()), masks, samples, FIXMIN_SIMT_SEED="5")
    assert len(found) == n_samples
    wrong = [
        (expected, got, sample, list(rows)[sample["row"]])
        for (expected, got), sample in zip(found, samples, strict=True)
        if got not in ("unasked", "lacking", expected)
    ]
    assert wrong == []
    assert not any(expected == "error" and got.isdigit() for expected, got in found)
    n_decided = sum(got.isdigit() for _, got in found)
    assert n_decided > 0.35 * n_samples  # else this would compare little


COMMON = {
    "greedy": dict(temperature=0.0),
    "the defaults": dict(temperature=0.8),
    "top_k": dict(temperature=1.0, **OFF | dict(top_k=256)),
    "top_p": dict(temperature=1.0, **OFF | dict(top_p=0.9)),
    "min_p": dict(temperature=1.3, **OFF | dict(min_p=0.05)),
    "the model's own": dict(temperature=1.0, **OFF),
    "banned": dict(temperature=0.8, ban=2, only=2),
    "a chain behind top_k": dict(temperature=0.8, typical_p=0.9, xtc_probability=1.0, dynatemp_range=0.4),
}


@pytest.mark.parametrize("v", [77, 5000, 32000])
def test_the_common_chains_need_no_row(checked, tmp_path, v):
    rng = np.random.default_rng(0)
    rows = rows_of(v, rng)
    row = rows["falling"]
    few = bits(np.isin(np.arange(v), rng.choice(v, 30)))
    for mask in (dict(), dict(mask=0)):
        samples = [one | mask | dict(row=0, seed=seed) for one in COMMON.values() for seed in range(3)]
        found = draw(checked, tmp_path, [row], [few], samples)
        assert [got for _, got in found] == [expected for expected, _ in found]


def test_rows_are_asked_for_where_an_extract_is_not_enough(checked, tmp_path):
    rng = np.random.default_rng(1)
    rows = rows_of(12345, rng)
    flat, nan = rows["flat"], rows["nan"]
    lacking = [OFF | dict(top_p=0.95), OFF | dict(min_p=0.01), OFF | dict(min_p=1.0, min_keep=255)]
    samples = [one | dict(temperature=1.0, row=0) for one in lacking[:2]]
    samples += [dict(temperature=0.0, row=1), dict(temperature=1.0, row=1)]
    assert [got for _, got in draw(checked, tmp_path, [flat, nan], [], samples)] == ["lacking"] * 4


# --- races -------------------------------------------------------------------------------------------------------


def lines_for_every_barrier() -> str:
    samples = [dict(temperature=1.0, **OFF), dict(temperature=0.7, seed=5, **OFF)]
    samples += [OFF | dict(temperature=1.0, top_p=0.7), dict(temperature=0.8), dict(temperature=0.8, top_k=7)]
    return "".join(" ".join(f"{name}={value}" for name, value in one.items()) + "\n" for one in samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("races")
    np.random.default_rng(2).normal(0, 3, 12345).astype(np.float32).tofile(folder / "rows")
    np.zeros(1, np.uint32).tofile(folder / "masks")
    return folder


def test_no_races(folder):
    done = draw_only(program("thread"), folder, 12345, lines_for_every_barrier(), FIXMIN_SIMT_SEED="3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(len(set(line.split())) == 1 for line in done.stdout.splitlines())


@pytest.mark.parametrize("barrier", range(1, N_BARRIERS + 1))
def test_a_missing_barrier_is_found(barrier, folder):
    env = {"FIXMIN_SIMT_LEAVE_OUT": str(barrier)}
    done = draw_only(program("thread"), folder, 12345, lines_for_every_barrier(), **env)
    assert done.returncode != 0
    assert re.search(r"WARNING: ThreadSanitizer: data race.*?csrc/cuda/extracts\.cuh", done.stderr, re.DOTALL)


def test_there_are_so_many_barriers(folder):
    env = {"FIXMIN_SIMT_LEAVE_OUT": str(N_BARRIERS + 1)}
    assert draw_only(program("thread"), folder, 12345, lines_for_every_barrier(), **env).returncode == 0


# --- requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2])
def test_requests(emulated, tmp_path, seed):
    done = emulated(Path(__file__).with_name("drawn.py"), tmp_path, FIXMIN_SIMT_SEED=str(seed))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    differ = [name for name, one in found.items() if one["cuda"]["tokens"] != one["cpu"]["tokens"]]
    assert differ == []
    assert all(one["cpu"]["n_extracts"] == 0 for one in found.values())
    for name, one in found.items():
        expected = one["n_tokens"] if one["by_extracts"] else 0
        assert one["cuda"]["n_extracts"] >= expected, name
        assert one["by_extracts"] or one["cuda"]["n_extracts"] == 0, name
    assert math.prod(sum(one["by_extracts"] is how for one in found.values()) for how in (True, False)) > 0
