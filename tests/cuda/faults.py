"""A GPU without memory, one that fails, processes that fork. Run by test_suite.py, with an emulated GPU."""

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated_state import NOTHING, fail_allocation, fail_launch, held
from gguf_factory import make_model

import fixmin_cpp
from fixmin_cpp import DeviceError, Model

FORKS = Path(__file__).with_name("forks.py")
SIZES = {"vocab_size": 100, "weight_type": "Q8_0", "embedding_length": 32, "head_count": 2, "feed_forward_length": 64}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model.gguf", **SIZES, code_kind="table")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    assert held() == NOTHING
    yield
    fail_allocation(0)
    fail_launch(0)
    assert held() == NOTHING


def answer(model: Model) -> list[int]:
    return list(model.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True).token_ids)


def attempt(do: Callable[[], Any]) -> tuple[Any, tuple[type, str] | None]:
    """What it returns or what it raises: without the traceback, which would hold the model."""
    try:
        return do(), None
    except Exception as error:
        return None, (type(error), str(error))


def test_memory_that_is_lacking_at_every_allocation(path: Path) -> None:
    with Model(path, device="cuda") as other:
        expected = answer(other)
        before = held()
        number = 0
        while True:
            number += 1
            fail_allocation(number)
            model, error = attempt(lambda: Model(path, device="cuda"))
            if error is None:
                break
            assert error[0] is MemoryError
            assert re.match(rf"{path}: not enough memory: the emulated GPU has no \d+ bytes for \w+", error[1])
            assert held() == before
            assert answer(other) == expected
        fail_allocation(0)
        assert number > 1
        assert answer(model) == expected
        model.close()
        assert held() == before


def test_memory_that_is_lacking_later(path: Path) -> None:
    with Model(path, device="cuda") as model, model.native() as engine:
        expected = answer(model)
        before = held()
        for number in (1, 2):
            fail_allocation(number)
            with pytest.raises(MemoryError, match=r"the emulated GPU has no \d+ bytes for what is read"):
                engine.read_ceiling(1 << 20, 1)
            assert held() == before
        assert answer(model) == expected


def test_memory_that_is_lacking_within_a_request(path: Path) -> None:
    """A step that comes again and again may need some."""
    with Model(path, device="cuda") as other:
        expected = answer(other)
    with Model(path, device="cuda") as model:
        fail_allocation(1)
        found, error = attempt(lambda: answer(model))
        assert found == expected if error is None else error[0] is MemoryError
        fail_allocation(0)
        assert answer(model) == expected


def test_loading_that_is_cancelled(path: Path) -> None:
    with pytest.raises(fixmin_cpp.FixminError, match="cancelled"):
        Model(path, device="cuda", progress=lambda done: done < 0.5)


def test_a_gpu_that_fails_at_every_launch_of_a_request(path: Path) -> None:
    with Model(path, device="cuda") as other:
        expected = answer(other)
        number, step = 0, 1
        while True:
            number += step
            with Model(path, device="cuda") as model:
                fail_launch(number)
                found, error = attempt(functools.partial(answer, model))
                if error is None:
                    assert found == expected
                    break  # the request takes fewer launches
                assert error == (DeviceError, "the emulated GPU has failed")
                # It fails for good; others and the CPU do not.
                for _ in range(2):
                    with pytest.raises(DeviceError, match="has failed"):
                        answer(model)
                with pytest.raises(DeviceError, match="has failed"):
                    model.logits([1, 2])
                with pytest.raises(DeviceError, match="has failed"):
                    model.score([1, 2])
                assert answer(other) == expected
            step = 1 + number // 8
        fail_launch(0)
        assert number > 20
        with Model(path, device="cpu") as cpu, Model(path, device="cuda") as again:
            assert answer(cpu) == answer(again) == expected


def test_a_gpu_that_fails_beneath_a_stream_and_many_requests(path: Path, tmp_path: Path) -> None:
    with Model(path, device="cuda") as model:
        stream = model.stream([1, 2], max_new_tokens=40, ignore_eos=True)
        next(stream)
        fail_launch(30)
        with pytest.raises(DeviceError, match="has failed"):
            list(stream)
        with pytest.raises(DeviceError, match="has failed"):
            model.generate([[1], [2], [3]], max_new_tokens=4)
        with pytest.raises(DeviceError, match="has failed"):
            model.save_state(tmp_path / "state", [1] * 40)
        assert not list(tmp_path.iterdir())


def test_a_gpu_that_fails_while_an_importance_matrix_is_made(path: Path) -> None:
    from fixmin_cpp import _core

    engine = _core.Engine(str(path), device="cuda")
    squares = _core.InputSquares(engine)
    fail_launch(5)
    with pytest.raises(DeviceError, match="has failed"):
        squares.add(engine, [1, 2, 3])
    engine.close()


def test_fork(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", FORKS, path], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    request, loading, parent = done.stdout.splitlines()
    reason = "this process was forked from one that has used "
    assert request.startswith(f"DeviceError {reason}")
    assert loading.startswith(f"UnsupportedError {path}: device 'cuda': {reason}")
    assert parent == "parent"
