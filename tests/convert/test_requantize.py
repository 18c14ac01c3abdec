"""`fixmin quantize`: every type against gguf and ggml, the rules of the recipes, and what is kept of the source."""

import ctypes
import filecmp
import hashlib
import json
import os
import re
import shutil
from collections import Counter

import fixmin_cli
import ggml
import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf_factory import make_model
from tokenizers import Tokenizer, models

import fixmin_cpp
from fixmin_cpp.errors import ArgumentError, ArgumentTypeError, CheckpointError, GGUFError
from fixmin_cpp.quantization import requantize
from fixmin_cpp.quantization.imatrix import write_imatrix

PLAIN = [
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
]
FOLDED = {f"blk.0.attn_{part}.weight" for part in "qkv"}
# Sizes that divide into super-blocks of 256.
WIDE = {"embedding_length": 256, "feed_forward_length": 512, "head_count": 8, "vocab_size": 60}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("source") / "f32.gguf", **WIDE)


def stored(path):
    """name -> (type, raw bytes [rows, row bytes])"""
    return {t.name: (t.tensor_type, np.array(t.data)) for t in GGUFReader(path).tensors}


def quantized_by_ggml(rows, kind, importance=None):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((len(rows), rows.shape[1] // block * size), dtype=np.uint8)
    pointer = ctypes.POINTER(ctypes.c_float)
    weights = None if importance is None else importance.ctypes.data_as(pointer)
    n = ggml.ggml_quantize_chunk(
        int(kind), rows.ctypes.data_as(pointer), out.ctypes.data, 0, len(rows), rows.shape[1], weights
    )
    assert n == out.nbytes
    return out


@pytest.mark.parametrize("name", PLAIN)
def test_plain_types(source, tmp_path, name):
    target = tmp_path / "out.gguf"
    seen = []
    report = fixmin_cpp.quantize(source, target, name, n_threads=2, progress=lambda *step: seen.append(step))
    before, after = stored(source), stored(target)
    assert list(after) == list(before)
    for tensor, (kind, data) in after.items():
        original = before[tensor][1]
        if original.ndim == 1:
            assert kind == Type.F32
            assert np.array_equal(data, original)
            continue
        below = name not in ("F32", "F16", "BF16", "Q8_0")
        assert kind == (Type.Q8_0 if below and tensor in FOLDED else Type[name])
        if kind in (Type.F32, Type.F16):
            assert np.array_equal(data, original.astype(data.dtype))
            continue
        assert np.array_equal(data.view(np.uint8), quantized_by_ggml(original, kind)), tensor
        # And gguf, which reads every type by its own arithmetic, finds the weights in it.
        error = gguf.quants.dequantize(data, kind) - original
        bits = 8 * gguf.GGML_QUANT_SIZES[kind][1] / gguf.GGML_QUANT_SIZES[kind][0]
        assert np.sqrt((error**2).mean()) < np.sqrt((original**2).mean()) * 4 * 2.0**-bits * (1 if bits < 9 else 200)
    assert report.types == dict(Counter(kind.name for kind, _ in after.values()))
    assert (report.source_bytes, report.n_bytes) == (source.stat().st_size, target.stat().st_size)
    assert seen[-1][:2] == (report.n_weights, report.n_weights)
    assert [n.name for n in report.tensors] == list(after)
    file_type = GGUFReader(target).fields["general.file_type"].contents()
    assert file_type == requantize.PLAIN[name.lower()][1]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_runs_and_equals_the_file_made_directly(tmp_path, name):
    """Types that gguf can quantise: the logits are those of a file that was written in the type at once."""
    arguments = {"seed": 4, "embedding_length": 64, "activation": "swiglu", "code_kind": "table"}
    fixmin_cpp.quantize(make_model(tmp_path / "a.gguf", **arguments), tmp_path / "b.gguf", name)
    direct = make_model(tmp_path / "c.gguf", weight_type=name, **arguments)
    assert stored(tmp_path / "b.gguf").keys() == stored(direct).keys()
    with fixmin_cpp.Model(tmp_path / "b.gguf") as ours, fixmin_cpp.Model(direct) as theirs:
        assert np.array_equal(ours.logits([5, 1, 99, 7]), theirs.logits([5, 1, 99, 7]))


# name of the recipe -> (default, output, attn_v per layer, ffn_down per layer, attn_output), 16 layers; by hand from
# the table of rules in llama.cpp: the first and last eighth are layers 0, 1 and 14, 15, then every third.
MORE = [layer in (0, 1, 4, 7, 10, 13, 14, 15) for layer in range(16)]
RECIPES = {
    "q3_k_s": ("Q3_K", ["Q3_K"] * 16, ["Q3_K"] * 16, "Q3_K"),
    "q3_k_m": ("Q3_K", ["Q5_K"] * 2 + ["Q4_K"] * 14, ["Q5_K"] + ["Q4_K"] * 15, "Q4_K"),
    "q3_k_l": ("Q3_K", ["Q5_K"] * 16, ["Q5_K"] * 16, "Q5_K"),
    "q4_k_s": ("Q4_K", ["Q5_K"] * 4 + ["Q4_K"] * 12, ["Q5_K"] * 2 + ["Q4_K"] * 14, "Q4_K"),
    "q4_k_m": ("Q4_K", ["Q6_K" if m else "Q4_K" for m in MORE], ["Q6_K" if m else "Q4_K" for m in MORE], "Q4_K"),
    "q5_k_s": ("Q5_K", ["Q5_K"] * 16, ["Q5_K"] * 16, "Q5_K"),
    "q5_k_m": ("Q5_K", ["Q6_K" if m else "Q5_K" for m in MORE], ["Q6_K" if m else "Q5_K" for m in MORE], "Q5_K"),
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    sizes = {**WIDE, "feed_forward_length": 256, "block_count": 16, "vocab_size": 20, "activation": "swiglu"}
    return make_model(tmp_path_factory.mktemp("deep") / "f16.gguf", weight_type="F16", **sizes)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(deep, tmp_path, recipe):
    report = fixmin_cpp.quantize(deep, tmp_path / "out.gguf", recipe.upper())
    types = {t.name: t.type for t in report.tensors}
    default, values, downs, output = RECIPES[recipe]
    assert types["output.weight"] == "Q6_K"
    for layer in range(16):
        block = f"blk.{layer}."
        folded = layer == 0
        assert types[block + "attn_v.weight"] == ("Q8_0" if folded else values[layer])
        assert types[block + "attn_q.weight"] == types[block + "attn_k.weight"] == ("Q8_0" if folded else default)
        assert types[block + "ffn_down.weight"] == downs[layer]
        assert types[block + "attn_output.weight"] == output
        assert types[block + "ffn_up.weight"] == types[block + "ffn_gate.weight"] == default
        assert types[block + "attn_norm.weight"] == "F32"
    assert {name: kind.name for name, (kind, _) in stored(tmp_path / "out.gguf").items()} == types


@pytest.mark.parametrize(
    ("name", "row", "fallback"),
    [
        ("q2_k", 96, "IQ4_NL"),
        ("q3_k", 96, "IQ4_NL"),
        ("iq4_xs", 96, "IQ4_NL"),
        ("q4_k", 96, "Q5_0"),
        ("q5_k", 96, "Q5_1"),
        ("q6_k", 96, "Q8_0"),
        ("q4_k", 80, "F16"),
        ("q8_0", 80, "F16"),
        ("q4_0", 80, "F16"),
    ],
)
def test_rows_that_do_not_divide(tmp_path, name, row, fallback):
    source = make_model(tmp_path / "f32.gguf", embedding_length=row, feed_forward_length=256)
    report = fixmin_cpp.quantize(source, tmp_path / "out.gguf", name)
    tensors = {t.name: t for t in report.tensors}
    assert tensors["blk.1.ffn_up.weight"].type == fallback
    assert f"rows of {row} do not divide" in tensors["blk.1.ffn_up.weight"].note
    assert tensors["blk.1.ffn_down.weight"].type == name.upper()
    assert tensors["blk.1.ffn_down.weight"].note is None


def test_stated_types(source, tmp_path):
    rules = {r"ffn_(up|down)": "q5_1", "blk": "Q4_1", r"blk\.0": "f16"}
    report = None
    with pytest.raises(ArgumentError, match=r"no matrix of this model has a name that matches 'blk\\\\.0'"):
        fixmin_cpp.quantize(source, tmp_path / "out.gguf", "q8_0", tensor_types=rules)
    del rules[r"blk\.0"]
    report = fixmin_cpp.quantize(source, tmp_path / "out.gguf", "q4_k_m", tensor_types=rules, output_tensor_type="Q8_0")
    for tensor in report.tensors:
        if len(tensor.shape) > 1:
            wanted = "Q5_1" if "ffn_" in tensor.name else "Q4_1" if "blk" in tensor.name else "Q8_0"
            assert tensor.type == wanted


def test_importance(source, tmp_path):
    rng = np.random.default_rng(5)
    names = ["blk.0.ffn_up", "blk.1.ffn_down", "blk.1.attn_v", "output"]
    sums = {n + ".weight": (rng.random(512 if "down" in n else 256) * 40, 8) for n in names}
    write_imatrix(tmp_path / "imatrix.gguf", sums, ["text"], 1, 8)
    report = fixmin_cpp.quantize(source, tmp_path / "out.gguf", "q4_k", imatrix=tmp_path / "imatrix.gguf")
    assert {t.name for t in report.tensors if t.has_importance} == set(sums)
    before, after = stored(source), stored(tmp_path / "out.gguf")
    for name in ("blk.0.ffn_up.weight", "blk.1.ffn_down.weight", "blk.1.ffn_up.weight"):
        weights = (sums[name][0].astype(np.float32) / np.float32(8)) if name in sums else None
        assert np.array_equal(after[name][1], quantized_by_ggml(before[name][1], Type.Q4_K, weights))
    plain = quantized_by_ggml(before["output.weight"][1], Type.Q4_K)
    assert not np.array_equal(after["output.weight"][1], plain)


@pytest.mark.parametrize("kind", [n.lower() for n in PLAIN[3:]])
@pytest.mark.parametrize("size", [1.0, 1e-35, 1e30])
def test_columns_without_importance(tmp_path, kind, size):
    """256 columns whose inputs were all zero in the text, though their weights are not."""
    path = make_model(tmp_path / "f32.gguf", **{**WIDE, "embedding_length": 512})
    sums = np.full(512, size)
    sums[:256] = 0
    write_imatrix(
        tmp_path / "imatrix.gguf", {"output.weight": (sums, 1), "blk.0.ffn_up.weight": (0 * sums, 1)}, [], 1, 8
    )
    fixmin_cpp.quantize(path, tmp_path / "out.gguf", kind, imatrix=tmp_path / "imatrix.gguf")
    before, after = stored(path), stored(tmp_path / "out.gguf")
    for name in ("output.weight", "blk.0.ffn_up.weight"):
        values = gguf.quants.dequantize(after[name][1], after[name][0])
        assert np.isfinite(values).all()
        for part in (slice(0, 256), slice(256, 512)):
            error = np.linalg.norm(values[:, part] - before[name][1][:, part]) / np.linalg.norm(
                before[name][1][:, part]
            )
            assert error < 0.6, "columns without importance are not thrown away"
    with fixmin_cpp.Model(tmp_path / "out.gguf") as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0", "q4_k"])
@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
@pytest.mark.parametrize(("name", "index"), [("blk.1.ffn_up.weight", (3, 4)), ("blk.1.attn_norm.weight", (5,))])
def test_weights_that_are_no_numbers(tmp_path, type, bad, word, name, index):
    def edit(writer):
        for tensors in writer.tensors:
            tensors[name].tensor[index] = bad

    source = make_model(tmp_path / "f32.gguf", edit=edit, **WIDE)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*holds {word} at {re.escape(str(list(index)))}"):
        fixmin_cpp.quantize(source, tmp_path / "out.gguf", type)
    assert os.listdir(tmp_path) == ["f32.gguf"]


def test_importance_of_another_model(source, tmp_path):
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, {"output.weight": (np.ones(255), 8)}, [], 1, 8)
    with pytest.raises(ArgumentError, match=r"255 columns for output\.weight, whose rows have 256"):
        fixmin_cpp.quantize(source, tmp_path / "out.gguf", "q4_k", imatrix=path)
    write_imatrix(path, {"blk.9.ffn_up.weight": (np.ones(256), 8)}, [], 1, 8)
    with pytest.raises(ArgumentError, match="names no tensor"):
        fixmin_cpp.quantize(source, tmp_path / "out.gguf", "q4_k", imatrix=path)
    with pytest.raises(GGUFError, match="expected 'imatrix'"):
        fixmin_cpp.quantize(source, tmp_path / "out.gguf", "q4_k", imatrix=source)


def test_what_cannot_be_loaded_is_not_written(tmp_path):
    source = make_model(tmp_path / "f32.gguf", edit=lambda w: w.add_uint32("tokenizer.ggml.eos_token_id", 100))
    with pytest.raises(CheckpointError, match=r"out\.gguf: .*eos_token_id is 100"):
        fixmin_cpp.quantize(source, tmp_path / "out.gguf", "q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["f32.gguf"]


def test_metadata_is_kept(tmp_path):
    def edit(writer):
        writer.add_bool("fixmin.convert.certificate.passed", True)
        writer.add_float32("fixmin.convert.certificate.logit_error", 1e-6)
        writer.add_array("tokenizer.ggml.tokens", ["a", "é日😀", ""])
        writer.add_array("test.numbers", [-1, 2])
        writer.add_int8("test.int8", -3)
        writer.add_uint64("test.uint64", 2**63)
        writer.add_uint32("general.file_type", 0)
        writer.add_string("fixmin.quantize.tool", "an earlier one")

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()
    source = make_model(tmp_path / "f32.gguf", edit=edit, tokenizer_json=words, code_kind="table")
    fixmin_cpp.quantize(source, tmp_path / "out.gguf", "q8_0", tensor_types={"ffn_up": "q4_0"})
    before, after = GGUFReader(source).fields, GGUFReader(tmp_path / "out.gguf").fields
    for key, field in before.items():
        if key not in ("general.file_type", "fixmin.quantize.tool") and not key.startswith("GGUF."):
            assert (after[key].types, after[key].contents()) == (field.types, field.contents()), key
    new = {k: after[k].contents() for k in after if k not in before}
    assert new.pop("general.quantization_version") == 2
    assert new["fixmin.quantize.source"] == "f32.gguf"
    assert new["fixmin.quantize.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert json.loads(new["fixmin.quantize.tensor_types"]) == {"ffn_up": "q4_0"}
    assert "of the source" in new["fixmin.quantize.certificate"]
    assert after["fixmin.quantize.tool"].contents() == f"fixmin-cpp {fixmin_cpp.__version__}"
    assert after["general.file_type"].contents() == 7
    codes = "token_code.weight"
    assert np.array_equal(stored(source)[codes][1], stored(tmp_path / "out.gguf")[codes][1])


def test_requantising_must_be_allowed(source, tmp_path):
    middle, target = tmp_path / "q8.gguf", tmp_path / "q4.gguf"
    fixmin_cpp.quantize(source, middle, "q8_0")
    with pytest.raises(ArgumentError, match="already quantised"):
        fixmin_cpp.quantize(middle, target, "q4_k")
    assert os.listdir(tmp_path) == ["q8.gguf"]
    fixmin_cpp.quantize(middle, target, "q4_k", allow_requantize=True)
    kind, data = stored(middle)["output.weight"]
    expected = quantized_by_ggml(gguf.quants.dequantize(data, kind), Type.Q4_K)
    assert np.array_equal(stored(target)["output.weight"][1], expected)
    # The same type again is a copy, which loses nothing and needs no permission.
    fixmin_cpp.quantize(middle, target, "q8_0")
    assert np.array_equal(stored(target)["output.weight"][1], data)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"type": "q9"}, ArgumentError, "type must be one of"),
        ({"type": 8}, ArgumentTypeError, "type must be a str"),
        ({"tensor_types": {"(": "q8_0"}}, ArgumentError, "not a regular expression"),
        ({"tensor_types": {"a": "q4_k_m"}}, ArgumentError, "must be one of"),
        ({"tensor_types": "a=q8_0"}, ArgumentTypeError, "must be a dict"),
        ({"output_tensor_type": "x"}, ArgumentError, "output_tensor_type must be"),
        ({"n_threads": -2}, ArgumentError, "n_threads must be"),
        ({"allow_requantize": 1}, ArgumentTypeError, "allow_requantize must be"),
        ({"source": 5}, ArgumentTypeError, "source must be"),
        ({"source": __file__}, GGUFError, "does not begin with"),
    ],
)
def test_wrong_arguments(source, tmp_path, arguments, error, message):
    target = tmp_path / "out.gguf"
    with pytest.raises(error, match=message):
        fixmin_cpp.quantize(**{"source": source, "target": target, "type": "q8_0", **arguments})
    assert os.listdir(tmp_path) == []


def test_source_and_target_are_the_same(source, tmp_path):
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    with pytest.raises(ArgumentError, match="is an input"):
        fixmin_cpp.quantize(source, link, "q8_0")
    left = tmp_path / ".out.gguf.partial"  # by a run that was killed, and tried to be saved
    shutil.copy(source, left)
    with pytest.raises(ArgumentError, match=r"out\.gguf\.partial, an input, has the name under which .*out\.gguf is"):
        fixmin_cpp.quantize(left, tmp_path / "out.gguf", "q8_0")
    assert filecmp.cmp(left, source, shallow=False)


def test_weight_that_the_type_cannot_hold(tmp_path):
    def edit(writer):
        for tensors in writer.tensors:
            tensors["output.weight"].tensor[3, 4] = 1e6

    source = make_model(tmp_path / "f32.gguf", edit=edit)
    with pytest.raises(CheckpointError, match=r"output\.weight.*1e\+06.*F16"):
        fixmin_cpp.quantize(source, tmp_path / "out.gguf", "f16")
    assert os.listdir(tmp_path) == ["f32.gguf"]


def test_command(source, tmp_path):
    target = tmp_path / "out.gguf"
    arguments = ["quantize", source, target, "Q4_K_M", "--tensor-type", "blk.1.ffn_up=q8_0"]
    result = fixmin_cli.fixmin(*arguments, "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    report = json.loads(result.stdout)
    assert report["path"] == str(target)
    types = {t["name"]: t["type"] for t in report["tensors"]}
    assert (types["blk.1.ffn_up.weight"], types["blk.1.ffn_down.weight"]) == ("Q8_0", "Q6_K")
    text = fixmin_cli.fixmin(*arguments, "--all").stdout.decode()
    assert "blk.1.ffn_down.weight: F32 -> Q6_K  (recipe q4_k_m)" in text
    assert "certificate" in text.splitlines()[-1]
    shown = fixmin_cli.fixmin("inspect", target).stdout.decode()
    assert "Quantised from" in shown
    wrong = fixmin_cli.fixmin("quantize", source, target, "q8_0", "--tensor-type", "=q8_0")
    assert (wrong.returncode, b"REGEX=TYPE" in wrong.stderr) == (2, True)
    failed = fixmin_cli.fixmin("quantize", target, tmp_path / "other.gguf", "q8_0")
    assert (failed.returncode, b"--allow-requantize" in failed.stderr) == (1, True)
