"""Roles by shape, name and place, and the --map file."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from fixmin_cpp.convert.checkpoint.roles import (  # noqa: E402
    Map,
    assign_roles,
    is_no_weight,
    mapped_recipes,
    read_map,
    role_by_name,
    split_blocks,
)
from fixmin_cpp.convert.checkpoint.source import Source  # noqa: E402
from fixmin_cpp.errors import CheckpointError  # noqa: E402

D, FF, V = 16, 40, 50

# scheme -> suffixes of attn_norm, q, k, v, o, ffn_norm, up, down
SCHEMES = {
    "layers.{}.": "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "post_attention_layernorm mlp.up_proj mlp.down_proj",
    "transformer.h.{}.": "ln_1 attn.query attn.key attn.value attn.c_proj ln_2 mlp.c_fc mlp.c_proj",
    "model.layers_{}_": "norm1 wq wk wv wo norm2 fc1 fc2",
    "encoder.block{}.": "attention_norm attention.to_q attention.to_k attention.to_v attention.to_out.0 "
    "ffn_norm feed_forward.0 feed_forward.2",
}


def checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> Source:
    generator = torch.Generator().manual_seed(0)
    save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, path / "model.safetensors")
    return Source(path)


def block_shapes(
    prefix: str, suffixes: str, transposed: bool = False, biases: bool = True
) -> dict[str, tuple[int, ...]]:
    sizes = [(D,), (D, D), (D, D), (D, D), (D, D), (D,), (FF, D), (D, FF)]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(3):
        for suffix, size in zip(suffixes.split(), sizes, strict=True):
            stem = prefix.format(layer) + suffix
            shapes[f"{stem}.weight"] = size[::-1] if transposed else size
            if biases:
                shapes[f"{stem}.bias"] = size[:1]
    return shapes


TOP = {"ln_f.weight": (D,), "ln_f.bias": (D,), "lm_head.weight": (V, D)}
ROLES = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_up", "ffn_down"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("prefix", SCHEMES)
def test_naming_schemes(tmp_path: Path, prefix: str, transposed: bool) -> None:
    source = checkpoint(tmp_path, {**block_shapes(prefix, SCHEMES[prefix], transposed), **TOP})
    roles = assign_roles(source, Map(), V)
    assert roles.width == D
    assert roles.transposed is transposed
    assert roles.options == []
    assert len(roles.blocks) == 3
    for layer, block in enumerate(roles.blocks):
        for role, suffix in zip(ROLES, SCHEMES[prefix].split(), strict=True):
            stem = prefix.format(layer) + suffix
            assert (block[role].weight, block[role].bias) == (f"{stem}.weight", f"{stem}.bias")
    assert roles.top["output"].weight == "lm_head.weight"
    assert roles.top["output_norm"].bias == "ln_f.bias"


def test_square_mlp_follows_the_names(tmp_path: Path) -> None:
    suffixes = SCHEMES["layers.{}."]
    shapes = {n: tuple(D for _ in s) for n, s in block_shapes("layers.{}.", suffixes, biases=False).items()}
    source = checkpoint(tmp_path, {**shapes, **TOP})
    roles = assign_roles(source, Map(), V)
    assert roles.transposed is None
    assert roles.blocks[0]["ffn_up"].weight == "layers.0.mlp.up_proj.weight"


def test_names_that_say_nothing_become_options(tmp_path: Path) -> None:
    suffixes = "n1 m.0 m.1 m.2 m.3 n2 f.0 f.2"
    source = checkpoint(tmp_path, {**block_shapes("b.{}.", suffixes), **TOP})
    roles = assign_roles(source, Map(), V)
    names = [what for what, _ in roles.options]
    assert names == ["which of the square matrices is which", "which norm comes before attention"]
    choices = roles.options[0][1]
    assert len(choices) == 24
    assert len({tuple(b["attn_q"].weight for b in blocks) for _, blocks in choices}) == 4
    assert roles.blocks[1]["ffn_up"].weight == "b.1.f.0.weight"  # shapes tell


def test_leftovers_are_listed(tmp_path: Path) -> None:
    shapes = {**block_shapes("layers.{}.", SCHEMES["layers.{}."]), **TOP}
    shapes["layers.1.self_attn.extra.weight"] = (3, 5)
    source = checkpoint(tmp_path, shapes)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.extra\.weight \(3, 5\)"):
        assign_roles(source, Map(), V)
    roles = assign_roles(source, Map(ignored={"layers.1.self_attn.extra.weight"}), V)
    assert roles.ignored == {"layers.1.self_attn.extra.weight": "--map"}


def test_one_norm_of_two_is_no_guess(tmp_path: Path) -> None:
    shapes = {**block_shapes("layers.{}.", SCHEMES["layers.{}."]), **TOP}
    shapes = {n: s for n, s in shapes.items() if "post_attention" not in n}
    with pytest.raises(CheckpointError, match="norm"):
        assign_roles(checkpoint(tmp_path, shapes), Map(), V)


def test_blocks_in_a_sequence_of_halves(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"net.0.weight": (V, 4)}
    for layer in range(2):
        for i in range(4):
            shapes[f"net.{2 * layer + 1}.1.p.{i}.weight"] = (D, D)
        shapes[f"net.{2 * layer + 2}.1.weight"] = (3 * D, D)
        shapes[f"net.{2 * layer + 2}.3.weight"] = (D, 3 * D)
    source = checkpoint(tmp_path, shapes)
    blocks, rest = split_blocks(source, list(source.tensors))
    assert rest == ["net.0.weight"]
    assert [b["0.1.p.2.weight"] for b in blocks] == ["net.1.1.p.2.weight", "net.3.1.p.2.weight"]
    assert [b["1.3.weight"] for b in blocks] == ["net.2.3.weight", "net.4.3.weight"]


def test_no_blocks(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, {"stacked": (3, D, D), "head": (V, D)})
    with pytest.raises(CheckpointError, match="blocks"):
        split_blocks(source, list(source.tensors))


@pytest.mark.parametrize(
    "name", ["rotary_emb.inv_freq", "attn.masked_bias", "h.0.attn.mask", "tril", "layers.3.cos_cached", "freqs_cis"]
)
def test_names_of_no_weights(name: str) -> None:
    assert is_no_weight(name)


@pytest.mark.parametrize("name", ["attn.bias", "self_attn.q_proj.weight", "freedom.weight", "masking_head.weight"])
def test_names_of_weights(name: str) -> None:
    assert not is_no_weight(name)


def test_masks_by_their_values() -> None:
    mask = torch.full((5, 5), float("-inf")).triu(1)
    assert is_no_weight("attn.bias", mask.numpy())
    assert is_no_weight("attn.bias", torch.ones(1, 1, 5, 5).tril().bool().numpy())
    assert not is_no_weight("attn.bias", torch.ones(5, 5).numpy() * torch.arange(5).numpy())


@pytest.mark.parametrize(
    ("stem", "role"),
    [
        ("self_attn.q_proj", "attn_q"), ("attention.wk", "attn_k"), ("attn.W_V", "attn_v"), ("attn.c_attn", "attn_qkv"),
        ("attention.query_key_value", "attn_qkv"), ("attention.dense", "attn_output"), ("mlp.c_proj", "ffn_down"),
        ("mlp.dense_4h_to_h", "ffn_down"), ("mlp.gate_up_proj", "ffn_gate_up"), ("feed_forward.w2", None),
        ("mlp.0", None),
    ],
)  # fmt: skip
def test_role_by_name(stem: str, role: str | None) -> None:
    assert role_by_name(stem) == role


# --- --map ---------------------------------------------------------------------------------------------------------


def mapped(tmp_path: Path, text: str) -> tuple[Source, Map]:
    source = checkpoint(tmp_path, {"l.0.x": (6, 4), "l.1.x": (6, 4), "junk": (2,)})
    (tmp_path / "map.txt").write_text(text)
    return source, read_map(source, tmp_path / "map.txt")


@pytest.mark.parametrize(
    "text",
    [
        "# comment\nblk.{i}.attn_q.weight = l.{i}.x T rows 1:3  # every block\n\njunk = ignore\n",
        '{"blk.{i}.attn_q.weight": "l.{i}.x T rows 1:3", "junk": "ignore"}',
    ],
)
def test_map(tmp_path: Path, text: str) -> None:
    source, mapping = mapped(tmp_path, text)
    assert mapping.ignored == {"junk"}
    recipes = mapped_recipes(source, mapping)
    assert set(recipes) == {"blk.0.attn_q.weight", "blk.1.attn_q.weight"}
    recipe = recipes["blk.1.attn_q.weight"]
    assert recipe.shape == (2, 6)
    assert recipe.sources == ("l.1.x",)
    assert (recipe.load() == source.read("l.1.x").T[1:3]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blk.0.attn_q.weight = absent", "absent"),
        ("absent = ignore", "absent"),
        ("blk.0.attn_q.weight l.0.x", "line 1"),
        ("blk.0.attn_q.weight = l.0.x rows 3", "FIRST:END"),
        ("{", "map"),
    ],
)
def test_broken_map(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mapped(tmp_path, text)


def test_rows_beyond_the_tensor(tmp_path: Path) -> None:
    source, mapping = mapped(tmp_path, "blk.0.attn_q.weight = l.0.x rows 2:9")
    with pytest.raises(CheckpointError, match="2:9"):
        mapped_recipes(source, mapping)
