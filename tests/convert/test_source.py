"""Reading checkpoint files: every layout gives the same numbers, and every defect a CheckpointError that names it."""

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from fixmin_cpp.convert.checkpoint.source import Source, context_length, hyper  # noqa: E402
from fixmin_cpp.errors import CheckpointError  # noqa: E402

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, generator=generator) * 3
    return {"a.weight": values.to(dtype), "b": torch.arange(4).to(dtype), "scalar": torch.tensor(1.5).to(dtype)}


def write_safetensors(path: Path, header: dict | bytes, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy bin"])
def test_values(tmp_path: Path, dtype: torch.dtype, layout: str) -> None:
    state = tensors(dtype)
    if layout == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "bin")
    with Source(tmp_path) as source:
        assert set(source.tensors) == set(state)
        for name, value in state.items():
            expected = value.float().numpy()
            read = source.read(name)
            assert read.dtype == np.float32
            assert source.tensors[name].shape == expected.shape == read.shape
            np.testing.assert_array_equal(read, expected)
        np.testing.assert_array_equal(source.read("a.weight", lambda a: a[1:3]), state["a.weight"][1:3].float())
        np.testing.assert_array_equal(
            source.read("a.weight", lambda a: a.T[[2, 0]]), state["a.weight"].T[[2, 0]].float()
        )


def test_shards_with_and_without_an_index(tmp_path: Path) -> None:
    state = tensors()
    names = {"one.safetensors": ["a.weight"], "two.safetensors": ["b", "scalar"]}
    for file, part in names.items():
        save_file({n: state[n] for n in part}, tmp_path / file)
    with Source(tmp_path) as source:
        assert set(source.tensors) == set(state)
        expected = hashlib.sha256(b"".join((tmp_path / f).read_bytes() for f in sorted(names))).hexdigest()
        assert source.sha256() == expected
    index = {"weight_map": {n: f for f, part in names.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with Source(tmp_path) as source:
        assert set(source.tensors) == set(state)


def broken_index(tmp_path: Path, weight_map: dict[str, str]) -> None:
    save_file(tensors(), tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "one.safetensors", "c": "missing.safetensors"}, "missing.safetensors"),
        ({"a.weight": "one.safetensors", "c": "one.safetensors"}, "c"),
        ({"a.weight": "../one.safetensors"}, "beside"),
        (["a.weight"], "weight_map"),
    ],
)
def test_broken_index(tmp_path: Path, weight_map: dict[str, str], message: str) -> None:
    broken_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        Source(tmp_path)


def test_the_same_name_in_two_files(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"both one\.safetensors and two\.safetensors: b"):
        Source(tmp_path)


FLOATS = np.arange(6, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry([2, 3], 0, 24)}, FLOATS[:20], "truncated: tensor x"),
        ({"x": entry([2, 3], 0, 20)}, FLOATS, "20 bytes for F32"),
        ({"x": entry([2, -3], 0, 24)}, FLOATS, "shape"),
        ({"x": entry([2, 3], -24, 0)}, FLOATS, "x"),
        ({"x": entry([6], 0, 6, "F8_E4M3")}, FLOATS, "F8_E4M3"),
        ({"x": {"dtype": "F32"}}, FLOATS, "malformed"),
        (b'{"x": ', FLOATS, "malformed"),
        (b"[1, 2]", FLOATS, "malformed"),
        (b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
         FLOATS, "twice"),
        ({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, FLOATS[:12], "y begins .*overlap"),
        ({"x": entry([2], 0, 8), "y": entry([2], 0, 8)}, FLOATS[:8], "overlap"),
        ({"x": entry([2], 0, 8), "y": entry([2], 16, 24)}, FLOATS, "y begins .*gap"),
        ({"x": entry([2], 0, 8)}, FLOATS, "16 bytes follow the last tensor"),
        ({"x": entry([2**32, 2**32], 0, 0)}, b"", "0 bytes for F32"),  # whose product is 0 in 64 bits
        ({"x": entry([2**70], 0, 0)}, b"", "shape"),
        ({"x": entry([2.0], 0, 8)}, FLOATS[:8], "shape"),
        ({"x": entry([True], 0, 4)}, FLOATS[:4], "shape"),
        ({"x": entry("2", 0, 8)}, FLOATS[:8], "shape"),
        ({"x": entry([2], 0.0, 8.0)}, FLOATS[:8], "data_offsets"),
        ({"x": entry([2], "0", "8")}, FLOATS[:8], "data_offsets"),
        ({"x": entry([2], 0, 8, ["F32"])}, FLOATS[:8], "type"),
        (b'{"x":' + b"[" * 100_000, b"", "malformed"),
        (b'{"error": "Access to this model is restricted"}', b"", "malformed"),
    ],
)  # fmt: skip
def test_broken_safetensors(tmp_path: Path, header: dict | bytes, data: bytes, message: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message):
        Source(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 8, 20])
def test_truncated_header(tmp_path: Path, size: int) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Source(tmp_path)


def test_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    with Source(tmp_path) as source:
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:-8])
        last = max(source.tensors.values(), key=lambda t: t.offset)
        with pytest.raises(CheckpointError, match=last.name):
            source.read(last.name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    state = tensors(dtype)
    state["a.weight"][3, 1] = bad
    save_file(state, tmp_path / "model.safetensors")
    with Source(tmp_path) as source:
        source.read("a.weight", lambda a: a[:3])
        with pytest.raises(CheckpointError, match=r"a\.weight"):
            source.read("a.weight")


def test_pickles_that_would_run_code(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Bad()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Source(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_broken_config(tmp_path: Path, text: str) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Source(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder is empty"):
        Source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        Source(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Source(tmp_path / "absent")


def test_spellings() -> None:
    assert hyper({"n_embd": 64, "n_embed": 16}, "embedding_length") == 64
    assert hyper({"hidden_size": True}, "embedding_length") is None
    assert hyper({"rope_parameters": {"rope_theta": 500.0}}, "rope_base") == 500.0
    assert hyper({"hidden_act": "gelu"}, "activation") == "gelu"
    assert context_length({"n_layer": 2, "block_size": 128}) == (128, "block_size")
    assert context_length({"n_layer": 2, "my_seq_limit": 99}) == (99, "my_seq_limit")
    assert context_length({"n_layer": 2}) is None


def special(tmp_path: Path, vocab_size: int = 20, **files: dict) -> tuple[dict, list[str]]:
    """The special ids of a checkpoint with these configurations, and the warnings."""
    save_file(tensors(), tmp_path / "model.safetensors")
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with Source(tmp_path) as source:
        return source.special_ids(vocab_size), source.warnings


def test_special_ids(tmp_path: Path) -> None:
    found, warnings = special(
        tmp_path, config={"pad_id": 3, "bos_token_id": 5}, generation_config={"eos_token_id": [7, 8, 7]}
    )
    assert found == {"bos_token_id": 5, "eos_token_ids": (7, 8), "pad_token_id": 3}
    assert not [w for w in warnings if "eos" in w]


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(2, [2, 7], (2, 7)), ([2, 5], 7, (7,)), ([2, 5], None, (2, 5)), (None, 7, (7,)), (2, [], (2,)), (-1, None, ())],
)
def test_generation_config_counts_where_it_names_one(tmp_path: Path, config, generation, expected) -> None:
    found, warnings = special(tmp_path, config={"eos_token_id": config}, generation_config={"eos_token_id": generation})
    assert found["eos_token_ids"] == expected
    assert any("first counts" in w for w in warnings) == (config is not None and bool(generation))
    assert any("-1" in w for w in warnings) == (config == -1)


@pytest.mark.parametrize("kind", ["bos", "eos", "pad"])
@pytest.mark.parametrize("value", [20, 2**40, -2, 2.0, "2", True, [2, 20], [2, "a"], {"id": 2}, [[2]], [None]])
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_special_ids_that_are_none(tmp_path: Path, file: str, kind: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=rf"{file}\.json: {kind}_token_id is "):
        special(tmp_path, **{file: {f"{kind}_token_id": value}})


@pytest.mark.parametrize("kind", ["bos", "pad"])
def test_only_the_end_of_text_may_have_several_ids(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{kind}_token_id is \[2, 3\]"):
        special(tmp_path, config={f"{kind}_token_id": [2, 3]})


# --- which files are the weights --------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors().items()}


@pytest.mark.parametrize("stale", ["index", "index without shards", "fp16", "consolidated", "bin", "dots"])
def test_weights_are_read_from_where_transformers_reads_them(tmp_path: Path, stale: str) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    if stale.startswith("index"):
        shard = "model-00001-of-00001.safetensors"
        weight_map = dict.fromkeys(tensors(), shard)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        if stale == "index":
            save_file(zeros(), tmp_path / shard)
    elif stale == "bin":
        torch.save(zeros(), tmp_path / "pytorch_model.bin")
    elif stale == "dots":
        (tmp_path / "._model.safetensors").write_bytes(b"\0\5\x16\7 Mac OS X")
    else:
        name = {"fp16": "model.fp16.safetensors", "consolidated": "consolidated.safetensors"}[stale]
        save_file(zeros(), tmp_path / name)
    with Source(tmp_path) as source:
        np.testing.assert_array_equal(source.read("a.weight"), tensors()["a.weight"])
        said = [w for w in source.warnings if "not from" in w]
        assert len(said) == (stale in ("index", "fp16", "consolidated")), "two sets of weights are not passed over"


def test_consolidated_weights_beside_shards(tmp_path: Path) -> None:
    state = tensors()
    weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(state)}
    for name, file in weight_map.items():
        save_file({name: state[name]}, tmp_path / file)
    save_file(zeros(), tmp_path / "consolidated.safetensors")
    (tmp_path / "._model-0.safetensors").write_bytes(b"\0\5\x16\7")
    for index in (False, True):
        if index:
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with Source(tmp_path) as source:
            np.testing.assert_array_equal(source.read("a.weight"), state["a.weight"])
            assert source.warnings == [
                "weights are read from model-0.safetensors, model-1.safetensors, model-2.safetensors, not from "
                "consolidated.safetensors"
            ]


def test_a_shard_is_missing_and_there_is_no_index(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="of 3 files these are missing: 1, 3"):
        Source(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><body>log in</body></html>", "HTML page"),
        (b"\n <HTML>", "HTML page"),
        (b"", "0 bytes"),
        (b"Entry not found", "'Entry not found'"),
        (b'<?xml version="1.0"?>\n<Error><Code>NoSuchKey</Code></Error>\n', "message .*NoSuchKey"),
        (b"\x1f\x8b\x08\0" + bytes(99), "packed with gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "packed with zstd"),
        (b"GGUF" + bytes(99), "a GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    ],
)
def test_what_is_in_the_place_of_a_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name == "config.json":
        save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
        Source(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b'{"error": "Repository not found"}', '\'{"error": "Repository not found"}\''),
        ("model.safetensors", b"PK\x03\x04" + bytes(99), "zip archive"),
        ("model.safetensors", b"\x80\x02}q\0." + bytes(99), "pickle"),
        ("pytorch_model.bin", (99).to_bytes(8, "little") + b'{"x"', "a safetensors file"),
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(99), "torch could not read it"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}", "hold no tensor"),
        ("pytorch_model.bin", pickle.dumps({"x": print}), "other objects than tensors.*could run code"),
        ("config.json", b"\xff\xfe{\0}\0", "not valid JSON"),
        ("config.json", b"\xef\xbb\xbf{}", "not valid JSON.*BOM"),
    ],
)
def test_one_format_in_the_place_of_another(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}.*{message}"):
        Source(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "x.safetensors"]
)
@pytest.mark.parametrize("kind", ["folder", "dangling", "loop", "pipe"])
def test_names_of_files_that_stand_for_none(tmp_path: Path, name: str, kind: str) -> None:
    """What is left of a cache whose files were removed, for one; never waits for a pipe."""
    if name.endswith(".json"):
        save_file(tensors(), tmp_path / "model.safetensors")
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("../blobs/0123" if kind == "dangling" else name)
    message = {"folder": "a folder, not a file", "pipe": "a pipe or device"}.get(
        kind, "a link to .* which is not there"
    )
    with pytest.raises(CheckpointError, match=rf"{name}.*{message}"), Source(tmp_path) as source:
        source.tokenizer_json()


def test_a_shard_that_is_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    (tmp_path / "model-1.safetensors").symlink_to("../blobs/0123")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: a link to \.\./blobs/0123"):
        Source(tmp_path)


def test_one_name_that_is_allowed_is_not_its_letters(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    with Source(tmp_path, allow_missing="lm_head.bias") as source:
        assert source.allow_missing("lm_head.bias")
        assert not source.allow_missing("l")
    with pytest.raises(CheckpointError, match="allow_unexpected must be names"):
        Source(tmp_path, allow_unexpected=[3])  # type: ignore[list-item]


def test_a_pointer_in_the_place_of_the_tokenizer(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with Source(tmp_path) as source, pytest.raises(CheckpointError, match=r"tokenizer\.json.*Git LFS"):
        source.tokenizer_json()


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter .of someone/base.*merge"):
        Source(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    with Source(tmp_path) as source:
        assert any("adapter" in w and "not applied" in w for w in source.warnings)
    other = tmp_path / "other"
    (other / "snapshots" / "abc").mkdir(parents=True)
    (other / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"no weights.*model\.gguf cannot be converted"):
        Source(other)
    (other / "model.gguf").unlink()
    (other / "snapshots" / "abc" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is .*abc meant"):
        Source(other)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.gguf", "a GGUF file, which needs no converting"),
        ("model.safetensors", "give the folder that holds it"),
        ("notes.txt", "a file, not a folder"),
        ("owner/some-model", "hf download owner/some-model --local-dir some-model"),
        ("https://huggingface.co/owner/name", "hf download owner/name"),
        ("no/such/folder", "no such checkpoint"),
    ],
)
def test_paths_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    if "/" not in path:
        Path(path).touch()
    with pytest.raises(CheckpointError, match=message):
        Source(path)


# --- values that are no numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_first_weight_that_is_no_number_is_named(
    tmp_path: Path, layout: str, dtype: torch.dtype, bad: float
) -> None:
    state = tensors(dtype)
    state["a.weight"][3, 1] = state["a.weight"][4, 2] = bad
    if layout == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
    with Source(tmp_path) as source:
        source.check_finite("b")
        with pytest.raises(
            CheckpointError, match=rf"tensor a\.weight .*holds {'NaN' if bad != bad else 'inf'}.* at \[3, 1\]"
        ):
            source.check_finite("a.weight")


def test_numbers_beyond_float32(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, -1e300], dtype=torch.float64)}, tmp_path / "model.safetensors")
    with Source(tmp_path) as source, pytest.raises(CheckpointError, match=r"-1e\+300, beyond float32 at \[1\]"):
        source.read("a")


# --- tokenizers ---------------------------------------------------------------------------------------------------


def old_tokenizer(tmp_path: Path, **config: object) -> Tokenizer:
    """vocab.json and merges.txt of a byte-level BPE, which is returned."""
    save_file(tensors(), tmp_path / "model.safetensors")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["the cat sat on the mat, the dog don't"] * 5, trainer)
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast"])
def test_a_tokenizer_is_built_where_its_class_is_known(tmp_path: Path, name: str) -> None:
    original = old_tokenizer(tmp_path, tokenizer_class=name, eos_token="<|endoftext|>")
    before = sorted(tmp_path.iterdir())
    with Source(tmp_path) as source:
        path = source.tokenizer_json()
        built = Tokenizer.from_file(str(path))
        assert source.special_ids(400)["eos_token_ids"] == (original.token_to_id("<|endoftext|>"),)
        assert any("was built of vocab.json" in w for w in source.warnings)
    assert not path.exists()
    assert sorted(tmp_path.iterdir()) == before, "nothing of the checkpoint is changed"
    rng = np.random.default_rng(0)
    texts = [
        "the cat",
        " don't\n\n sat",
        "<|endoftext|>the",
        *("".join(map(chr, rng.integers(32, 3000, 30))) for _ in range(50)),
    ]
    for text in texts:
        assert built.encode(text).ids == original.encode(text).ids
        assert built.decode(built.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "PreTrainedTokenizerFast"}, {"tokenizer_class": 3}])
def test_no_tokenizer_is_guessed(tmp_path: Path, config: dict) -> None:
    old_tokenizer(tmp_path, **config)
    with Source(tmp_path) as source:
        assert source.tokenizer_json() is None
        assert any("do not say how text is cut" in w and "save_pretrained" in w for w in source.warnings)


@pytest.mark.parametrize("file", [None, "tokenizer.model", "vocab.json"])
def test_other_tokenizers_are_named(tmp_path: Path, file: str | None) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    if file:
        (tmp_path / file).write_bytes(b"{}")
    with Source(tmp_path) as source:
        assert source.tokenizer_json() is None
        assert len(source.warnings) == 1
        assert (file or "no tokenizer.json") in source.warnings[0]


def test_broken_merges(tmp_path: Path) -> None:
    old_tokenizer(tmp_path, tokenizer_class="GPT2Tokenizer")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nnot a merge of these\n")
    with Source(tmp_path) as source, pytest.raises(CheckpointError, match=r"merges\.txt: no tokenizer can be made"):
        source.tokenizer_json()
