"""What a sound file contains comes out unchanged. Oracles: the gguf package's reader and ggml's own type table."""

import gc
import os
import pickle
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    STRING,
    T_F32,
    U8,
    U32,
    array,
    build,
    kv,
    raw_kv,
    sample,
    tensor,
)

from fixmin_cpp import _core


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file from the gguf package with every kind of value and several tensor types."""
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "fixmin")
    writer.add_uint8("v.u8", 255)
    writer.add_int8("v.i8", -128)
    writer.add_uint16("v.u16", 65535)
    writer.add_int16("v.i16", -32768)
    writer.add_uint32("v.u32", 2**32 - 1)
    writer.add_int32("v.i32", -(2**31))
    writer.add_uint64("v.u64", 2**64 - 1)
    writer.add_int64("v.i64", -(2**63))
    writer.add_float32("v.f32", 0.1)
    writer.add_float64("v.f64", 0.1)
    writer.add_bool("v.true", True)
    writer.add_bool("v.false", False)
    writer.add_string("v.text", "Grüße, 世界\n\0end")
    writer.add_array("v.ints", [-1, 0, 2**31 - 1])
    writer.add_array("v.floats", [0.5, -2.0])
    writer.add_array("v.bools", [True, False, True])
    writer.add_array("v.strings", ["", "a", "ключ"])
    writer.add_array("v.bytes", bytes(range(7)))
    rng = np.random.default_rng(0)
    for name, dtype in {"f32": np.float32, "f16": np.float16, "f64": np.float64}.items():
        writer.add_tensor(f"t.{name}", rng.standard_normal((3, 32)).astype(dtype))
    for name, dtype in {"i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64}.items():
        writer.add_tensor(f"t.{name}", rng.integers(-100, 100, (2, 5)).astype(dtype))
    writer.add_tensor("t.one", np.ones(1, np.float32))
    writer.add_tensor("t.4d", rng.standard_normal((2, 3, 4, 5)).astype(np.float32))
    values = rng.standard_normal((4, 256)).astype(np.float32)
    for quant in ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0"):
        kind = gguf.GGMLQuantizationType[quant]
        writer.add_tensor(f"t.{quant}", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_equals_gguf_reader(path: Path) -> None:
    expected = gguf.GGUFReader(path)
    file = _core.GgufFile(str(path))
    assert file.alignment == expected.alignment
    fields = {name: field for name, field in expected.fields.items() if not name.startswith("GGUF.")}
    metadata = file.metadata
    assert list(metadata) == list(fields)
    for name, field in fields.items():
        wanted, found = field.contents(), metadata[name]
        if isinstance(found, np.ndarray):
            assert found.dtype == field.parts[field.data[0]].dtype
            assert found.tolist() == wanted
        else:
            assert type(found) is type(wanted), name
            assert found == wanted
    assert [t.name for t in file.tensors] == [t.name for t in expected.tensors]
    for found, wanted in zip(file.tensors, expected.tensors, strict=True):
        assert found.shape == tuple(int(n) for n in reversed(wanted.shape))
        assert found.type == wanted.tensor_type.name
        assert (found.offset, found.n_bytes) == (wanted.data_offset, wanted.n_bytes)
        assert file.tensor_data(found.name).tobytes() == wanted.data.tobytes()


def test_agrees_with_the_gguf_package(written: Path) -> None:
    assert_equals_gguf_reader(written)


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "fixmin")
    writer.add_custom_alignment(alignment)
    for i in range(3):
        writer.add_tensor(f"t.{i}", np.full((i + 1, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = _core.GgufFile(str(path))
    assert file.alignment == alignment
    assert all(t.offset % alignment == 0 for t in file.tensors)
    for i in range(3):
        assert file.tensor_data(f"t.{i}").view(np.float32).tolist() == [float(i)] * 3 * (i + 1)


def test_the_sample_of_the_other_tests(tmp_path: Path) -> None:
    """The byte-by-byte writer agrees with the gguf package, so the defects made with it are the only ones."""
    path = tmp_path / "sample.gguf"
    path.write_bytes(sample())
    reader = gguf.GGUFReader(path)
    metadata = _core.GgufFile.from_bytes(sample()).metadata
    assert [name for name in reader.fields if not name.startswith("GGUF.")] == list(metadata)
    assert metadata["test.strings"] == ["", "one", "zwei Wörter"]
    assert metadata["test.scalar7"] is True
    assert metadata["test.array7"].dtype == bool
    assert metadata["test.empty"].shape == (0,)
    assert metadata["test.empty"].dtype == np.float32
    for tensor_ in reader.tensors:
        assert _core.GgufFile(str(path)).tensor_data(tensor_.name).tobytes() == tensor_.data.tobytes()


def test_type_table_equals_ggml() -> None:
    """Names, block sizes and bytes of every type that the ggml library knows, and no others below its count."""
    ggml = pytest.importorskip("ggml")
    for type_id in range(ggml.GGML_TYPE_COUNT):
        block, block_bytes = ggml.ggml_blck_size(type_id), ggml.ggml_type_size(type_id)
        data = build([], [tensor("t", [block or 256, 3], type_id, 0)], bytes(4096))
        if block == 0:  # withdrawn
            with pytest.raises(_core.GGUFError, match=f"tensor type {type_id} does not exist"):
                _core.GgufFile.from_bytes(data)
            continue
        (found,) = _core.GgufFile.from_bytes(data).tensors
        assert found.type == ggml.ggml_type_name(type_id).decode().upper()
        assert found.n_bytes == 3 * block_bytes
        if block > 1:
            with pytest.raises(_core.GGUFError, match=f"not a multiple of the block size {block} of {found.type}"):
                _core.GgufFile.from_bytes(build([], [tensor("t", [block + 1], type_id, 0)], bytes(4096)))


def test_q2_0_that_the_installed_ggml_may_not_know() -> None:
    (found,) = _core.GgufFile.from_bytes(build([], [tensor("t", [64, 2], 42, 0)], bytes(36))).tensors
    assert (found.type, found.n_bytes) == ("Q2_0", 36)


@pytest.mark.parametrize("version", [2, 3])
def test_versions(version: int) -> None:
    assert _core.GgufFile.from_bytes(build(version=version)).version == version


def test_file_without_tensors_or_keys() -> None:
    file = _core.GgufFile.from_bytes(build())
    assert (file.tensors, file.metadata, file.alignment) == ([], {}, 32)


def test_scalar_tensor_and_unpadded_end() -> None:
    file = _core.GgufFile.from_bytes(build([], [tensor("t", [], T_F32, 0)], np.float32(2.5).tobytes()))
    assert file.tensors[0].shape == ()
    assert file.tensor_data("t").view(np.float32).tolist() == [2.5]


def test_bytes_after_the_last_tensor_are_ignored() -> None:
    file = _core.GgufFile.from_bytes(build([], [tensor("t", [2], T_F32, 0)], bytes(8) + b"trailer"))
    assert file.tensors[0].n_bytes == 8


def test_strings_that_are_not_utf8() -> None:
    kvs = [
        kv("s", STRING, b"ab\xff\xfe"),
        raw_kv("a", ARRAY, array(STRING, [b"\xe2\x82", "€", b"\xed\xa0\x80"])),
    ]
    metadata = _core.GgufFile.from_bytes(build(kvs)).metadata
    assert metadata["s"] == "ab\ufffd\ufffd"
    assert metadata["a"][0] == "\ufffd"
    assert metadata["a"][1] == "€"
    assert set(metadata["a"][2]) == {"\ufffd"}


def test_view_is_read_only_and_keeps_the_mapping_alive(written: Path) -> None:
    file = _core.GgufFile(str(written))
    view = file.tensor_data("t.f32")
    copy = view.copy()
    del file
    gc.collect()
    os.unlink(written)  # the mapping holds the file
    assert (view.dtype, view.ndim) == (np.uint8, 1)
    np.testing.assert_array_equal(view, copy)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True


def test_data_of_a_file_is_a_copy_of_its_bytes(written: Path) -> None:
    """A view of the mapping would end the process if the file were cut."""
    file = _core.GgufFile(str(written))
    tensor = next(t for t in file.tensors if t.name == "t.f16")
    data = file.tensor_data("t.f16")
    stored = written.read_bytes()[tensor.offset :][: tensor.n_bytes]
    os.truncate(written, 0)
    assert data.tobytes() == stored


def test_view_of_bytes_keeps_them_alive() -> None:
    def make() -> tuple[np.ndarray, bytes]:
        data = build([], [tensor("t", [64], T_F32, 0)], os.urandom(256))
        return _core.GgufFile.from_bytes(data).tensor_data("t"), data[-256:]

    view, wanted = make()
    gc.collect()
    assert view.tobytes() == wanted


def test_mapping_is_given_back(written: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(written))

    # Other models may be open: only files of this test are counted.
    def opened(path: Path) -> int:
        return [os.readlink(f"/proc/self/fd/{fd}") for fd in open_descriptors()].count(str(path))

    file = _core.GgufFile(str(written))
    assert opened(written) == 1
    del file
    gc.collect()
    assert (mapped(), opened(written)) == (0, 0)
    bad = written.with_suffix(".bad")
    bad.write_bytes(written.read_bytes()[:-4000])
    for _ in range(100):
        with pytest.raises(_core.GGUFError):
            _core.GgufFile(str(bad))
    assert ".bad" not in Path("/proc/self/maps").read_text()
    assert opened(bad) == 0


def open_descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent") as absent:
        _core.GgufFile(str(tmp_path / "absent.gguf"))
    with pytest.raises(FileNotFoundError) as builtin:
        (tmp_path / "absent.gguf").open()
    assert (absent.value.args, absent.value.filename) == (builtin.value.args, str(builtin.value.filename))
    with pytest.raises(IsADirectoryError):
        _core.GgufFile(str(tmp_path))
    with pytest.raises(OSError, match="not a regular file"):
        _core.GgufFile("/dev/zero")
    with pytest.raises(ValueError, match="null"):
        _core.GgufFile("a\0b")
    with pytest.raises(TypeError):
        _core.GgufFile(3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):  # and no waiting for a writer
        _core.GgufFile(str(tmp_path / "pipe"))


def test_path_spellings(written: Path) -> None:
    odd = written.with_name("größe 世界.gguf")
    written.rename(odd)
    assert _core.GgufFile(str(odd)).version == 3
    assert _core.GgufFile(odd).version == 3


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError):
        _core.GgufFile.from_bytes("GGUF")
    file = _core.GgufFile.from_bytes(build())
    with pytest.raises(KeyError, match="no tensor absent"):
        file.tensor_data("absent")
    with pytest.raises(TypeError):
        pickle.dumps(file)


def test_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not a GGUF file") as caught:
        _core.GgufFile.from_bytes(b"PK\3\4")
    assert isinstance(caught.value, _core.FixminError)


def test_many_threads_read_one_file(written: Path) -> None:
    file = _core.GgufFile(str(written))
    wanted = [file.tensor_data(t.name).tobytes() for t in file.tensors]
    found: list[bool] = []

    def read() -> None:
        for _ in range(20):
            again = _core.GgufFile(str(written))
            found.append([file.tensor_data(t.name).tobytes() for t in again.tensors] == wanted)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_find_every_name_among_many() -> None:
    names = [f"blk.{i}.w" for i in range(500)]
    entries = [tensor(name, [2], T_F32, 32 * i) for i, name in enumerate(names)]
    data = b"".join(np.array([i, 0], np.float32).tobytes() + bytes(24) for i in range(500))
    file = _core.GgufFile.from_bytes(build([kv("k", U32, 1), kv("l", U8, 1)], entries, data))
    for i, name in enumerate(names):
        assert file.tensor_data(name).view(np.float32)[0] == i
    for absent in ("", "blk.0", "blk.0.w ", "zzz", "a"):
        with pytest.raises(KeyError):
            file.tensor_data(absent)
