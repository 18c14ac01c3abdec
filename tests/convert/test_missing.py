"""Tensors that the files lack or have beyond the model: an error that names them, unless an option names them too."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from spec_factory import make_reference, save_checkpoint

from fixmin_cpp import _core
from fixmin_cpp.convert.certify import remembered_allowances, verify
from fixmin_cpp.convert.checkpoint.source import Source
from fixmin_cpp.convert.convert import convert
from fixmin_cpp.convert.resolve import resolve
from fixmin_cpp.errors import CheckpointError

GATED = {"activation": "swiglu", "norm_type": "rmsnorm", "mlp_bias": False}
STATED = {"lift": "tile", "bit_order": "lsb", "affine_orientation": "Ac"}


pytestmark = pytest.mark.usefixtures("one_thread")


def checkpoint(tmp_path: Path, change=lambda state: None, config=None, **options) -> Path:
    """A checkpoint of three blocks whose tensors and config.json are changed after it was saved."""
    folder = save_checkpoint(make_reference(num_hidden_layers=3, **options), tmp_path / "tiny")
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def without(*names: str):
    """Drops tensors; a name that ends with a dot stands for all that begin so."""

    def change(state: dict) -> None:
        for name in [n for n in state if any(n == m or (m.endswith(".") and n.startswith(m)) for m in names)]:
            del state[name]

    return change


MISSING = {
    "bias": ("model.layers.1.ffn_up.bias", {}),
    "bias of the first block": ("model.layers.0.ffn_up.bias", {}),
    "bias of the last block": ("model.layers.2.ffn_down.bias", {}),
    "bias of the output": ("lm_head.bias", {}),
    "bias of a norm": ("model.layers.1.attn_norm.bias", {}),
    "norm": ("model.layers.2.ffn_norm.weight", GATED),
    "last norm": ("model.output_norm.weight", GATED),
    "matrix": ("model.layers.1.attn_v.weight", {}),
    "block": ("model.layers.1.", {}),
    "last block": ("model.layers.2.", {}),
    "output": ("lm_head.weight", {"lm_head_bias": False}),
    "code matrix": ("model.code.matrix", {"code_kind": "affine"}),
    "code shift": ("model.code.shift", {"code_kind": "affine"}),
    "code table": ("model.code.table", {"code_kind": "table"}),
}


@pytest.mark.parametrize("what", MISSING)
def test_missing_with_code(tmp_path: Path, what: str) -> None:
    name, options = MISSING[what]
    folder = checkpoint(tmp_path, without(name), **options)
    with pytest.raises(CheckpointError, match=rf"lack weights.*{re.escape(name)}") as caught:
        resolve(folder, trust_remote_code=True)
    assert "--allow-missing" in str(caught.value)


@pytest.mark.parametrize("what", MISSING)
def test_missing_without_code(tmp_path: Path, what: str) -> None:
    name, options = MISSING[what]
    folder = checkpoint(tmp_path, without(name), **options)
    spelled = {"lm_head.bias": "output.bias", "lm_head.weight": "output projection"}
    spelled |= {"model.output_norm.weight": "output_norm.weight", "model.layers.2.": "files hold 2 blocks"}
    spelled |= {"model.layers.1.": r"all of block 1"}
    spelled |= {"model.code.matrix": r"without a place .*model\.code\.shift"}  # which has none then
    with pytest.raises(CheckpointError, match=spelled.get(name, re.escape(name))):
        resolve(folder, overrides=STATED)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("pattern", ["model.layers.1.ffn_up.bias", "*.ffn_up.bias"])
def test_a_bias_that_may_be_missing_is_zero(tmp_path: Path, pattern: str, trusted: bool) -> None:
    folder = checkpoint(tmp_path, without("model.layers.1.ffn_up.bias"))
    options = {} if trusted else {"overrides": {k: v for k, v in STATED.items() if k == "lift"}}
    with resolve(folder, trust_remote_code=trusted, allow_missing=[pattern], **options) as resolved:
        bias = resolved.spec.tensors.get("blk.1.ffn_up.bias")
        assert bias is None or not bias.load().any()
        assert resolved.spec.tensors["blk.0.ffn_up.bias"].load().any()
        assert any("model.layers.1.ffn_up.bias" in warning for warning in resolved.warnings)
        assert any(line.startswith("warning: ") and "ffn_up.bias" in line for line in resolved.report)


def extra(state: dict) -> None:
    state["value_head.weight"] = torch.randn(7, 64)


@pytest.mark.slow
def test_what_was_allowed_need_not_be_repeated_to_verify(tmp_path: Path) -> None:
    def change(state: dict) -> None:
        del state["model.layers.1.ffn_up.bias"]
        extra(state)

    folder = checkpoint(tmp_path, change)
    allowed = {"allow_missing": ["*.1.ffn_up.bias"], "allow_unexpected": ["value_head.weight"]}
    with pytest.raises(CheckpointError, match=r"ffn_up\.bias"):
        convert(folder, tmp_path / "m.gguf", "f32", trust_remote_code=True)
    convert(folder, tmp_path / "m.gguf", "f32", trust_remote_code=True, **allowed)
    metadata = _core.GgufFile(str(tmp_path / "m.gguf")).metadata
    assert metadata["fixmin.convert.allow_missing"] == allowed["allow_missing"]
    assert metadata["fixmin.convert.allow_unexpected"] == allowed["allow_unexpected"]
    told: list[str] = []
    assert verify(tmp_path / "m.gguf", folder, trust_remote_code=True, progress=told.append).passed
    said = [line for line in told if "--allow" in line and "remembers" in line]
    assert said == [
        "as in the conversion, which the file remembers: --allow-missing *.1.ffn_up.bias, "
        "--allow-unexpected value_head.weight"
    ]
    # The same again, and another way to read the checkpoint, where the first name does not come up.
    assert verify(tmp_path / "m.gguf", folder, trust_remote_code=True, **allowed).passed
    with pytest.raises(CheckpointError, match="no missing tensor"):
        verify(tmp_path / "m.gguf", folder, trust_remote_code=True, allow_missing=["nothing"])


def test_a_file_remembers_nothing_where_nothing_was_allowed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    convert(folder, tmp_path / "m.gguf", "f32", trust_remote_code=True)
    assert not [k for k in _core.GgufFile(str(tmp_path / "m.gguf")).metadata if "allow" in k]
    assert remembered_allowances({"fixmin.convert.allow_missing": "*"}) == {"allow_missing": (), "allow_unexpected": ()}
    assert remembered_allowances({"fixmin.convert.allow_unexpected": [1]})["allow_unexpected"] == ()


@pytest.mark.parametrize(("option", "what"), [("allow_missing", "missing"), ("allow_unexpected", "unexpected")])
def test_a_name_that_allows_nothing(tmp_path: Path, option: str, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"lm_haed.bias: no {what} tensor"):
        resolve(checkpoint(tmp_path), trust_remote_code=True, **{option: ["lm_haed.bias"]})


@pytest.mark.parametrize("trusted", [True, False])
def test_unexpected(tmp_path: Path, trusted: bool) -> None:
    folder = checkpoint(tmp_path, extra)
    options = {"trust_remote_code": True} if trusted else {"overrides": {"lift": "tile"}}
    with pytest.raises(CheckpointError, match=r"without a place.*value_head\.weight.*--allow-unexpected"):
        resolve(folder, **options)
    with resolve(folder, allow_unexpected=["value_*"], **options) as resolved:
        assert not any("value_head" in s for t in resolved.spec.tensors.values() for s in t.sources)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_block_too_many(tmp_path: Path, trusted: bool) -> None:
    folder = checkpoint(tmp_path, config={"num_hidden_layers": 2})
    with pytest.raises(CheckpointError, match=r"layers\.2\.|hold 3 blocks"):
        resolve(folder, trust_remote_code=trusted, overrides={} if trusted else STATED)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("vocab_size", (-1, 0, 1.5, 10**12, 10**400, float("nan"), float("inf")), "must be a whole number from 1 on"),
        ("vocab_size", ("100", [100], True), "which is no number"),
        ("vocab_size", (101,), "vocab_size is 101, but the output projection has rows for 100 tokens"),
        ("hidden_size", (-1, 1.5, 10**400, float("nan")), "must be a whole number from 1 on"),
        ("hidden_size", (65,), "hidden_size is 65, but the tensors have 64"),
        ("num_attention_heads", (0, 2.5, float("inf")), "must be a whole number from 1 on"),
        ("num_key_value_heads", (-1, 10**12), "must be a whole number from 1 on"),
        ("max_position_embeddings", (-1, 10**12, 10**400), "must be a whole number from 1 on"),
        ("rope_dim", (-2, 1.5, float("nan")), "must be a whole number from 0 on"),
        ("norm_eps", (-1e-5, float("nan"), float("inf"), 10**400), "must be a positive number"),
        ("rope_theta", (0, float("nan"), -(10**400)), "must be a positive number"),
        ("attn_scale", (0, float("inf"), "x"), "must be a positive number|which is no number"),
    ],
)
def test_numbers_that_no_model_has(tmp_path: Path, key: str, values: tuple, message: str) -> None:
    """Where config.json decides, because no code is run."""
    folder = checkpoint(tmp_path)
    before = json.loads((folder / "config.json").read_text())
    for value in values:
        (folder / "config.json").write_text(json.dumps({**before, key: value}))
        with pytest.raises(
            CheckpointError, match=rf"config\.json: {key} is .*({message.replace(key + ' is ', '')})"
        ) as caught:
            resolve(folder, overrides=STATED).close()
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("what", ["matrix of zeros", "two equal rows"])
def test_ids_with_the_same_code(tmp_path: Path, what: str) -> None:
    def change(state: dict) -> None:
        matrix = state["model.code.matrix"]
        state["model.code.matrix"] = matrix * 0 if what == "matrix of zeros" else torch.cat([matrix[1:2], matrix[1:]])

    with resolve(checkpoint(tmp_path, change, code_kind="affine"), trust_remote_code=True) as resolved:
        assert any("have the code of another one" in warning for warning in resolved.warnings)


def test_another_shape(tmp_path: Path) -> None:
    def change(state: dict) -> None:
        state["model.layers.1.ffn_up.bias"] = torch.zeros(95)

    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn_up\.bias: \(95,\) in the file, \(96,\) in the code"):
        resolve(checkpoint(tmp_path, change), trust_remote_code=True)


def tied(tmp_path: Path, change, tie_word_embeddings: bool, shared: bool = False) -> Path:
    """A learned embedding; `shared`: the code itself gives both ends one parameter."""
    tmp_path.mkdir(exist_ok=True)
    folder = checkpoint(
        tmp_path, change, {"tie_word_embeddings": tie_word_embeddings}, code_kind="learned", lm_head_bias=False
    )
    if tie_word_embeddings:  # which the reference model itself does not have
        path = folder / "configuration_fixmin.py"
        path.write_text(path.read_text().replace("if self.tie_word_embeddings:", "if False:"))
    if shared:
        path = folder / "modeling_fixmin.py"
        line = next(x for x in path.read_text().splitlines() if "self.lm_head = " in x)
        share = "        self.lm_head.weight = self.model.token_embd.weight"
        path.write_text(path.read_text().replace(line, f"{line}\n{share}"))
    return folder


def test_one_parameter_and_two_different_tensors(tmp_path: Path) -> None:
    folder = tied(tmp_path, lambda state: None, False, shared=True)
    with pytest.raises(CheckpointError, match=r"shares one tensor between .* different values"):
        resolve(folder, trust_remote_code=True)


@pytest.mark.parametrize("trusted", [True, False])
def test_the_configuration_ties_two_different_tensors(tmp_path: Path, trusted: bool) -> None:
    folder = tied(tmp_path, lambda state: None, True)
    with pytest.raises(CheckpointError, match=r"token_embd\.weight and .*different values"):
        resolve(folder, trust_remote_code=trusted)


def test_a_tied_output_may_be_missing(tmp_path: Path) -> None:
    folder = tied(tmp_path, without("lm_head.weight"), True, shared=True)
    with resolve(folder, trust_remote_code=True) as resolved:
        tensors = resolved.spec.tensors
        np.testing.assert_array_equal(tensors["output.weight"].load(), tensors["token_embd.weight"].load())
    with pytest.raises(CheckpointError, match="tie_word_embeddings is false"):
        resolve(tied(tmp_path / "other", without("lm_head.weight"), False))


@pytest.mark.parametrize("buffer", ["inv_freq", "causal_mask"])
def test_tables_of_positions_may_be_missing_or_left_over(tmp_path: Path, buffer: str) -> None:
    """A buffer of the code that the files lack, and one of the files that the code lacks."""
    values = "torch.arange(4.0)" if buffer == "inv_freq" else "torch.ones(5, 5).tril()"
    folder = checkpoint(tmp_path, lambda state: state.update({f"model.{buffer}_2.{buffer}": torch.zeros(4)}))
    path = folder / "modeling_fixmin.py"
    line = next(x for x in path.read_text().splitlines() if "self.lm_head = " in x)
    path.write_text(path.read_text().replace(line, f'{line}\n        self.register_buffer("{buffer}", {values})'))
    with resolve(folder, trust_remote_code=True) as resolved:
        assert resolved.spec.block_count == 3


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    """With and without the prefix of a wrapper: which one counts is not for the converter to choose."""

    def change(state: dict) -> None:
        state["module.lm_head.bias"] = torch.ones(100)

    with pytest.raises(CheckpointError, match=r"without a place.*module\.lm_head\.bias"):
        resolve(checkpoint(tmp_path, change), trust_remote_code=True)


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
@pytest.mark.parametrize("trusted", [True, False])
def test_weights_that_are_no_numbers(tmp_path: Path, bad: float, word: str, trusted: bool) -> None:
    def change(state: dict) -> None:
        state["model.layers.1.attn_v.weight"][3, 4] = bad

    folder = checkpoint(tmp_path, change)
    message = rf"tensor model\.layers\.1\.attn_v\.weight .*holds {word} at \[3, 4\]"
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "m.gguf", "f32", trust_remote_code=trusted)
    assert not (tmp_path / "m.gguf").exists()


def test_eos_ids_in_the_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, config={"eos_token_id": 2})
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    report = convert(folder, tmp_path / "m.gguf", "f32", trust_remote_code=True)
    metadata = _core.GgufFile(str(report.path)).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == 7
    assert list(metadata["fixmin.eos_token_ids"]) == [7, 2]
    assert any("the first counts" in warning for warning in report.warnings)


@pytest.mark.parametrize("trusted", [True, False])
def test_an_id_that_the_engine_would_refuse(tmp_path: Path, trusted: bool) -> None:
    folder = checkpoint(tmp_path, config={"eos_token_id": 100})
    with pytest.raises(CheckpointError, match="eos_token_id is 100, but the ids of this model run from 0 to 99"):
        convert(folder, tmp_path / "m.gguf", trust_remote_code=trusted, overrides={} if trusted else {"lift": "tile"})
    assert not (tmp_path / "m.gguf").exists()


def test_the_finished_file_is_loaded_before_it_gets_its_name(tmp_path: Path, monkeypatch) -> None:
    """Whatever the engine refuses: here an id that the checks of the converter have let through."""
    folder = checkpoint(tmp_path, config={"eos_token_id": 2})
    monkeypatch.setattr(Source, "_checked_ids", lambda self, where, value, size: (value + 1000,) if value else ())
    with pytest.raises(CheckpointError, match=r"finished file cannot be loaded.*eos_token_id is 1002"):
        convert(folder, tmp_path / "m.gguf", "f32", trust_remote_code=True)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
