"""fixmin_cpp.generate() and its cache, system_info(), and what the package offers."""

import json
import os
import shutil
import threading

import numpy as np
import pytest
from toy_models import byte_level, write_model

import fixmin_cpp
from fixmin_cpp import api


@pytest.fixture(autouse=True)
def _empty_cache():
    fixmin_cpp.clear_cache()
    yield
    fixmin_cpp.clear_cache()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that models were loaded from, in order."""
    paths: list[str] = []

    class Counted(fixmin_cpp.Model):
        def __init__(self, path, **settings):
            paths.append(os.path.basename(path))
            super().__init__(path, **settings)

    monkeypatch.setattr(api, "Model", Counted)
    return paths


def test_one_call_equals_the_model(model, model_path):
    expected = model.generate("the cat", max_new_tokens=8, temperature=0.7, seed=2)
    completion = fixmin_cpp.generate(model_path, "the cat", max_new_tokens=8, temperature=0.7, seed=2)
    assert (completion.text, completion.token_ids) == (expected.text, expected.token_ids)
    assert len(fixmin_cpp.generate(str(model_path), ["a", "b"], max_new_tokens=1)) == 2


def test_a_file_is_loaded_once(model_path, loads, tmp_path):
    for _ in range(3):
        fixmin_cpp.generate(model_path, "a", max_new_tokens=1)
    fixmin_cpp.generate(os.path.relpath(model_path), "a", max_new_tokens=1)
    assert len(loads) == 1
    fixmin_cpp.clear_cache()
    fixmin_cpp.generate(model_path, "a", max_new_tokens=1)
    assert len(loads) == 2


def test_other_settings_load_again(model_path, loads):
    fixmin_cpp.generate(model_path, "a", max_new_tokens=1)
    fixmin_cpp.generate(model_path, "a", max_new_tokens=1, n_ctx=20)
    fixmin_cpp.generate(model_path, "a", max_new_tokens=1, n_ctx=20)
    assert len(loads) == 2
    with pytest.raises(fixmin_cpp.ContextLengthError):
        fixmin_cpp.generate(model_path, [1] * 20, n_ctx=20)


def test_a_changed_file_is_loaded_again(model_path, loads, tmp_path):
    path = tmp_path / "m.gguf"
    shutil.copy(model_path, path)
    before = fixmin_cpp.generate(path, "the cat", max_new_tokens=5)
    write_model(path, byte_level(), seed=99)
    after = fixmin_cpp.generate(path, "the cat", max_new_tokens=5)
    assert loads == ["m.gguf"] * 2
    assert before.token_ids != after.token_ids


def test_the_models_used_last_are_kept(folder, loads):
    paths = [write_model(folder / f"cached{i}.gguf", byte_level(), seed=i) for i in range(3)]
    for i in (0, 1, 0, 2, 0, 1):  # 2 drives out 1, which was used less recently than 0; then 1 drives out 2
        fixmin_cpp.generate(paths[i], "a", max_new_tokens=1)
    assert loads == ["cached0.gguf", "cached1.gguf", "cached2.gguf", "cached1.gguf"]


def test_threads_share_one_model(model_path, loads):
    expected = fixmin_cpp.Model(model_path).generate("the cat", max_new_tokens=5).token_ids
    answers: list[list[int]] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(fixmin_cpp.generate(model_path, "the cat", max_new_tokens=5).token_ids)
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 6
    assert len(loads) == 1


def test_a_file_that_fails_is_not_kept(tmp_path, model_path, loads):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF nonsense")
    for _ in range(2):
        with pytest.raises(fixmin_cpp.GGUFError):
            fixmin_cpp.generate(path, "a")
    with pytest.raises(FileNotFoundError):
        fixmin_cpp.generate(tmp_path / "missing.gguf", "a")
    with pytest.raises(fixmin_cpp.ArgumentError, match="n_threads"):
        fixmin_cpp.generate(model_path, "a", n_threads=[1])
    assert len(api._cache) == 0


def test_system_info():
    info = fixmin_cpp.system_info()
    assert info["fixmin_cpp"] == fixmin_cpp.__version__
    assert info["isa"] in info["isas_supported"]
    assert set(info["isas_supported"]) <= set(info["isas_built"])
    assert info["default_threads"] >= 1
    assert info["numpy"] == np.__version__
    json.dumps(info)


def test_everything_named_is_there():
    for name in fixmin_cpp.__all__:
        assert getattr(fixmin_cpp, name) is not None
    assert fixmin_cpp.__version__.count(".") >= 2
