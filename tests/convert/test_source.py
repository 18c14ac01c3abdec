"""Reading checkpoint files: every layout gives the same numbers, and every defect a CheckpointError that names it."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from fixmin_cpp.convert.source import Source, context_length, hyper  # noqa: E402
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
    with pytest.raises(CheckpointError, match="no weights"):
        Source(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory"):
        Source(tmp_path / "absent")


def test_spellings() -> None:
    assert hyper({"n_embd": 64, "n_embed": 16}, "embedding_length") == 64
    assert hyper({"hidden_size": True}, "embedding_length") is None
    assert hyper({"rope_parameters": {"rope_theta": 500.0}}, "rope_base") == 500.0
    assert hyper({"hidden_act": "gelu"}, "activation") == "gelu"
    assert context_length({"n_layer": 2, "block_size": 128}) == (128, "block_size")
    assert context_length({"n_layer": 2, "my_seq_limit": 99}) == (99, "my_seq_limit")
    assert context_length({"n_layer": 2}) is None


def test_special_ids(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"pad_id": 3, "bos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    with Source(tmp_path) as source:
        assert [source.token_id(kind) for kind in ("pad", "bos", "eos")] == [3, 5, 7]
