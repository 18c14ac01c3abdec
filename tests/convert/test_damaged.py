"""Checkpoints and options that are damaged: a CheckpointError that names what is wrong, never a wrong file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from spec_factory import make_reference
from test_missing import STATED, checkpoint, without
from tokenizers import Tokenizer, models, pre_tokenizers

from fixmin_cpp.convert.certify import _worst_error, make_prompts
from fixmin_cpp.convert.checkpoint.recipes import Ref, constant, gather
from fixmin_cpp.convert.checkpoint.source import Source
from fixmin_cpp.convert.resolve import resolve
from fixmin_cpp.convert.rewrap import rewrap
from fixmin_cpp.convert.spec import TensorRecipe, check_shapes
from fixmin_cpp.convert.streaming import _ratio
from fixmin_cpp.errors import CheckpointError
from fixmin_cpp.inspect import gf2_rank

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(name: str, change):
    """Replaces a tensor of the files."""

    def replace(state: dict) -> None:
        state[name] = change(state[name])

    return replace


def write_words(folder: Path, count: int, **settings) -> Path:
    """A tokenizer of `count` words; settings: of tokenizer.json."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(tokenizer.to_str()), **settings}))
    return path


# --- shapes --------------------------------------------------------------------------------------------------------


def part(rows: int, columns: int, dtype: str = "F32") -> Ref:
    values = np.ones((rows, columns), np.float32)
    return Ref(values.shape, (f"t{rows}",), lambda index: values[index], dtype)


@pytest.mark.parametrize(
    ("parts", "rows", "message"),
    [
        ([part(3, 2)], [0, 3], r"rows 0 to 3 are needed of t3 \(3, 2\)"),
        ([part(3, 2), part(4, 2)], [7], r"rows 7 to 7 are needed of t3 \(3, 2\), t4 \(4, 2\)"),
        ([part(3, 2)], [-1], "rows -1 to -1"),
        ([part(3, 2), part(4, 1)], None, "cannot lie one below the other"),
        ([Ref((), ("scalar",), lambda index: np.zeros(()))], None, r"scalar \(\)"),
        ([part(3, 2), part(4, 2, "I8")], None, r"tensor t4 \(4, 2\) holds weights of type I8: quantised"),
    ],
)
def test_gathered_rows_are_all_there(parts: list[Ref], rows: list[int] | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        gather(parts, None if rows is None else np.array(rows))


OTHER_SHAPES = {
    "output bias, short": ("lm_head.bias", lambda t: t[:-1], r"\(99,\).*needs \(100,\)"),
    "output bias, long": ("lm_head.bias", lambda t: torch.cat([t, t[:7]]), r"\(107,\).*needs \(100,\)"),
    "output bias, empty": ("lm_head.bias", lambda t: t[:0], r"\(0,\).*needs \(100,\)"),
    "output bias, scalar": ("lm_head.bias", lambda t: t[0], r"\(\).*needs \(100,\)"),
    "last norm's bias": ("model.output_norm.bias", lambda t: t[:-1], r"\(63,\)"),
    "last norm": ("model.output_norm.weight", lambda t: t[:-1], r"\(63,\)"),
    "code matrix": ("model.code.matrix", lambda t: t[:, :-1].contiguous(), r"\(7, 6\)"),
    "code shift": ("model.code.shift", lambda t: torch.cat([t, t]), r"\(14,\)"),
}


@pytest.mark.parametrize("what", OTHER_SHAPES)
def test_tensors_of_another_shape(tmp_path: Path, what: str) -> None:
    """Rows that were not there used to be whatever the memory held, rows too many were cut off."""
    name, change, shapes = OTHER_SHAPES[what]
    folder = checkpoint(tmp_path, changed(name, change), code_kind="affine")
    with pytest.raises(CheckpointError, match=rf"{name}.*{shapes}"):
        resolve(folder)


@pytest.mark.parametrize("role", ["attn_norm.bias", "attn_norm.weight", "ffn_up.bias", "ffn_down.bias"])
def test_tensors_of_all_blocks_of_another_shape(tmp_path: Path, role: str) -> None:
    def change(state: dict) -> None:
        for name in [n for n in state if n.endswith(role)]:
            state[name] = state[name][:-1]

    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\.{role}.*\((63|95),\)"):
        resolve(checkpoint(tmp_path, change), overrides=STATED)


def test_a_bias_beside_a_padded_matrix(tmp_path: Path) -> None:
    def pad(state: dict) -> None:
        state["lm_head.weight"] = torch.cat([state["lm_head.weight"], torch.zeros(28, 64)])

    with pytest.raises(CheckpointError, match=r"lm_head\.bias.*\(100,\).*needs \(128,\)"):
        resolve(checkpoint(tmp_path, pad))

    def pad_both(state: dict) -> None:
        pad(state)
        state["lm_head.bias"] = torch.cat([state["lm_head.bias"], torch.zeros(28)])

    (tmp_path / "both").mkdir()
    with resolve(checkpoint(tmp_path / "both", pad_both)) as resolved:
        assert resolved.spec.tensors["output.bias"].shape == (100,)
        assert any("of 128 rows" in warning for warning in resolved.warnings)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.1.attn_norm.weight", (7,), r"blk\.1\.attn_norm\.weight has the shape \(7,\).*needs \(8,\)"),
        ("blk.0.ffn_up.bias", (13,), r"\(13,\).*needs \(12,\)"),
        ("blk.1.attn_v.weight", (8, 8), r"\(8, 8\).*needs \(4, 8\)"),
        ("output.bias", (21,), r"\(21,\).*needs \(20,\)"),
        ("blk.2.attn_q.weight", (8, 8), "no tensor of this name"),
        ("token_embd.bias", (20,), "no tensor of this name"),
    ],
)
def test_shapes_of_a_model(name: str, shape: tuple[int, ...], message: str) -> None:
    block = {"attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "ffn_down": (8, 12)}
    tensors: dict[str, TensorRecipe] = {"output.weight": constant((20, 8), 1), "blk.0.ffn_up.bias": constant((12,), 1)}
    tensors |= {f"blk.{i}.{role}.weight": constant(s, 1) for i in range(2) for role, s in block.items()}
    check_shapes(tensors, 2, 20, 8)
    with pytest.raises(CheckpointError, match=message):
        check_shapes({**tensors, name: constant(shape, 1)}, 2, 20, 8)


def test_a_scale_in_every_block_is_not_dropped(tmp_path: Path) -> None:
    def change(state: dict) -> None:
        for i in range(3):
            state[f"model.layers.{i}.temperature"] = torch.tensor(0.5)

    with pytest.raises(CheckpointError, match=r"without a place.*model\.layers\.0\.temperature \(\)"):
        resolve(checkpoint(tmp_path, change), overrides=STATED)


@pytest.mark.parametrize("name", ["attention.query_key_value", "gate_up"])
def test_fused_projections_of_an_odd_size(tmp_path: Path, name: str) -> None:
    style = {"attention.query_key_value": "neox", "gate_up": "llama_w12"}[name]
    zoo.make_checkpoint(zoo.STYLES[style], tmp_path, full_config=True)
    state = load_file(tmp_path / "model.safetensors")
    names = [n for n in state if ("w12" if name == "gate_up" else name) in n]
    for n in names:
        state[n] = state[n][:-1].clone()
    save_file(state, tmp_path / "model.safetensors")
    for path in tmp_path.glob("*.py"):
        path.unlink()
    stated = {"lift": "tile", "bit_order": "lsb", "affine_orientation": "Ac", "rope_style": "half", "values": (0, 1),
              "gate_up_order": "gate_up", "qkv_order": "qkv", "attention_scale": 0.25, "rope_dim": 16,
              "activation": "swiglu" if name == "gate_up" else "gelu"}  # fmt: skip
    with pytest.raises(CheckpointError, match=names[0].removesuffix("bias") + "weight"):
        resolve(tmp_path, overrides=stated)


def test_logits_that_overflow_prove_nothing() -> None:
    """Beside them, any difference would be small."""
    large, wrong = np.array([[3e38, 3e38, 1]], np.float32), np.array([[3e38, 3e38, 9]], np.float32)
    assert _worst_error([large], [large]) == 0
    assert _worst_error([wrong], [large]) == np.inf
    ratio = _ratio(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([np.inf, np.inf, 2.0]))
    np.testing.assert_array_equal(ratio, [0, np.inf, 0.5])


# --- what is missing, or in config.json ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model.code.matrix", "affine"), ("model.code.shift", "affine"), ("model.code.table", "table"),
     ("model.code.", "affine"), ("model.token_embd.weight", "learned")],
)  # fmt: skip
def test_codes_that_are_missing(tmp_path: Path, name: str, kind: str) -> None:
    """Without them, the ids' own bits would be another model."""
    folder = checkpoint(tmp_path, without(name), code_kind=kind)
    with pytest.raises(CheckpointError, match=f"{name}.*code_kind|model.code.shift"):
        resolve(folder, overrides={"lift": "tile"})


def test_a_shift_may_be_missing_if_someone_says_so(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, without("model.code.shift"), code_kind="affine")
    with resolve(folder, allow_missing=["model.code.shift"]) as resolved:
        code = resolved.spec.code
        assert not code.shift.any()
        assert any("model.code.shift" in warning for warning in resolved.warnings)
    with resolve(folder, overrides={"affine": (code.matrix, code.matrix[0])}) as resolved:
        assert (resolved.spec.code.shift == code.matrix[0]).all()


@pytest.mark.parametrize("hinted", [True, False])
def test_a_missing_shift_of_other_authors(tmp_path: Path, hinted: bool) -> None:
    """Where nothing speaks of one, a linear code has none: said, not refused."""
    zoo.make_checkpoint(zoo.STYLES["seeded_stored"], tmp_path, full_config=True)
    state = load_file(tmp_path / "model.safetensors")
    del state["embed.b"]
    save_file(state, tmp_path / "model.safetensors")
    for path in tmp_path.glob("*.py"):
        path.unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    if not hinted:
        config = {k: v for k, v in config.items() if "affine" not in k}
        (tmp_path / "config.json").write_text(json.dumps(config))
    stated = {"lift": "tile", "bit_order": "lsb", "affine_orientation": "Ac", "rope_style": "half", "values": (0, 1),
              "qkv_order": "qkv", "attention_scale": 0.25, "rope_dim": 16, "activation": "gelu"}  # fmt: skip
    if hinted:
        with pytest.raises(CheckpointError, match=r"embed\.shift.*affine_seed.*--allow-missing embed\.shift"):
            resolve(tmp_path, overrides=stated)
    else:
        with resolve(tmp_path, overrides=stated) as resolved:
            assert "no shift is stored" in resolved.spec.conventions["code"][1]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("code_values", ("x", [], {}, 5, float("nan"), [0], [0, float("nan")], ["a", "b"], [0, 1, 2])),
        ("norm_type", ("x", 5, [], {}, True, "LayerNorm")),
        ("code_kind", ("x", 5, [], {}, "learned", "table", "fixed")),
        ("code_lift", ("x", 5, [], "interleave")),
        ("rope_style", ("x", 5, [])),
        ("activation", ("x", 5, [], "relu")),
        ("lm_head_bias", ("x", 1, [], False)),
        ("norm_bias", ("x", 0, False)),
        ("intermediate_size", (95,)),
        ("num_key_value_heads", (2,)),
        ("code_width", (8,)),
    ],
)
def test_values_of_the_reference_model_that_are_not_understood(tmp_path: Path, key: str, values: tuple) -> None:
    folder = checkpoint(tmp_path, code_kind="affine")
    before = json.loads((folder / "config.json").read_text())
    for value in values:
        (folder / "config.json").write_text(json.dumps({**before, key: value}))
        with pytest.raises(CheckpointError, match=rf"{'lift' if key == 'code_lift' else key}") as caught:
            resolve(folder).close()
        assert str(value).lower() in str(caught.value).lower()
    (folder / "config.json").write_text(json.dumps({**before, "unknown": "x"}))
    resolve(folder).close()


def test_keys_of_other_authors_are_not_ours(tmp_path: Path) -> None:
    """What is not understood there is left open, and asked for."""
    config = {"model_type": "other", "code_values": "x", "norm_type": 5, "code_kind": "gray", "lm_head_bias": "yes"}
    with pytest.raises(CheckpointError, match=r"leave open[\s\S]*values: .*--values"):
        resolve(checkpoint(tmp_path, config=config), overrides=STATED)


@pytest.mark.parametrize(
    "lists", [{"a": np.eye(7), "b": np.eye(7), "s": np.ones(7)}, {"a": np.eye(7), "s": np.ones(7), "t": np.zeros(7)}]
)
def test_more_than_one_matrix_or_shift_in_the_configuration(tmp_path: Path, lists: dict) -> None:
    config = {"model_type": "other", **{k: v.astype(int).tolist() for k, v in lists.items()}}
    with pytest.raises(CheckpointError, match=r"config\.json: a, .* --affine"):
        resolve(checkpoint(tmp_path, config=config), overrides=STATED)


def test_a_vocabulary_smaller_than_the_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, config={"vocab_size": 3})
    write_words(folder, 100)
    with pytest.raises(CheckpointError, match=r"vocab_size is 3, .* 100 tokens, and tokenizer\.json has 97"):
        resolve(folder)
    write_words(folder, 3)
    with resolve(folder) as resolved:  # rows for padding
        assert resolved.spec.vocab_size == 3
        assert any("the first 3 are used" in warning for warning in resolved.warnings)


@pytest.mark.parametrize(
    ("values", "ignored"), [("zeros", False), ("mask of 3", False), ("mask", True), ("longer mask", True)]
)
def test_only_a_causal_mask_is_one(tmp_path: Path, values: str, ignored: bool) -> None:
    tensor = {"zeros": torch.zeros(40, 40), "mask of 3": torch.ones(3, 3).tril(), "mask": torch.ones(1, 40, 40).tril()}
    tensor["longer mask"] = torch.ones(1, 1, 90, 90, dtype=torch.uint8).tril()

    def extra(state: dict) -> None:
        state["extra.weight"] = tensor[values]

    folder = checkpoint(tmp_path, extra)
    if ignored:
        with resolve(folder) as resolved:
            assert any("extra.weight" in line and "mask" in line for line in resolved.report)
    else:
        with pytest.raises(CheckpointError, match=r"extra\.weight"):
            resolve(folder)


def test_a_triangular_code_matrix_is_no_mask(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, changed("model.code.matrix", lambda t: torch.ones_like(t).tril()), code_kind="affine")
    with resolve(folder, overrides=STATED) as resolved:
        assert (resolved.spec.code.matrix == np.tri(7)).all()


# --- types ---------------------------------------------------------------------------------------------------------

TRUSTED = pytest.mark.parametrize("trusted", [True, False])


@TRUSTED
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["lm_head.weight", "model.output_norm.bias", "model.layers.1.ffn_up.weight"])
def test_weights_of_types_that_are_not_read(tmp_path: Path, name: str, dtype: torch.dtype, trusted: bool) -> None:
    folder = checkpoint(tmp_path, changed(name, lambda t: t.to(dtype) + (dtype.is_complex and 1000j)))
    short = {torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64", torch.bool: "BOOL", torch.complex64: "C64"}[dtype]
    with pytest.raises(CheckpointError, match=rf"tensor {name} .*type {short}") as caught:
        resolve(folder, trust_remote_code=trusted, overrides={} if trusted else STATED)
    assert dtype.is_complex or "quantised" in str(caught.value)


@TRUSTED
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["affine", "table"])
def test_codes_may_be_integers(tmp_path: Path, kind: str, dtype: torch.dtype, trusted: bool) -> None:
    def change(state: dict) -> None:
        for name in [n for n in state if n.startswith("model.code.")]:
            state[name] = state[name].to(dtype)

    expected = make_reference(num_hidden_layers=3, code_kind=kind).model.code
    with resolve(checkpoint(tmp_path, change, code_kind=kind), trust_remote_code=trusted) as resolved:
        code = resolved.spec.code
        if kind == "table":
            assert (code.table == expected.table.numpy()).all()
        else:
            assert (code.matrix == expected.matrix.numpy()).all()
            assert (code.shift == expected.shift.numpy()).all()


@TRUSTED
@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda t: t + 1000j, "C64"), (lambda t: t * 0.5, "F32|0/1"), (lambda t: t.long() * 257, "I64|0/1")],
    ids=["complex", "half", "257"],
)
def test_codes_that_are_no_bits(tmp_path: Path, change, message: str, trusted: bool) -> None:
    """uint8 of 0.5 is 0, and of 257 it is 1."""
    folder = checkpoint(tmp_path, changed("model.code.shift", change), code_kind="affine")
    with pytest.raises(CheckpointError, match=rf"model\.code\.shift.*({message})"):
        resolve(folder, trust_remote_code=trusted)


# --- files ---------------------------------------------------------------------------------------------------------

ODD = {
    "names that are numbers": ({1: torch.zeros(2)}, "name is 1"),
    "names that are tuples": ({("a",): torch.zeros(2)}, r"name is \('a',\)"),
    "sparse": ({"z": torch.tensor([0.0, 1.0]).to_sparse()}, "tensor z .*sparse"),
    "meta": ({"z": torch.empty(2, device="meta")}, "tensor z .*without its values"),
    "expanded": ({"z": torch.zeros(1).expand(2**40)}, r"tensor z \(1099511627776,\) .*more than the file"),
    "expanded to an empty matrix": ({"z": torch.zeros(1, 1).expand(2**30, 2**30)}, "tensor z"),
}


@pytest.mark.parametrize("what", ODD)
def test_tensors_of_a_bin_file_that_are_no_arrays(tmp_path: Path, what: str) -> None:
    state, message = ODD[what]
    torch.save({"a": torch.ones(3), **state}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: .*{message}"):
        Source(tmp_path)


def test_views_of_a_bin_file(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(1).expand(5)}
    torch.save({**state, "c": torch.tensor([1 + 2j]).conj()}, tmp_path / "pytorch_model.bin")
    with Source(tmp_path) as source:
        for name, tensor in state.items():
            np.testing.assert_array_equal(source.read(name), tensor.numpy())
        assert source.read_raw("c") == 1 - 2j
        with pytest.raises(CheckpointError, match=r"tensor c \(1,\) .*C64"):
            source.read("c")


@pytest.mark.parametrize(
    ("shape", "message"), [([1] * 200 + [4], "201 dimensions"), ([0, 2**62, 2**62], "has shape")], ids=["many", "empty"]
)
def test_shapes_that_no_array_has(tmp_path: Path, shape: list[int], message: str) -> None:
    data = b"\0" * (4 * int(np.prod(shape, dtype=object)))
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor x has .*{message}|{message}"):
        Source(tmp_path)


def test_names_of_files_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": "x" * 5000}}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: the file of a\.weight") as caught:
        Source(tmp_path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    (tmp_path / "other").mkdir()
    config = {"auto_map": {"AutoModelForCausalLM": "x" * 5000 + ".C"}}
    with pytest.raises(CheckpointError, match="auto_map"):
        resolve(checkpoint(tmp_path / "other", config=config), trust_remote_code=True)


# --- options, tokenizers ---------------------------------------------------------------------------------------


def test_affine_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, code_kind="affine")
    good, path = np.eye(7, dtype=np.uint8), tmp_path / "a.npy"
    assert gf2_rank(list(good)) == 7
    np.savez(tmp_path / "two.npz", a=good)
    huge = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 7), }"
    contents: dict[str, object] = {
        "empty": b"", "text": b"[[1, 0], [0, 1]]", "promise": huge.ljust(127) + b"\n", "float": good * 0.5,
        "complex": good + 1j, "strings": np.full((7, 7), "1"), "small": good[:5, :5], "rectangle": good[:5],
        "singular": good * 0, "scalar": good[0, 0],
    }  # fmt: skip
    for what, content in contents.items():
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
        with pytest.raises(CheckpointError, match="--affine"):
            resolve(folder, overrides={"affine": (path, np.zeros(5 if what == "small" else 7))})
    for name in ("two.npz", "absent.npy", "."):
        with pytest.raises(CheckpointError, match="--affine"):
            resolve(folder, overrides={"affine": (tmp_path / name, np.zeros(7))})
    np.save(path, good)
    resolve(folder, overrides={"affine": (path, np.zeros(7))}).close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"output.weight": 1}', "output.weight: 1"),
        ('{"output.weight": {"a": "b"}}', "output.weight"),
        ('{"a":' * 20000, "recursion"),
        ("output.weight = lm_head.weight rows 0:9" + "9" * 5000, "FIRST:END"),
        ("output.weight = lm_head.weight transposed", "'transposed'"),
        ("output.weight = lm_head.weight\noutput.weight = lm_head.bias", "output.weight has two places"),
    ],
)
def test_map_files_that_are_damaged(tmp_path: Path, text: str, message: str) -> None:
    folder = checkpoint(tmp_path)
    (tmp_path / "map").write_text(text)
    with pytest.raises(CheckpointError, match=f"--map .*{message}"):
        resolve(folder, map_file=tmp_path / "map")


@TRUSTED
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output.bias = model.output_norm.bias", r"output\.bias \(model\.output_norm\.bias\).*\(64,\).*needs \(100,\)"),
        ("blk.0.attn_z.weight = model.layers.0.attn_q.weight", "no tensor of this name|without a place"),
        ("blk.99999999.attn_q.weight = model.layers.0.attn_q.weight", "no tensor of this name|without a place"),
    ],
)
def test_maps_to_what_the_model_does_not_have(tmp_path: Path, text: str, message: str, trusted: bool) -> None:
    folder = checkpoint(tmp_path)
    (tmp_path / "map").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        resolve(folder, map_file=tmp_path / "map", trust_remote_code=trusted, overrides={} if trusted else STATED)


def test_a_learned_embedding_by_a_map(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, code_kind="learned", config={"model_type": "other"})
    (tmp_path / "map").write_text("token_embd.weight = model.token_embd.weight")
    stated = {**STATED, "attention_scale": 0.25, "rope_dim": 16, "values": (0, 1)}
    with resolve(folder, map_file=tmp_path / "map", overrides=stated) as resolved:
        assert resolved.spec.code.kind == "learned"
        assert resolved.spec.tensors["token_embd.weight"].shape == (100, 64)


def test_a_tokenizer_that_cuts_or_fills_texts(tmp_path: Path) -> None:
    """What it says for batches of training is not how texts are read; a stride beyond the length is a panic."""
    folder = checkpoint(tmp_path)
    truncation = {"max_length": 1, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}
    padding = {"strategy": {"Fixed": 5000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 7,
               "pad_type_id": 0, "pad_token": "w7"}  # fmt: skip
    write_words(folder, 100, truncation=truncation, padding=padding)
    with resolve(folder) as resolved:
        assert resolved.source.tokenizer().encode("w1 w2 w3").ids == [1, 2, 3]
        assert max(map(len, make_prompts(resolved.spec))) <= 40


@pytest.mark.parametrize(
    ("file", "text"),
    [("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{"), ("generation_config.json", '{"num_beams": "x"}')],
)
def test_rewrap_of_damaged_settings(tmp_path: Path, file: str, text: str) -> None:
    folder = checkpoint(tmp_path, config={f"{kind}_token_id": 1 for kind in ("bos", "eos", "pad")})
    write_words(folder, 100)
    (folder / file).write_text(text)
    with pytest.raises(CheckpointError, match=file):
        rewrap(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_is_named_first(tmp_path: Path) -> None:
    """Where the id of a special token is looked up in it."""
    folder = checkpoint(tmp_path, config={"eos_token": "w1", "eos_token_id": None})
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        resolve(folder)
