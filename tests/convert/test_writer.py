"""Number formats, metadata and the bytes of written files; and that a file appears whole or not at all."""

import ctypes
import errno
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import ggml
import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, TokenType
from gguf_factory import with_row_scales
from spec_factory import array_recipe, make_reference, make_resolved

from fixmin_cpp.convert.gguf_file import writer
from fixmin_cpp.convert.gguf_file.formats import OUT_TYPES, NotFiniteError, choose_type, quantize_rows
from fixmin_cpp.convert.gguf_file.writer import AtomicFile, Layout, Provenance, tokenizer_metadata
from fixmin_cpp.convert.spec import TensorRecipe
from fixmin_cpp.errors import CheckpointError

PROVENANCE = Provenance("tool 1", "folder", "ab" * 32, ("rope_style = half: test",), "{}", "nothing")
FIGURES = {"passed": False, "tokens": 0, "logit_error": 0.0}


def write(path: Path, spec, outtype: str, figures=FIGURES, n_threads: int = 2) -> Layout:
    layout = Layout.plan(spec, outtype, PROVENANCE)
    with AtomicFile(path) as file:
        layout.write(file, figures, n_threads)
        file.commit()
    return layout


def read_keys(path: Path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


# --- number formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("ggml_type", [Type.Q8_0, Type.Q4_0, Type.BF16, Type.F16])
def test_bytes_equal_ggml_and_gguf(ggml_type, scale):
    rows = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32) * np.float32(scale)
    rows[0] = 0.0
    rows[1, ::2] = rows[1, 1::2]  # equal magnitudes: which one sets the sign of a Q4_0 scale must agree too
    ours = quantize_rows(rows, ggml_type)
    assert np.array_equal(ours, gguf.quants.quantize(rows, ggml_type).view(np.uint8))
    by_ggml = np.empty_like(ours)
    floats = ctypes.POINTER(ctypes.c_float)
    ggml.ggml_quantize_chunk(int(ggml_type), rows.ctypes.data_as(floats), by_ggml.ctypes.data, 0, *rows.shape, None)
    assert np.array_equal(ours, by_ggml)


def test_float_formats_round_to_nearest_even():
    """All exponents, subnormals and ties, against NumPy and PyTorch."""
    bits = np.random.default_rng(2).integers(0, 2**32, 1 << 18, dtype=np.uint64).astype(np.uint32)
    bits[::3] &= 0xFFFFE000  # exactly representable or a tie in float16
    bits[1::3] &= 0xFFFF8000  # the same for bfloat16
    values = bits.view(np.float32)
    values = values[np.isfinite(values)][: 1 << 16].reshape(64, -1)
    small = np.where(np.abs(values) < 65520, values, np.float32(1))
    assert np.array_equal(quantize_rows(small, Type.F16).view(np.float16), small.astype(np.float16))
    tame = np.where(np.abs(values) < 3.3e38, values, np.float32(1))
    expected = torch.from_numpy(tame).to(torch.bfloat16).float().numpy()
    stored = quantize_rows(tame, Type.BF16).view(np.uint16).astype(np.uint32) << 16
    assert np.array_equal(stored.view(np.float32), expected)


@pytest.mark.parametrize(
    ("outtype", "largest"), [("f16", 65519.0), ("bf16", 3.38e38), ("q8_0", 8.3e6), ("q4_0", 5.2e5), ("f32", 3.4e38)]
)
def test_limits_are_where_the_format_overflows(outtype, largest):
    """Below the limit the stored value is finite and near; from the limit on there is an error, never infinity."""
    ggml_type, limit = OUT_TYPES[outtype].ggml, OUT_TYPES[outtype].limit
    rows = np.full((1, 32), largest, dtype=np.float32)
    raw = quantize_rows(rows, ggml_type)
    stored = raw.view(np.float32) if ggml_type == Type.F32 else gguf.quants.dequantize(raw, ggml_type)
    np.testing.assert_allclose(stored, rows, rtol=0.1)
    if np.isfinite(limit):
        rows[0, 7] = -limit
        with pytest.raises(OverflowError, match="overflows"):
            quantize_rows(rows, ggml_type)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("outtype", OUT_TYPES)
def test_not_finite(outtype, bad):
    rows = np.zeros((2, 32), dtype=np.float32)
    rows[1, 3] = bad
    with pytest.raises(NotFiniteError, match="holds NaN" if np.isnan(bad) else "holds infinity") as caught:
        quantize_rows(rows, OUT_TYPES[outtype].ggml)
    assert caught.value.index == (1, 3)


@pytest.mark.parametrize(
    ("name", "shape", "outtype", "expected"),
    [
        ("blk.1.attn_q.weight", (64, 64), "q4_0", Type.Q4_0),
        ("blk.0.attn_q.weight", (64, 64), "q4_0", Type.Q8_0),
        ("blk.0.attn_k.weight", (64, 64), "q4_0", Type.Q8_0),
        ("blk.0.attn_v.weight", (64, 64), "q8_0", Type.Q8_0),
        ("blk.0.attn_v.weight", (64, 64), "f16", Type.F16),
        ("blk.0.attn_output.weight", (64, 64), "q4_0", Type.Q4_0),
        ("blk.1.ffn_down.weight", (64, 80), "q8_0", Type.F16),
        ("blk.0.attn_q.weight", (64, 40), "q4_0", Type.F16),
        ("blk.1.ffn_down.weight", (64, 80), "bf16", Type.BF16),
        ("output_norm.weight", (64,), "q8_0", Type.F32),
        ("output.bias", (64,), "f16", Type.F32),
        ("blk.1.ffn_down.weight", (64, 96), "w8a8", Type.I8),
        ("blk.0.attn_k.weight", (64, 64), "w8a8", Type.Q8_0),
        ("token_embd.weight", (100, 64), "w8a8", Type.Q8_0),
        ("blk.1.ffn_down.weight", (64, 80), "w8a8", Type.F16),
        ("blk.1.ffn_down.weight", (64, 133_024), "w8a8", Type.F16),
    ],
)
def test_choice_of_type(name, shape, outtype, expected):
    ggml_type, note = choose_type(name, shape, outtype)
    assert ggml_type == expected
    assert (note is None) == (expected == OUT_TYPES[outtype].ggml or len(shape) == 1)


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outtype", OUT_TYPES)
def test_file_is_what_gguf_reads(tmp_path, outtype):
    resolved = make_resolved(make_reference(code_kind="affine", qkv_bias=True))
    spec, path = resolved.spec, tmp_path / "m.gguf"
    layout = write(path, spec, outtype)
    reader = GGUFReader(path)
    codes = {t.name for t in reader.tensors if t.tensor_type == Type.I8}
    assert bool(codes) == (outtype == "w8a8")
    assert ("fixmin.w8a8.version" in reader.fields) == (outtype == "w8a8")
    expected_names = [[name, f"{name}_scale"] if name in codes else [name] for name in spec.tensors]
    assert [t.name for t in reader.tensors] == list(itertools.chain(*expected_names))
    assert reader.alignment == 32
    assert path.stat().st_size == layout.header_bytes + layout.data_bytes
    for tensor in reader.tensors:
        if tensor.name.endswith("_scale"):
            rows = spec.tensors[tensor.name.removesuffix("_scale")].load()
            assert np.array_equal(tensor.data, with_row_scales(rows)[1])
            continue
        source = spec.tensors[tensor.name].load()
        assert tuple(reversed(tensor.shape.tolist())) == source.shape
        assert tensor.data_offset % 32 == 0
        if tensor.tensor_type == Type.F32:
            assert np.array_equal(tensor.data, source)
        elif tensor.tensor_type == Type.I8:
            assert np.array_equal(tensor.data, with_row_scales(source)[0])
        elif tensor.tensor_type == Type.F16:
            assert np.array_equal(tensor.data, source.astype(np.float16))
        else:
            expected = gguf.quants.quantize(source, tensor.tensor_type)
            assert np.array_equal(tensor.data.reshape(-1), expected.reshape(-1))


def test_metadata_follows_the_design(tmp_path):
    resolved = make_resolved(make_reference(code_kind="affine", code_lift="tile", code_values=(-1.0, 0.5)))
    spec, path = resolved.spec, tmp_path / "m.gguf"
    write(path, spec, "q8_0")
    fields = GGUFReader(path).fields
    expected = {
        "general.architecture": ("fixmin", ["STRING"]),
        "general.file_type": (7, ["UINT32"]),
        "general.size_label": ("65K", ["STRING"]),
        "general.quantization_version": (2, ["UINT32"]),
        "fixmin.vocab_size": (100, ["UINT32"]),
        "fixmin.context_length": (40, ["UINT32"]),
        "fixmin.embedding_length": (64, ["UINT32"]),
        "fixmin.block_count": (2, ["UINT32"]),
        "fixmin.feed_forward_length": (96, ["UINT32"]),
        "fixmin.attention.head_count": (4, ["UINT32"]),
        "fixmin.attention.head_count_kv": (4, ["UINT32"]),
        "fixmin.attention.scale": (0.25, ["FLOAT32"]),
        "fixmin.attention.layer_norm_epsilon": (float(np.float32(1e-5)), ["FLOAT32"]),
        "fixmin.rope.dimension_count": (16, ["UINT32"]),
        "fixmin.rope.freq_base": (10000.0, ["FLOAT32"]),
        "fixmin.rope.style": ("half", ["STRING"]),
        "fixmin.activation": ("gelu", ["STRING"]),
        "fixmin.code.kind": ("affine", ["STRING"]),
        "fixmin.code.width": (7, ["UINT32"]),
        "fixmin.code.affine_matrix": (spec.code.matrix.reshape(-1).tolist(), ["ARRAY", "UINT8"]),
        "fixmin.code.affine_shift": (spec.code.shift.tolist(), ["ARRAY", "UINT8"]),
        "fixmin.code.lift": ("tile", ["STRING"]),
        "fixmin.code.values": ([-1.0, 0.5], ["ARRAY", "FLOAT32"]),
        "fixmin.convert.sha256": ("ab" * 32, ["STRING"]),
        "fixmin.convert.conventions": (["rope_style = half: test"], ["ARRAY", "STRING"]),
        "fixmin.convert.certificate.passed": (False, ["BOOL"]),
        "tokenizer.ggml.model": ("none", ["STRING"]),
    }
    for key, (value, types) in expected.items():
        assert fields[key].contents() == value, key
        assert [t.name for t in fields[key].types] == types, key
    assert "fixmin.attention.layer_norm_rms_epsilon" not in fields


@pytest.mark.parametrize("code_kind", ["table", "learned"])
def test_other_code_kinds(tmp_path, code_kind):
    resolved = make_resolved(make_reference(code_kind=code_kind, norm_type="rmsnorm", activation="swiglu"))
    path = tmp_path / "m.gguf"
    write(path, resolved.spec, "q8_0")
    reader = GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}
    assert reader.fields["fixmin.code.kind"].contents() == code_kind
    assert "fixmin.attention.layer_norm_rms_epsilon" in reader.fields
    assert "fixmin.code.affine_matrix" not in reader.fields
    assert ("token_embd.weight" in tensors) == (code_kind == "learned")
    if code_kind == "table":
        rows = tensors["token_code.weight"]
        assert rows.tensor_type == Type.I8
        assert rows.shape.tolist() == [1, 100]
        bits = np.unpackbits(rows.data.view(np.uint8), axis=1, bitorder="little")[:, :7]
        assert np.array_equal(bits, resolved.spec.code.table)


def test_fallback_for_rows_that_are_no_whole_blocks(tmp_path):
    resolved = make_resolved(make_reference(hidden_size=40, intermediate_size=72))
    layout = write(tmp_path / "m.gguf", resolved.spec, "q4_0")
    types = {t.name: t.tensor_type for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.1.attn_q.weight"] == types["blk.0.ffn_down.weight"] == Type.F16
    notes = {t.name: t.note for t in layout.tensors if t.note}
    assert notes["blk.0.ffn_down.weight"] == "rows of 72 do not divide into blocks of 32"


@pytest.mark.parametrize("outtype", ["f16", "q4_0"])
def test_overflow_names_the_tensor(tmp_path, outtype):
    resolved = make_resolved(make_reference())
    values = resolved.spec.tensors["blk.1.ffn_up.weight"].load().copy()
    values[5, 6] = 1e6
    resolved.spec.tensors["blk.1.ffn_up.weight"] = array_recipe(values)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight .*1e\+06.*bf16"):
        write(tmp_path / "m.gguf", resolved.spec, outtype)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "m.gguf", resolved.spec, "bf16")


def test_threads_and_chunks_do_not_change_the_bytes(tmp_path, monkeypatch):
    spec = make_resolved(make_reference()).spec
    write(tmp_path / "a.gguf", spec, "q8_0", n_threads=1)
    monkeypatch.setattr(writer, "_CHUNK", 200)
    write(tmp_path / "b.gguf", spec, "q8_0", n_threads=5)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_reads_stay_a_few_chunks_ahead(tmp_path, monkeypatch):
    """What is read and not yet written is bounded by the number of threads, not by the size of a tensor."""
    monkeypatch.setattr(writer, "_CHUNK", 640)
    spec = make_resolved(make_reference()).spec
    read, ahead = 0, []

    def counting(recipe: TensorRecipe) -> TensorRecipe:
        def read_rows(start, stop):
            nonlocal read
            rows = recipe.read_rows(start, stop)
            read += rows.size
            return rows

        return replace(recipe, read_rows=read_rows)

    spec.tensors = {name: counting(recipe) for name, recipe in spec.tensors.items()}
    layout = Layout.plan(spec, "q8_0", PROVENANCE)
    with AtomicFile(tmp_path / "m.gguf") as file:
        layout.write(file, FIGURES, 2, lambda done, total, name: ahead.append(read - done))
    assert read == layout.n_weights
    assert max(ahead) <= 3 * 640


def test_header_is_rewritten_in_place(tmp_path):
    spec, path = make_resolved(make_reference()).spec, tmp_path / "m.gguf"
    layout = Layout.plan(spec, "q8_0", PROVENANCE)
    with AtomicFile(path) as file:
        layout.write(file, FIGURES)
        before = file.path.read_bytes()
        layout.rewrite_header(file, {"passed": True, "tokens": 7, "logit_error": 0.125})
        with pytest.raises(ValueError, match="header changed"):
            layout.rewrite_header(file, {"passed": True, "tokens": 7})
        file.commit()
    after = path.read_bytes()
    assert len(after) == len(before)
    assert after[layout.header_bytes :] == before[layout.header_bytes :]
    keys = read_keys(path)
    assert keys["fixmin.convert.certificate.passed"] is True
    assert keys["fixmin.convert.certificate.tokens"] == 7
    assert keys["fixmin.convert.certificate.logit_error"] == 0.125


# --- tokenizers -------------------------------------------------------------------------------------------------


def tokenizer_keys(tmp_path: Path, tokenizer: dict, vocab_size: int, **changes) -> dict:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    spec = make_resolved(make_reference(), vocab_size=vocab_size, tokenizer_json=path, **changes).spec
    return {key: value.value for key, value in tokenizer_metadata(spec).items()}


def bpe(vocab: list[str], merges: list, **parts) -> dict:
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": {t: i for i, t in enumerate(vocab)}, "merges": merges}
    return {"version": "1.0", "added_tokens": [], "model": model, **parts}


def test_byte_level_bpe_is_gpt2(tmp_path):
    parts = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}}
    keys = tokenizer_keys(tmp_path, bpe(["a", "b", "ab"], ["a b"], **parts), 4, eos_token_ids=(2,))
    assert keys["tokenizer.ggml.model"] == b"gpt2"
    assert keys["tokenizer.ggml.merges"] == [b"a b"]
    assert keys["tokenizer.ggml.eos_token_id"] == 2
    assert "tokenizer.ggml.bos_token_id" not in keys
    assert "fixmin.eos_token_ids" not in keys, "GGUF's own key says it"


def test_character_bpe_is_not_called_gpt2(tmp_path):
    added = [
        {"id": 4, "content": "<unk>", "special": True},
        {"id": 5, "content": "</s>", "special": True},
        {"id": 6, "content": "<tool>", "special": False},
        {"id": 99, "content": "<beyond>", "special": True},
    ]
    tokenizer = bpe(["a", " ", "\0", " a"], [[" ", "a"]], added_tokens=added, pre_tokenizer=None, decoder=None)
    keys = tokenizer_keys(tmp_path, tokenizer, 8)
    assert keys["tokenizer.ggml.model"] == b"bpe"
    assert keys["tokenizer.ggml.tokens"] == [b"a", b" ", b"\0", b" a", b"<unk>", b"</s>", b"<tool>", b"[PAD7]"]
    assert keys["tokenizer.ggml.merges"] == ["Ġ a".encode()]
    normal, unknown = int(TokenType.NORMAL), int(TokenType.UNKNOWN)
    others = [int(TokenType.CONTROL), int(TokenType.USER_DEFINED), int(TokenType.UNUSED)]
    assert keys["tokenizer.ggml.token_type"] == [normal] * 4 + [unknown, *others]
    assert keys["tokenizer.ggml.unknown_token_id"] == 4


def test_full_vocabulary_of_odd_characters(tmp_path):
    """65,536 characters, all of the basic plane and so lone surrogates too, which have no UTF-8."""
    vocab = [chr(i) for i in range(65536)]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(bpe(vocab, [])), encoding="utf-8")
    resolved = make_resolved(make_reference(vocab_size=65536, hidden_size=32, num_hidden_layers=1), tokenizer_json=path)
    write(tmp_path / "m.gguf", resolved.spec, "q8_0")
    keys = read_keys(tmp_path / "m.gguf")
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == 65536
    assert tokens[:2] == ["\0", "\x01"]
    assert tokens[0xD7FF:0xD801] == ["\ud7ff", "\\ud800"]
    assert keys["tokenizer.huggingface.json"] == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"type": "BPE"}}', '{"model": 3}'])
def test_broken_tokenizer_is_named(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    spec = make_resolved(make_reference(), tokenizer_json=path).spec
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        tokenizer_metadata(spec)


# --- atomicity --------------------------------------------------------------------------------------------------


def test_target_changes_only_with_commit(tmp_path):
    target = tmp_path / "m.gguf"
    target.write_bytes(b"old")
    with AtomicFile(target) as file:
        file.file.write(b"new")
        file.file.flush()
        assert target.read_bytes() == b"old"
        file.commit()
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_removes_the_temporary(tmp_path, error):
    def fail():
        with AtomicFile(tmp_path / "m.gguf") as file:
            file.file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_second_writer_is_refused_and_leaves_the_first_alone(tmp_path):
    with AtomicFile(tmp_path / "m.gguf") as first:
        first.file.write(b"first")
        with pytest.raises(CheckpointError, match="another process"), AtomicFile(tmp_path / "m.gguf"):
            pass
        first.commit()
    assert (tmp_path / "m.gguf").read_bytes() == b"first"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_last_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with AtomicFile(tmp_path / "m.gguf") as file:
        file.write(b"x")
        monkeypatch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            file.commit()
    assert caught.value.filename == str(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "m.gguf"
    link.symlink_to(tmp_path / "real" / "m.gguf")
    with AtomicFile(link) as file:
        file.file.write(b"x")
        file.commit()
    assert link.is_symlink()
    assert (tmp_path / "real" / "m.gguf").read_bytes() == b"x"


def test_only_regular_files_are_replaced(tmp_path):
    with pytest.raises(CheckpointError, match="directory"), AtomicFile(tmp_path):
        pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="device or pipe"), AtomicFile(tmp_path / "pipe"):
        pass
    with pytest.raises(FileNotFoundError), AtomicFile(tmp_path / "missing" / "m.gguf"):
        pass
    with pytest.raises(CheckpointError, match="device or pipe"), AtomicFile("/dev/null"):
        pass
    with pytest.raises(CheckpointError, match=r"^/: is a directory"), AtomicFile("/"):
        pass
    reading, writing = os.pipe()  # whose real path is that of nothing
    try:
        with pytest.raises(CheckpointError, match="device or pipe"), AtomicFile(f"/dev/fd/{writing}"):
            pass
    finally:
        os.close(reading)
        os.close(writing)


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = type(writer.shutil.disk_usage(tmp_path))(10**9, 10**9, 1000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="MB free") as caught:
        write(tmp_path / "m.gguf", make_resolved(make_reference()).spec, "q8_0")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


# A write that fails half-way and a kill need a process of their own.
_CHILD = """
    import sys, time
    sys.path[:0] = {path!r}
    from pathlib import Path
    from spec_factory import make_reference, make_resolved
    from test_writer import PROVENANCE, FIGURES
    from fixmin_cpp.convert.gguf_file import writer
    from fixmin_cpp.convert.gguf_file.writer import AtomicFile, Layout

    writer._CHUNK = 1000
    layout = Layout.plan(make_resolved(make_reference()).spec, "q8_0", PROVENANCE)
    with AtomicFile({target!r}) as file:
        layout.write(file, FIGURES, 1, lambda *_: (print("chunk", flush=True), time.sleep({pause})))
        file.commit()
        print("committed", flush=True)
"""


def child(target: Path, pause: float, **options) -> subprocess.Popen:
    code = textwrap.dedent(_CHILD).format(path=sys.path, target=str(target), pause=pause)
    # -B: where files may have 30 kB only, Python would cut the bytecode of libraries off and find it damaged later.
    return subprocess.Popen([sys.executable, "-B", "-c", code], stdout=subprocess.PIPE, text=True, **options)


def test_failing_write_leaves_nothing(tmp_path):
    """A file size limit of 30 kB stands in for a disk that fills up on the way."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # noqa: E731
    process = child(tmp_path / "m.gguf", 0.0, preexec_fn=limit, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"File too large: '{tmp_path / 'm.gguf'}'" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chunks", [1, 20])
def test_kill_leaves_no_output_and_the_next_run_cleans_up(tmp_path, chunks):
    target = tmp_path / "m.gguf"
    process = child(target, 0.05)
    for _ in range(chunks):
        assert process.stdout.readline() == "chunk\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    assert not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == [".m.gguf.partial"]
    write(target, make_resolved(make_reference()).spec, "q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert read_keys(target)["fixmin.vocab_size"] == 100


def test_many_runs_to_one_output_give_one_whole_file(tmp_path):
    """Runs that meet: each either writes the file or is refused, and what is there at the end is complete."""
    spec, target = make_resolved(make_reference()).spec, tmp_path / "m.gguf"
    outcomes = []

    def run():
        try:
            write(target, spec, "q8_0", n_threads=1)
            outcomes.append("written")
        except CheckpointError:
            outcomes.append("refused")
            time.sleep(0.001)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    assert "written" in outcomes
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    write(tmp_path / "alone.gguf", spec, "q8_0")
    assert target.read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_value_types_of_certificates_have_one_size():
    """The in-place rewrite relies on it: no figure is a string or an array."""
    sizes = {GGUFValueType.BOOL, GGUFValueType.UINT64, GGUFValueType.FLOAT32}
    values = writer._fixed_size({"passed": True, "weights": 2**40, "weight_error": 1.0})
    assert {value.type for value in values.values()} == sizes
