"""What stands above the door gives the same on the CPU and on a GPU. Run by test_suite.py, with an emulated GPU."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_state import NOTHING, held
from gguf_factory import ALL_BIASES, make_model
from python.toy_models import byte_level, concatenating, write_model

import fixmin_cpp
from fixmin_cpp import Model, _core
from fixmin_cpp.benchmark import bench

DEVICES = ("cpu", "cuda")
IDS = [int(id) for id in np.random.default_rng(5).integers(0, 100, 60)]
SIZES: dict[str, Any] = {"vocab_size": 100, "weight_type": "Q8_0", "embedding_length": 32, "head_count": 2}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model.gguf", **SIZES, feed_forward_length=64)


@pytest.fixture(scope="module")
def both(path: Path) -> Iterator[tuple[Model, Model]]:
    """One model, on the CPU and on the GPU, for tests that do not close it."""
    with Model(path, device="cpu") as cpu, Model(path, device="cuda") as gpu:
        assert (cpu.info["device"], gpu.info["device"]) == DEVICES
        yield cpu, gpu


def answers(model: Model, prompts: list[list[int]], **arguments: Any) -> list[Any]:
    arguments = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": 2, **arguments}
    return [(each.token_ids, each.finish_reason, each.logprobs) for each in model.generate(prompts, **arguments)]


def test_the_environment_says_where(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for named, found in {"cuda": "cuda", "cuda:0": "cuda", "auto": "cuda", "cpu": "cpu", "": "cpu"}.items():
        monkeypatch.setenv("FIXMIN_DEVICE", named)
        with Model(path) as model:
            assert model.info["device"] == found
            assert model.info["device_name"] == ("emulated" if found == "cuda" else _core.system_info()["cpu"])
            assert model.info["device_memory"] > 1 << 29


@pytest.mark.parametrize("n", [1, 2, 7, 33, 64])
def test_requests_side_by_side(both: tuple[Model, Model], n: int) -> None:
    prompts = [IDS[i % 40 : i % 40 + 1 + i % 5] for i in range(n)]
    settings: dict[str, Any] = {"temperature": 0.9, "seed": 3, "max_new_tokens": 3, "n": 1}
    cpu, gpu = (answers(model, prompts, **settings) for model in both)
    assert cpu == gpu
    assert len(cpu) == n


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("saved_on", DEVICES)
def test_states_go_from_one_device_to_the_other(path: Path, tmp_path: Path, kv_type: str, saved_on: str) -> None:
    loaded_on = DEVICES[1 - DEVICES.index(saved_on)]
    with Model(path, device=saved_on, kv_type=kv_type) as model:
        expected = answers(model, [IDS[:50]], temperature=1.0, seed=1)
        assert model.save_state(tmp_path / "state", IDS[:50]) == 32
        written = (tmp_path / "state").read_bytes()
    with Model(path, device=loaded_on, kv_type=kv_type) as model:
        assert model.load_state(tmp_path / "state") == IDS[:50]
        assert answers(model, [IDS[:50]], temperature=1.0, seed=1) == expected
        assert model.stats()["n_cached_prompt_tokens"] == 32
        # And the bytes are those that this device writes itself.
        model.clear_prefix_cache()
        model.save_state(tmp_path / "again", IDS[:50])
        assert (tmp_path / "again").read_bytes() == written


def test_known_beginnings(path: Path) -> None:
    found = []
    for device in DEVICES:
        with Model(path, device=device) as model:
            texts = [answers(model, [IDS[:n]])[0] for n in (40, 44, 44, 36, 64 - 8)]
            found.append((texts, model.stats()["n_cached_prompt_tokens"]))
    assert found[0] == found[1]
    assert found[0][1] > 32


def test_guessed_tokens(path: Path) -> None:
    found = []
    for device in DEVICES:
        with Model(path, device=device) as model:
            prompt = [5, 6, 7] * 6
            plain = answers(model, [prompt], max_new_tokens=24, logprobs=None)
            guessed = answers(model, [prompt], max_new_tokens=24, logprobs=None, prompt_lookup_num_tokens=8)
            assert plain == guessed
            found.append((plain, model.stats()["n_drafted"], model.stats()["n_accepted"]))
    assert found[0] == found[1]
    assert found[0][1] > 0


def test_requests_that_give_way(tmp_path: Path) -> None:
    """One context of cache for six requests that all grow."""
    path = make_model(tmp_path / "model.gguf", **SIZES, feed_forward_length=64, context_length=160)
    found = []
    for device in DEVICES:
        with Model(path, device=device, n_kv=160) as model:
            prompts = [IDS[i : i + 10] for i in range(6)]
            texts = answers(model, prompts, max_new_tokens=100, logprobs=None, temperature=1.0, seed=4)
            assert model.stats()["n_preempted"] > 0
            found.append(texts)
    assert found[0] == found[1]


def test_scores_logits_and_hidden_states(both: tuple[Model, Model]) -> None:
    cpu, gpu = both
    assert np.array_equal(cpu.logits(IDS), gpu.logits(IDS))
    for layer in range(cpu.info["block_count"] + 1):
        assert np.array_equal(cpu.hidden_states(IDS, layer), gpu.hidden_states(IDS, layer))
    for one, other in zip(cpu.score([IDS, IDS[:7]]), gpu.score([IDS, IDS[:7]]), strict=True):
        assert np.array_equal(one.logprobs, other.logprobs)
    assert np.array_equal(cpu.codes(IDS), gpu.codes(IDS))


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "[ab]{3,9}c?"},
        {"json_schema": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
        {"choices": ["the cat", "abc", "Paris"]},
    ],
)
def test_forms_of_a_text(tmp_path: Path, form: dict[str, Any]) -> None:
    tokenizer = concatenating() if "regex" in form else byte_level()
    path = write_model(tmp_path / "text.gguf", tokenizer, embedding_length=64, feed_forward_length=64)
    found = []
    for device in DEVICES:
        with Model(path, device=device) as model:
            done = model.generate("the cat", max_new_tokens=24, temperature=1.0, seed=2, logprobs=1, **form)
            found.append((done.text, done.token_ids, done.finish_reason, done.logprobs))
    assert found[0] == found[1]
    assert found[0][0]


def test_beams(both: tuple[Model, Model]) -> None:
    cpu, gpu = (model.beam_search(IDS[:9], num_beams=3, max_new_tokens=4) for model in both)
    assert [(each.token_ids, each.score) for each in cpu] == [(each.token_ids, each.score) for each in gpu]


def test_a_request_that_is_cancelled_or_late(path: Path) -> None:
    with Model(path, device="cuda", n_ctx=64) as model:
        expected = answers(model, [IDS[:5]])
        stream = model.stream(IDS[:5], max_new_tokens=50, ignore_eos=True)
        next(stream)
        stream.close()
        assert stream.completion is None or stream.completion.finish_reason == "cancelled"
        late = model.generate(IDS[:5], max_new_tokens=50, ignore_eos=True, timeout=1e-6)
        assert late.finish_reason == "timeout"
        assert answers(model, [IDS[:5]]) == expected


def test_several_models_in_threads(path: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other.gguf", **SIZES, feed_forward_length=64, seed=9, activation="swiglu")
    before = held()
    prompts = [IDS[:5], IDS[5:20]]
    expected = {}
    for each in (path, other):
        with Model(each, device="cpu") as model:
            expected[each] = answers(model, prompts)
    assert expected[path] != expected[other]
    with Model(path, device="cuda") as one, Model(other, device="cuda") as two, Model(path, device="cuda") as three:
        models = {one: path, two: other, three: path}
        found: dict[Model, list[Any]] = {model: [] for model in models}

        def ask(model: Model) -> None:
            for _ in range(2):
                found[model].append(answers(model, prompts))
                model.clear_prefix_cache()

        threads = [threading.Thread(target=ask, args=(model,)) for model in models for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for model, its_path in models.items():
            assert found[model] == [expected[its_path]] * 4
        assert held().allocations > before.allocations
        assert held().devices == before.devices + 3
    assert held() == before


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "swiglu"},
        {"norm": "rmsnorm", "head_count_kv": 2, "biases": ALL_BIASES},
        {"code_kind": "learned", "activation": "gelu_tanh"},
        {"weight_type": "F16"},
        {"weight_type": "Q4_K", "embedding_length": 256, "feed_forward_length": 256, "block_count": 1},
        {"weight_types": {"blk.1.ffn_down": "F16", "blk.0.attn_output": "F32"}, "weight_type": "Q4_0"},
    ],
)
def test_an_importance_matrix(tmp_path: Path, options: dict[str, Any]) -> None:
    path = make_model(tmp_path / "model.gguf", **{"vocab_size": 100, "weight_type": "Q8_0", **options})
    ids = np.array(IDS[:40], np.uint32)
    found = []
    for device, n_batch in (("cpu", 512), ("cuda", 512), ("cuda", 7), ("cuda", 1)):
        engine = _core.Engine(str(path), device=device, n_batch=n_batch)
        squares = _core.InputSquares(engine)
        logprobs = squares.add(engine, ids)
        squares.add(engine, ids[:9])
        found.append((logprobs.tobytes(), {name: (v.tobytes(), n) for name, (v, n) in squares.sums.items()}))
        # What is not collected any more costs nothing and changes nothing.
        after = engine.logits(ids, last=True, prefix_cache=False).tobytes()
        found[-1] += (after,)
    assert found[1:] == found[:1] * 3
    assert all(any(values) for values, _ in found[0][1].values())


def test_bench(path: Path) -> None:
    of_both = [bench(path, device=device, n_prompt=5, n_generate=2, repeat=1) for device in DEVICES]
    assert [report.device for report in of_both] == list(DEVICES)
    assert all(np.all(np.array(report.launch_us_runs) > 0) for report in of_both)
    cpu, gpu = of_both
    assert cpu.prefill_operations_per_token == gpu.prefill_operations_per_token
    assert cpu.decode_bytes_per_token < gpu.decode_bytes_per_token  # rows of 32 are one block, and padded to two


def test_nothing_is_held_after_close(path: Path) -> None:
    before = held()
    model = Model(path, device="cuda")
    model.generate(IDS[:5], max_new_tokens=5, ignore_eos=True)
    assert held().bytes >= before.bytes + model.info["bytes"]["memory"] // 2
    # The step that comes again and again: a graph, or memory for it (FIXMIN_CUDA_STEP).
    assert held().recordings + held().allocations > before.recordings + before.allocations + 1
    model.close()
    assert held() == before
    with pytest.raises(fixmin_cpp.FixminError):
        model.generate(IDS[:5])
    if before == NOTHING:
        assert held() == NOTHING
