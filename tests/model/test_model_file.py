"""Files that are valid GGUF but no valid model: each is refused with GGUFError that names the key or tensor."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_factory import HALVES, WEIGHT_TYPES, make_model

from fixmin_cpp import _core


def load(path):
    return _core.Engine(str(path), n_threads=1)


def set_key(key, value):
    def edit(writer):
        writer.kv_data[0][key].value = value

    return edit


def without_key(key):
    return lambda writer: writer.kv_data[0].pop(key)


def set_type(key, value_type, value):
    from gguf import GGUFValueType

    def edit(writer):
        writer.kv_data[0][key].type = GGUFValueType[value_type]
        writer.kv_data[0][key].value = value

    return edit


REQUIRED = [
    "general.architecture",
    "fixmin.vocab_size",
    "fixmin.context_length",
    "fixmin.embedding_length",
    "fixmin.block_count",
    "fixmin.feed_forward_length",
    "fixmin.attention.head_count",
    "fixmin.attention.head_count_kv",
    "fixmin.attention.scale",
    "fixmin.attention.layer_norm_epsilon",
    "fixmin.rope.dimension_count",
    "fixmin.rope.freq_base",
    "fixmin.rope.style",
    "fixmin.activation",
    "fixmin.code.kind",
    "fixmin.code.width",
    "fixmin.code.affine_matrix",
    "fixmin.code.affine_shift",
    "fixmin.code.lift",
    "fixmin.code.values",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key(tmp_path, key):
    if key == "general.architecture":  # the gguf package always writes it
        path = make_model(tmp_path / "m.gguf", edit=set_key(key, "llama"))
        message = "general.architecture is 'llama'"
    else:
        path = make_model(tmp_path / "m.gguf", edit=without_key(key))
        message = "layer_norm" if "epsilon" in key else key
    with pytest.raises(_core.GGUFError, match=message):
        load(path)


def test_part_of_a_split_model(tmp_path):
    path = make_model(tmp_path / "m-00001-of-00002.gguf", edit=lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(_core.GGUFError, match=r"one of 2 parts of a model \(split\.count\); join them first"):
        load(path)
    load(make_model(tmp_path / "whole.gguf", edit=lambda writer: writer.add_uint16("split.count", 1)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fixmin.vocab_size", 0, "fixmin.vocab_size is 0"),
        ("fixmin.vocab_size", 2**32 - 1, "fixmin.vocab_size is 4294967295"),
        ("fixmin.vocab_size", 101, "expected|101"),
        ("fixmin.vocab_size", 129, "vocab"),
        ("fixmin.context_length", 0, "context_length is 0"),
        ("fixmin.context_length", 2**31, "context_length is 2147483648"),
        ("fixmin.embedding_length", 0, "embedding_length is 0"),
        ("fixmin.embedding_length", 2**31, "embedding_length"),
        ("fixmin.embedding_length", 63, "embedding_length 63 is not a multiple"),
        ("fixmin.embedding_length", 128, "expected"),
        ("fixmin.block_count", 0, "block_count is 0"),
        ("fixmin.block_count", 2**31, "block_count"),
        ("fixmin.block_count", 3, "block_count is 3 but there is no block 2"),
        ("fixmin.block_count", 1, "blk.1.* has no place"),
        ("fixmin.feed_forward_length", 95, "ffn_up"),
        ("fixmin.attention.head_count", 0, "head_count is 0"),
        ("fixmin.attention.head_count", 3, "head_count 3"),
        ("fixmin.attention.head_count_kv", 0, "head_count_kv is 0"),
        ("fixmin.attention.head_count_kv", 3, "head_count_kv 3"),
        ("fixmin.attention.head_count_kv", 8, "head_count_kv 8"),
        ("fixmin.attention.scale", float("nan"), "fixmin.attention.scale"),
        ("fixmin.attention.scale", float("inf"), "fixmin.attention.scale"),
        ("fixmin.attention.layer_norm_epsilon", float("nan"), "layer_norm_epsilon"),
        ("fixmin.attention.layer_norm_epsilon", -1.0, "epsilon is negative"),
        ("fixmin.rope.dimension_count", 18, "rope.dimension_count is 18"),
        ("fixmin.rope.dimension_count", 7, "rope.dimension_count is 7"),
        ("fixmin.rope.freq_base", 0.0, "freq_base"),
        ("fixmin.rope.freq_base", float("nan"), "freq_base"),
        ("fixmin.rope.style", "spiral", "rope.style is 'spiral'"),
        ("fixmin.activation", "relu", "fixmin.activation is 'relu'"),
        ("fixmin.code.kind", "hash", "code.kind is 'hash'"),
        ("fixmin.code.width", 0, "code.width is 0"),
        ("fixmin.code.width", 33, "code.width is 33"),
        ("fixmin.code.width", 8, "affine_matrix|matrix"),
        ("fixmin.code.width", 6, "code"),
        ("fixmin.code.lift", "stretch", "stretch"),
        ("fixmin.code.lift", "interleave", "code"),
        ("fixmin.code.affine_matrix", [0] * 49, "invertible|singular"),
        ("fixmin.code.affine_matrix", [1] * 48, "matrix"),
        ("fixmin.code.affine_shift", [0] * 8, "shift"),
        ("fixmin.code.affine_shift", [2] * 7, "shift"),
        ("fixmin.code.values", [0.0], "code.values has 1 elements"),
        ("fixmin.code.values", [0.0, float("nan")], "code.values"),
    ],
)
def test_value_out_of_range(tmp_path, key, value, message):
    path = make_model(tmp_path / "m.gguf", vocab_size=100, edit=set_key(key, value))
    with pytest.raises(_core.GGUFError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("key", "value_type", "value"),
    [
        ("fixmin.vocab_size", "STRING", "100"),
        ("fixmin.vocab_size", "INT32", -5),
        ("fixmin.attention.scale", "UINT32", 1),
        ("fixmin.activation", "UINT32", 1),
    ],
)
def test_value_of_wrong_type(tmp_path, key, value_type, value):
    path = make_model(tmp_path / "m.gguf", edit=set_type(key, value_type, value))
    with pytest.raises(_core.GGUFError, match=key):
        load(path)


def test_both_epsilons(tmp_path):
    edit = lambda writer: writer.add_float32("fixmin.attention.layer_norm_rms_epsilon", 1e-5)  # noqa: E731
    with pytest.raises(_core.GGUFError, match="exactly one of"):
        load(make_model(tmp_path / "m.gguf", edit=edit))


# --- tensors -----------------------------------------------------------------------------------------------------


def edit_tensor(name, change):
    """change(info) on one tensor of the writer."""

    def edit(writer):
        change(writer.tensors[0][name])

    return edit


TENSORS = [
    "blk.0.attn_norm.weight",
    "blk.0.attn_q.weight",
    "blk.1.attn_norm.weight",
    "blk.1.attn_k.weight",
    "blk.1.attn_output.weight",
    "blk.0.ffn_norm.weight",
    "blk.1.ffn_up.weight",
    "blk.0.ffn_down.weight",
    "output_norm.weight",
    "output.weight",
]


@pytest.mark.parametrize("name", TENSORS)
def test_missing_tensor(tmp_path, name):
    path = make_model(tmp_path / "m.gguf", edit=lambda writer: writer.tensors[0].pop(name))
    with pytest.raises(_core.GGUFError, match=name if "attn_output" not in name else "block"):
        load(path)


def test_missing_table(tmp_path):
    edit = lambda writer: writer.tensors[0].pop("token_code.weight")  # noqa: E731
    with pytest.raises(_core.GGUFError, match=r"token_code.weight"):
        load(make_model(tmp_path / "m.gguf", code_kind="table", edit=edit))


def test_table_with_bits_beyond_the_width(tmp_path):
    def edit(writer):
        writer.tensors[0]["token_code.weight"].tensor[5, 0] = -1  # all eight bits of a 7-bit code

    with pytest.raises(_core.GGUFError, match="row 5"):
        load(make_model(tmp_path / "m.gguf", code_kind="table", edit=edit))


def test_extra_tensor(tmp_path):
    edit = lambda writer: writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32))  # noqa: E731
    with pytest.raises(_core.GGUFError, match=r"blk.0.attn_q_norm.weight.*no place"):
        load(make_model(tmp_path / "m.gguf", edit=edit))


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
@pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_v.weight", "blk.1.attn_v.weight"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_weights_that_are_not_finite(tmp_path, kind, name, bad):
    def edit(writer):
        data = writer.tensors[0][name].tensor
        raw = np.ascontiguousarray(data).view(np.uint8).copy()
        row = raw[raw.shape[0] // 2]
        stored = writer.tensors[0][name].dtype
        if stored == GGMLQuantizationType.F32:
            row[:4] = np.array([bad], np.float32).view(np.uint8)
        elif stored == GGMLQuantizationType.BF16:
            row[:2] = (np.array([bad], np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:  # the element, or the last scale or minimum of the first block
            at = HALVES[stored.name][-1] if stored.name in HALVES else 0
            row[at : at + 2] = np.array([bad], np.float16).view(np.uint8)
        writer.tensors[0][name].tensor = raw.view(data.dtype)

    path = make_model(tmp_path / "m.gguf", weight_type=kind, edit=edit, embedding_length=256, feed_forward_length=256)
    with pytest.raises(_core.GGUFError, match=f"{name}.*NaN or infinite"):
        load(path)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_rows_that_are_not_whole_blocks(tmp_path, kind):
    """Rows of 96 where the type needs 256, in a file whose sizes fit otherwise."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]

    def edit(writer):
        info = writer.tensors[0]["blk.1.ffn_down.weight"]
        info.dtype = GGMLQuantizationType[kind]
        info.tensor = np.zeros((64 * 96 // block, size), np.uint8)
        info.nbytes = info.tensor.nbytes

    with pytest.raises(_core.GGUFError, match=rf"blk.1.ffn_down.weight.*96 is not a multiple.*256 of {kind}"):
        load(make_model(tmp_path / "m.gguf", edit=edit))


def test_type_that_is_not_supported(tmp_path):
    def edit(writer):
        info = writer.tensors[0]["blk.1.ffn_down.weight"]
        info.tensor = info.tensor.astype(np.float64)
        info.dtype = GGMLQuantizationType.F64
        info.nbytes = info.tensor.nbytes

    with pytest.raises(_core.UnsupportedError, match=r"blk.1.ffn_down.weight.*F64.*Q4_0.*IQ4_XS"):
        load(make_model(tmp_path / "m.gguf", edit=edit))


@pytest.mark.slow
def test_mutated_files_never_crash(tmp_path):
    """Any change of a byte gives a model, or FixminError; in both cases this process lives on."""
    original = make_model(tmp_path / "m.gguf", block_count=1, embedding_length=32, head_count=2, feed_forward_length=32)
    data = bytearray(original.read_bytes())
    end_of_header = min(t.offset for t in _core.GgufFile(str(original)).tensors)
    rng = np.random.default_rng(0)
    target = tmp_path / "mutated.gguf"
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(1500):
        mutated = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            mutated[rng.integers(0, end_of_header)] = rng.integers(0, 256)
        target.write_bytes(mutated)
        try:
            _core.Engine(str(target), n_threads=1).logits(np.zeros(1, np.uint32))
            outcomes["loaded"] += 1
        except _core.FixminError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 500, outcomes
    assert outcomes["loaded"] > 0, outcomes


def test_truncated_files(tmp_path):
    original = make_model(tmp_path / "m.gguf", block_count=1, embedding_length=32, head_count=2, feed_forward_length=32)
    data = original.read_bytes()
    end = max(t.offset + t.n_bytes for t in _core.GgufFile(str(original)).tensors)  # padding may follow
    for size in np.linspace(0, end - 1, 200).astype(int):
        original.write_bytes(data[:size])
        with pytest.raises(_core.GGUFError):
            load(original)


def set_tensor(name, change):
    """change(array) -> the array that stands there instead; None: the tensor is missing."""

    def edit(writer):
        value = change(writer.tensors[0][name].tensor)
        if value is None:
            del writer.tensors[0][name]
        else:
            writer.tensors[0][name].tensor = value

    return edit


def with_value(at, value):
    def change(array):
        array = array.copy()
        array[at] = value
        return array

    return change


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            set_tensor("blk.1.ffn_up.weight_scale", lambda a: None),
            _core.GGUFError,
            r"blk.1.ffn_up.weight_scale' is miss",
        ),
        *(
            (
                set_tensor("output.weight_scale", with_value(row, bad)),
                _core.GGUFError,
                rf"{shown} for row {row}: scales",
            )
            for row, bad, shown in [
                (3, np.nan, "nan"),
                (99, np.inf, "inf"),
                (0, -0.5, "-0.5"),
                (7, 2.7e36, r"2.7e\+36"),
            ]
        ),
        (set_tensor("blk.1.attn_q.weight", with_value((5, 7), -128)), _core.GGUFError, "blk.1.attn_q.weight.*-128"),
        (without_key("fixmin.w8a8.version"), _core.GGUFError, "fixmin.w8a8.version"),
        (set_key("fixmin.w8a8.version", 2), _core.UnsupportedError, "fixmin.w8a8.version is 2; this version runs 1"),
        (
            lambda w: w.add_tensor("blk.0.attn_q.weight_scale", np.ones(64, np.float32)),
            _core.GGUFError,
            "blk.0.attn_q.weight_scale.*no place",
        ),
    ],
)
def test_scales_of_rows(tmp_path, edit, error, message):
    load(make_model(tmp_path / "right.gguf", weight_type="W8A8"))
    with pytest.raises(error, match=message):
        load(make_model(tmp_path / "m.gguf", weight_type="W8A8", edit=edit))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_key("fixmin.w8a8.version", 2), "fixmin.w8a8.version is 2"),
        (set_tensor("blk.0.attn_k.weight_scale", with_value(3, -1.0)), "blk.0.attn_k.weight_scale.* -1 for row 3"),
        (set_tensor("blk.0.attn_k.weight", with_value((5, 7), -128)), "blk.0.attn_k.weight.*-128"),
    ],
)
def test_w8a8_in_the_folded_layer(tmp_path, edit, message):
    form = {"weight_types": {"blk.0.attn_k": "W8A8"}}
    load(make_model(tmp_path / "right.gguf", **form))
    with pytest.raises(_core.FixminError, match=message):
        load(make_model(tmp_path / "m.gguf", **form, edit=edit))


def test_rows_of_w8a8_that_are_no_whole_blocks(tmp_path):
    path = make_model(tmp_path / "m.gguf", weight_types={"blk.1.ffn_down": "W8A8"}, feed_forward_length=80)
    with pytest.raises(_core.UnsupportedError, match=r"blk.1.ffn_down.weight' has rows of 80 bytes; W8A8 needs a mult"):
        load(path)
