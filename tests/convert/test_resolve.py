"""Resolving with the checkpoint's own code: what is reported, what is refused, and that nothing is left behind."""

import importlib.util
import json
import py_compile
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import zoo  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from sampled import sampled  # noqa: E402

from fixmin_cpp.convert.observed.own_modules import forget_modules, import_package  # noqa: E402
from fixmin_cpp.convert.overrides import OVERRIDES  # noqa: E402
from fixmin_cpp.convert.resolve import resolve  # noqa: E402
from fixmin_cpp.convert.streaming import reference_logits  # noqa: E402
from fixmin_cpp.errors import CheckpointError  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    zoo.make_checkpoint(zoo.STYLES["bochkov"], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change_weights(directory: Path, change) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


def test_every_convention_is_reported_with_its_origin(checkpoint: Path) -> None:
    lines: list[str] = []
    with resolve(checkpoint, trust_remote_code=True, log=lines.append) as resolved:
        spec = resolved.spec
        assert resolved.report == lines
        for name in (
            "lift",
            "norm",
            "norm_eps",
            "rope_style",
            "rope_base",
            "rope_dim",
            "attention_scale",
            "activation",
        ):
            value, origin = spec.conventions[name]
            assert value == (spec.code.lift if name == "lift" else getattr(spec, name))
            assert origin
            assert any(line.startswith(f"{name} = ") and line.endswith(f"({origin})") for line in lines)
        assert spec.conventions["attn_q"][0] == "transformer_layers.0.self_attn.q_proj.weight"
        assert spec.code.kind == "affine"
        assert spec.weights_sha256() == resolved.source.sha256()


def test_recipes_read_what_the_model_computes_with(checkpoint: Path) -> None:
    state = load_file(checkpoint / "model.safetensors")
    with resolve(checkpoint, trust_remote_code=True) as resolved:
        recipe = resolved.spec.tensors["blk.1.ffn_up.weight"]
        assert recipe.sources == ("transformer_layers.1.mlp.0.weight",)
        np.testing.assert_array_equal(recipe.load(), state["transformer_layers.1.mlp.0.weight"])
        np.testing.assert_array_equal(recipe.load_rows(3, 9), state["transformer_layers.1.mlp.0.weight"][3:9])
        with pytest.raises(IndexError):
            recipe.load_rows(0, recipe.shape[0] + 1)


def test_own_code_stays_available(checkpoint: Path) -> None:
    original = zoo.Original.load(checkpoint, zoo.STYLES["bochkov"])
    with resolve(checkpoint, trust_remote_code=True) as resolved:
        ids = zoo.prompt(original)
        np.testing.assert_allclose(resolved.reference_logits(ids), original.logits(ids), atol=1e-5)
        many = np.arange(3 * original.context_length) % original.vocab_size  # more than one sequence
        np.testing.assert_array_equal(resolved.reference_input(many), original.input_rows(many))


@pytest.mark.parametrize(
    ("key", "value"), [("lift", "tile"), ("rope_base", 20000.0), ("n_head", 4), ("activation", "gelu_tanh")]
)
def test_stating_what_the_code_does_not_do(checkpoint: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"--{key.replace('_', '-')} {value}"):
        resolve(checkpoint, trust_remote_code=True, overrides={key: value})


def test_stating_what_the_code_does(checkpoint: Path) -> None:
    stated = {"lift": "interleave", "rope_base": 10000.0, "norm_eps": 1e-5, "activation": "gelu", "n_head": 2}
    with resolve(checkpoint, trust_remote_code=True, overrides=stated) as resolved:
        assert resolved.spec.rope_base == 10000.0


@pytest.fixture
def recoded(tmp_path: Path) -> Path:
    zoo.make_checkpoint(zoo.STYLES["seeded"], tmp_path / "recoded")
    return tmp_path / "recoded"


def test_stating_the_code_that_the_code_computes(recoded: Path, tmp_path: Path) -> None:
    """In every writing: rows or columns, either order of bits, and the values exchanged with the complement."""
    with resolve(recoded, trust_remote_code=True) as resolved:
        code = resolved.spec.code
    a, b, values = code.matrix, code.shift, code.values
    np.save(tmp_path / "a.npy", a)
    for stated in (
        {"affine": (a, b)},
        {"affine": (tmp_path / "a.npy", b), "values": values, "affine_orientation": "Ac", "bit_order": "lsb"},
        {"affine": (a.T, b)},
        {"affine": (a[:, ::-1], b), "bit_order": "msb"},
        {"affine": (a, 1 - b), "values": values[::-1]},
    ):
        with resolve(recoded, trust_remote_code=True, overrides=stated) as resolved:
            assert (resolved.spec.code.matrix == a).all()
            assert (resolved.spec.code.shift == b).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, v: {"affine": (a, b ^ (np.arange(len(b)) == 0))}, "--affine is stated, but .* other codes"),
        (lambda a, b, v: {"affine": (a[::-1], b)}, "--affine is stated, but .* other codes"),
        (lambda a, b, v: {"affine": (a.T, b), "affine_orientation": "Ac"}, "--affine is stated, but .* other codes"),
        (lambda a, b, v: {"affine": (a, b), "bit_order": "msb"}, "--affine is stated, but .* other codes"),
        (lambda a, b, v: {"affine": (a, 1 - b), "values": v}, "--affine is stated, but .* other codes"),
        (lambda a, b, v: {"affine": (a[:3, :3], b[:3])}, "codes of 3 bits for"),
        (lambda a, b, v: {"affine": ("nowhere.npy", b)}, "--affine .*nowhere"),
        (lambda a, b, v: {"values": (v[0], v[1] + 1)}, "--values .* is stated, but"),
    ],
    ids=["shift", "rows", "orientation", "order", "complement", "narrow", "absent", "values"],
)
def test_stating_another_code_than_is_computed(recoded: Path, change, message: str) -> None:
    with resolve(recoded, trust_remote_code=True) as resolved:
        code = resolved.spec.code
    with pytest.raises(CheckpointError, match=message):
        resolve(recoded, trust_remote_code=True, overrides=change(code.matrix, code.shift, code.values))


def test_a_context_of_one_token_shows_nothing(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"context_length: 1 \(given\).*fewer than two"):
        resolve(checkpoint, trust_remote_code=True, overrides={"context_length": 1})


def test_unknown_override(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=f"temperature.*{next(iter(OVERRIDES))}"):
        resolve(checkpoint, overrides={"temperature": 1})


def test_tensor_the_code_does_not_know(checkpoint: Path, tmp_path: Path) -> None:
    change_weights(checkpoint, lambda state: state.update({"value_head.weight": torch.zeros(3, 64)}))
    with pytest.raises(CheckpointError, match=r"value_head\.weight \(3, 64\).*--map"):
        resolve(checkpoint, trust_remote_code=True)
    (tmp_path / "map.txt").write_text("value_head.weight = ignore\n")
    with resolve(checkpoint, trust_remote_code=True, map_file=tmp_path / "map.txt"):
        pass


def test_missing_weights(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda state: state.pop("transformer_layers.1.mlp.2.weight"))
    with pytest.raises(CheckpointError, match=r"transformer_layers\.1\.mlp\.2\.weight"):
        resolve(checkpoint, trust_remote_code=True)


def test_weights_of_another_shape(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda state: state.update({"final_layernorm.weight": torch.ones(63)}))
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight: \(63,\) in the file, \(64,\) in the code"):
        resolve(checkpoint, trust_remote_code=True)


def test_weights_that_are_no_numbers(checkpoint: Path) -> None:
    change_weights(checkpoint, lambda state: state["lm_head.bias"].fill_(torch.nan))
    with pytest.raises(CheckpointError):
        resolve(checkpoint, trust_remote_code=True)


def test_codes_drawn_without_a_seed(checkpoint: Path) -> None:
    """Each construction of such a model is another function, and no file says which one was trained."""
    change_weights(checkpoint, lambda state: state.pop("token_embeddings.weight"))
    path = next(checkpoint.glob("model_*.py"))
    text = path.read_text()
    edits = {
        "nn.Embedding(config.vocab_size, config.n_embed)": "nn.Module()",
        "self.token_embeddings.weight.copy_(((ids >> torch.arange(config.n_embed)) & 1).float())": "pass",
        "self.token_embeddings.weight.requires_grad = False": "self.codes = torch.rand(config.vocab_size, 8).round()",
        "self.token_embeddings(input_ids)": "self.codes[input_ids]",
    }
    for old, new in edits.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"codes.* at random"):
        resolve(checkpoint, trust_remote_code=True)


def test_two_checkpoints_with_the_same_names(tmp_path: Path) -> None:
    """One directory name, one module name, one registered model type, two functions."""
    styles = [zoo.STYLES["bochkov"], zoo.STYLES["bochkov_tile"]]
    lifts = []
    for number, style in enumerate(styles):
        directory = tmp_path / str(number) / "checkpoint"
        zoo.make_checkpoint(style, directory)
        config = json.loads((directory / "config.json").read_text())
        stem = config["auto_map"]["AutoConfig"].split(".")[0]
        (directory / f"{stem}.py").rename(directory / "modeling.py")
        config["auto_map"] = {k: "modeling." + v.split(".")[1] for k, v in config["auto_map"].items()}
        (directory / "config.json").write_text(json.dumps(config))
        with (directory / "modeling.py").open("a") as file:
            file.write("\nfrom transformers import AutoConfig, AutoModelForCausalLM\n")
            file.write('AutoConfig.register("model_n_embed_binary", BVVConfig)\n')
            file.write("AutoModelForCausalLM.register(BVVConfig, BVVForCausalLM)\n")
        with resolve(directory, trust_remote_code=True) as resolved:
            lifts.append(resolved.spec.code.lift)
        assert not (directory / "__pycache__").exists()
    assert lifts == ["interleave", "tile"]


def test_nothing_stays_imported_or_seeded(checkpoint: Path) -> None:
    before = set(sys.modules)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with resolve(checkpoint, trust_remote_code=True):
        pass
    left = [sys.modules[m] for m in set(sys.modules) - before]
    assert not [m for m in left if str(checkpoint) in str(getattr(m, "__file__", ""))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_what_runs_is_what_stands_in_the_files(checkpoint: Path, tmp_path: Path) -> None:
    """And not bytecode beside them that says of itself that it is valid."""
    (tmp_path / "other.py").write_text("raise SystemExit('the bytecode ran')\n")
    for source in checkpoint.glob("*.py"):
        py_compile.compile(
            str(tmp_path / "other.py"),
            importlib.util.cache_from_source(str(source)),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    hooks = list(sys.path_hooks)
    with resolve(checkpoint, trust_remote_code=True) as resolved:
        assert resolved.spec.code.lift == "interleave"
    assert sys.path_hooks == hooks
    assert [path for path in sys.path_importer_cache if path.startswith(str(checkpoint))] == []


def test_what_runs_of_a_subfolder_is_what_stands_in_its_files(checkpoint: Path, tmp_path: Path) -> None:
    """That the code puts on sys.path, by a link too. And no bytecode is left there."""
    (source,) = checkpoint.glob("*.py")
    (tmp_path / "link").symlink_to(checkpoint)
    (tmp_path / "other.py").write_text("raise SystemExit('the bytecode ran')\n")
    for name in ("lib", "clean"):
        (checkpoint / name).mkdir()
        (checkpoint / name / f"helper_{name}.py").write_text("VALUE = 1\n")
    py_compile.compile(
        str(tmp_path / "other.py"),
        importlib.util.cache_from_source(str(checkpoint / "lib" / "helper_lib.py")),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    paths = [str(checkpoint / "clean"), str(tmp_path / "link" / "lib")]
    header = f"import sys\nsys.path[:0] = {paths}\nimport helper_lib, helper_clean\n"
    future, rest = "from __future__ import annotations\n", source.read_text()
    source.write_text((future if future in rest else "") + header + rest.replace(future, ""))
    with resolve(checkpoint, trust_remote_code=True) as resolved:
        assert resolved.spec.code.lift == "interleave"
    assert not (checkpoint / "clean" / "__pycache__").exists()
    # Another checkpoint's helper of the same name would be taken for it.
    assert {"helper_lib", "helper_clean"} & set(sys.modules) == set()


def test_libraries_below_a_checkpoint_are_none_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, own = tmp_path / "venv" / "library", tmp_path / "own"
    for folder in (library, own):
        folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(library))
    try:
        import_package(tmp_path)
        loaders = [dict(sys.path_hooks[0](str(folder))._loaders) for folder in (tmp_path, own)]
        assert [set(suffixes) for suffixes in loaders] == [{".py"}, {".py"}]
        with pytest.raises(ImportError):
            sys.path_hooks[0](str(library))
    finally:
        forget_modules(tmp_path)
        sys.path.remove(str(tmp_path))


def test_a_map_can_say_everything(tmp_path: Path) -> None:
    """For code that is not there and names that mean nothing."""
    style = zoo.STYLES["letters"]
    zoo.make_checkpoint(style, tmp_path / "checkpoint", full_config=True)
    original = zoo.Original.load(tmp_path / "checkpoint", style)
    with resolve(tmp_path / "checkpoint", trust_remote_code=True) as resolved:
        code = resolved.spec.code
    for path in (tmp_path / "checkpoint").glob("*.py"):
        path.unlink()
    letters = {"attn_norm": "g", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "ffn_norm": "s",
               "ffn_gate": "u", "ffn_up": "w", "ffn_down": "z"}  # fmt: skip
    lines = [f"blk.{{i}}.{role}.weight = l.{{i}}.{letter}" for role, letter in letters.items()]
    (tmp_path / "map.txt").write_text("\n".join([*lines, "output_norm.weight = f", "output.weight = y"]))
    stated = {
        "affine": (code.matrix, code.shift), "bit_order": "lsb", "affine_orientation": "Ac", "lift": "tile",
        "norm": "rmsnorm", "norm_eps": 1e-6, "activation": "swiglu", "rope_style": "interleaved", "rope_base": 10000.0,
        "n_head": 4, "context_length": 64, "transposed": False,
        "values": (0.0, 1.0), "rope_dim": 16, "attention_scale": 0.25,
    }  # fmt: skip
    with resolve(tmp_path / "checkpoint", map_file=tmp_path / "map.txt", overrides=stated) as resolved:
        ids = zoo.prompt(original)
        (logits,) = reference_logits(resolved.spec, [ids])
        np.testing.assert_allclose(logits, original.logits(ids), rtol=1e-3, atol=1e-4)


# --- habits of other authors ---------------------------------------------------------------------------------------

SDPA = "F.scaled_dot_product_attention(q, k, v, is_causal=q_len > 1)"
SCORES = "({0} + torch.full((q_len, q_len), -torch.inf).triu(1)).softmax(-1) @ v"
HALF = "torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)"
FORWARD = "    def forward(self, input_ids=None"
HABITS = {
    "key and value cache in the modules": (
        "self.o_proj = nn.Linear(",
        "self.cache = torch.zeros(2, 1, self.num_kv_heads, 512, self.head_dim)\n        self.o_proj = nn.Linear(",
        "q, k = apply_rotary(q, k, *position_embeddings)\n",
        "q, k = apply_rotary(q, k, *position_embeddings)\n        self.cache[0, :, :, :q_len] = k\n"
        "        self.cache[1, :, :, :q_len] = v\n        k, v = self.cache[:, :, :, :q_len]\n",
    ),
    "trained scale in every block": (
        "self.o_proj = nn.Linear(",
        "self.temperature = nn.Parameter(torch.tensor([0.31]))\n        self.o_proj = nn.Linear(",
        SDPA, SCORES.format("(q * self.temperature) @ k.mT"),
    ),
    "root of the scale on q and on k": (SDPA, SCORES.format("(q / 16**0.25) @ (k / 16**0.25).mT")),
    "scale given to the fused attention": (SDPA, SDPA.replace("is_causal", "scale=0.2, is_causal")),
    "scripted rotation": ("def rotate_half(x):", "@torch.jit.script\ndef rotate_half(x):"),
    "rotation the other way round": (HALF, HALF.replace("(-x", "(x").replace(", x[", ", -x[")),
    "positions from seven": ("position_ids[:, :, None].float()", "(position_ids[:, :, None].float() + 7)"),
    "inference mode": (FORWARD, "    @torch.inference_mode()\n" + FORWARD),
    "the same blocks twice": ("for layer in self.layers:", "for layer in [*self.layers, *self.layers]:"),
    "values that are the keys": ("v = self.v_proj(", "v = self.k_proj("),
}  # fmt: skip


@pytest.mark.parametrize("habit", sampled(HABITS, 4))
def test_habits(habit: str, tmp_path: Path) -> None:
    edits = tuple(zip(HABITS[habit][::2], HABITS[habit][1::2], strict=True))
    style = zoo.Style(zoo.STYLES["llama"].author, {}, edits=edits)
    zoo.make_checkpoint(style, tmp_path)
    original = zoo.Original.load(tmp_path, style)
    ids = zoo.prompt(original)
    with resolve(tmp_path, trust_remote_code=True) as resolved:
        (logits,) = reference_logits(resolved.spec, [ids])
    expected = original.logits(ids)
    assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)


def test_half_precision_is_too_coarse(tmp_path: Path) -> None:
    edit = (FORWARD, "    @torch.autocast('cpu', torch.bfloat16)\n" + FORWARD)
    zoo.make_checkpoint(zoo.Style(zoo.STYLES["llama"].author, {}, edits=(edit,)), tmp_path)
    with pytest.raises(CheckpointError, match="bfloat16"):
        resolve(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lift", "tiled"), ("norm_eps", float("nan")), ("rope_base", -1.0), ("n_head", 2.5), ("values", (1.0,)),
     ("qkv_order", "qqk"), ("rope_dim", 0), ("transposed", "yes")],
)  # fmt: skip
def test_values_that_make_no_sense(checkpoint: Path, key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"--{key.replace('_', '-')} .*must be"):
        resolve(checkpoint, overrides={key: value})
