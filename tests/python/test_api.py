"""fixmin_cpp.generate() and its cache, system_info(), and what the package offers."""

import copy
import inspect
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from gguf_factory import make_model
from toy_models import byte_level, write_model

import fixmin_cpp
from fixmin_cpp import ArgumentTypeError, api
from fixmin_cpp.quantization import requantize


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


def test_every_option_of_model_may_be_given(model_path, loads, monkeypatch):
    given = {"n_threads": 1, "n_ctx": 40, "kv_type": "f32", "n_batch": 8, "n_kv": 64, "n_parallel": 2}
    seen = []
    load = api.Model
    monkeypatch.setattr(api, "Model", lambda path, **options: seen.append(options) or load(path, **options))
    fixmin_cpp.generate(model_path, "a", max_new_tokens=1, **given)
    assert given.items() <= seen[0].items()
    fixmin_cpp.generate(model_path, "a", max_new_tokens=1, n_kv=96, n_parallel=3)
    assert len(loads) == 2


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


# --- what a model says of itself, and pickling -------------------------------------------------------------------


def test_facts_of_a_model(model, model_path, bare_model):
    metadata = fixmin_cpp._core.GgufFile(str(model_path)).metadata
    assert model.vocab_size == metadata["fixmin.vocab_size"] == model.info["vocab_size"]
    assert model.n_ctx == metadata["fixmin.context_length"] == model.info["n_ctx"]
    assert model.eos_token_id == metadata["tokenizer.ggml.eos_token_id"] == model.info["eos_token_id"]
    assert (model.bos_token_id, bare_model.bos_token_id, bare_model.eos_token_id) == (None, None, None)
    assert bare_model.tokenizer is None
    assert repr(model) == f"<fixmin_cpp.Model '{model_path}' vocab_size=269 n_ctx=64 kv_type='f16'>"


@pytest.mark.parametrize(("given", "found"), [(1, 1), (0, 0), (269, None), (2**32 - 1, None)])
def test_token_that_begins_a_text(tmp_path, given, found):
    def add(writer):
        writer.add_uint32("tokenizer.ggml.bos_token_id", given)

    path = make_model(tmp_path / "m.gguf", vocab_size=269, edit=add)
    with fixmin_cpp.Model(path) as model:
        assert model.bos_token_id == found


def test_the_tokenizer_is_a_copy(model):
    tokenizer = model.tokenizer
    assert tokenizer is model.tokenizer
    assert tokenizer.encode("the cat", add_special_tokens=False).ids == model.encode("the cat")
    before = model.encode("the cat")
    tokenizer.enable_truncation(1)
    assert len(tokenizer.encode("the cat").ids) == 1
    assert model.encode("the cat") == before
    tokenizer.no_truncation()


def test_a_closed_model_and_one_that_was_never_loaded_have_a_name(model_path, tmp_path):
    model = fixmin_cpp.Model(model_path)
    model.close()
    assert repr(model).startswith(f"<fixmin_cpp.Model '{model_path}' closed")
    assert (model.vocab_size, model.n_ctx) == (269, 64)
    unborn = fixmin_cpp.Model.__new__(fixmin_cpp.Model)
    with pytest.raises(OSError, match="missing"):
        unborn.__init__(tmp_path / "missing.gguf")
    assert "missing.gguf" in repr(unborn)


@pytest.mark.parametrize("again", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy])
def test_a_copy_is_loaded_again_as_the_first_was(model_path, monkeypatch, again):
    monkeypatch.chdir(model_path.parent)
    settings = {"n_threads": 1, "n_ctx": 48, "kv_type": "f32", "n_batch": 16, "n_kv": 96, "n_parallel": 3}
    with fixmin_cpp.Model(model_path.name, **settings) as first, again(first) as second:
        assert second is not first
        assert second.path == str(model_path)  # wherever the other process is
        ours, theirs = first.info, second.info
        assert {name: theirs[name] for name in ours if name != "path"} == {n: ours[n] for n in ours if n != "path"}
        assert settings.items() <= second.__reduce__()[1][2].items()  # what the next copy would be loaded with
        expected = first.generate("the cat", max_new_tokens=5).token_ids
        first.close()  # each has its own engine
        assert second.generate("the cat", max_new_tokens=5).token_ids == expected


def test_a_subclass_and_a_closed_model_as_pickles(model_path):
    with Named(model_path) as named, pickle.loads(pickle.dumps(named)) as again:
        assert type(again) is Named
    with pytest.raises(fixmin_cpp.FixminError, match="closed"):
        pickle.dumps(named)


class Named(fixmin_cpp.Model):
    """Of module level, as pickle wants it."""


def test_a_model_is_sent_to_a_spawned_process(model_path):
    with fixmin_cpp.Model(model_path, n_threads=1) as model:
        expected = model.generate("the cat", max_new_tokens=5).token_ids
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(answer_of, (model,)) == expected


def answer_of(model):
    return model.generate("the cat", max_new_tokens=5).token_ids


# --- converting and quantizing -----------------------------------------------------------------------------------


def test_convert_is_the_package_and_can_be_called(tmp_path):
    from fixmin_cpp.convert import ModelSpec  # the package

    assert ModelSpec.__module__ == "fixmin_cpp.convert.spec"
    assert inspect.signature(fixmin_cpp.convert) == inspect.signature(api.convert)
    lines = []
    with pytest.raises(fixmin_cpp.CheckpointError, match="no such checkpoint directory"):
        fixmin_cpp.convert(tmp_path / "missing", log=lines.append)
    for wrong in (
        {"checkpoint_dir": 5},
        {"out": b"x"},
        {"outtype": None},
        {"trust_remote_code": 1},
        {"log": 5},
        {"map_file": 5},
        {"calibrate": b"x"},
        {"overrides": [1]},
        {"allow_missing": 5},
        {"n_threads": "2"},
        {"keep_uncertified": None},
        {"trust_remote_cod": True},
    ):
        with pytest.raises(ArgumentTypeError, match=next(iter(wrong))):
            fixmin_cpp.convert(**{"checkpoint_dir": tmp_path, **wrong})
    with pytest.raises(fixmin_cpp.ArgumentError, match="n_threads must be between -1 and 1024, got -2"):
        fixmin_cpp.convert(tmp_path, n_threads=-2)


def test_importing_the_package_imports_no_converter():
    code = (
        "import sys, fixmin_cpp; fixmin_cpp.convert;"
        "print([m for m in ('torch', 'gguf', 'ggml', 'rich', 'tokenizers', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_quantize_checks_its_arguments(tmp_path):
    assert inspect.signature(api.quantize).parameters.keys() == inspect.signature(requantize.quantize).parameters.keys()
    with pytest.raises(fixmin_cpp.ArgumentError, match="type"):
        fixmin_cpp.quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q9")
