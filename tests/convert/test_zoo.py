"""The converter against checkpoints by many authors: a right file, or a refusal that says why; never a wrong file."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import oracle  # noqa: E402
import zoo  # noqa: E402
from sampled import sampled  # noqa: E402

from fixmin_cpp import _core  # noqa: E402
from fixmin_cpp.convert.convert import CertificationError, convert  # noqa: E402
from fixmin_cpp.errors import CheckpointError  # noqa: E402

TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check(path: Path, original: zoo.Original) -> None:
    """The file against the original: inputs of block 0 equal for every id, logits of oracle and engine within 1e-4."""
    model = oracle.Oracle(path)
    ids = np.arange(original.vocab_size)
    assert np.array_equal(model.embed(ids).astype(np.float32), original.input_rows(ids).astype(np.float32))
    ids = zoo.prompt(original)
    expected = original.logits(ids)
    got = oracle.forward(path, ids)[:, : expected.shape[1]]
    assert relative_error(got, expected) <= TOLERANCE
    engine = _core.Engine(str(path), n_threads=1, kv_type="f32")
    try:
        assert relative_error(engine.logits(ids.astype(np.uint32))[:, : expected.shape[1]], expected) <= TOLERANCE
    finally:
        engine.close()


def convert_or_refuse(directory: Path, style: zoo.Style, original: zoo.Original, **options: Any) -> None:
    """Convert and compare, or be refused with the words of the style, whichever is expected."""
    out = directory.parent / "out.gguf"
    refusal = None
    try:
        report = convert(directory, out, "f32", n_threads=1, **options)
    except CheckpointError as error:
        if style.expect == "convert":
            raise
        refusal = error
    if refusal is None:
        assert style.expect != "refuse", report.certificate
        assert report.certificate.passed
        check(out, original)
    else:
        assert not out.exists()
        assert not isinstance(refusal, CertificationError), f"refused only when the finished file was wrong: {refusal}"
        assert all(re.search(words, str(refusal)) for words in style.words), refusal


@pytest.mark.parametrize("name", sampled(zoo.STYLES, 8))
def test_own_code(name: str, tmp_path: Path) -> None:
    style = zoo.STYLES[name]
    zoo.make_checkpoint(style, tmp_path / "checkpoint")
    original = zoo.Original.load(tmp_path / "checkpoint", style)
    convert_or_refuse(tmp_path / "checkpoint", style, original, trust_remote_code=True)


@pytest.mark.parametrize("name", sampled(zoo.REFUSED, 8))
def test_refused(name: str, tmp_path: Path) -> None:
    style = zoo.REFUSED[name]
    zoo.make_checkpoint(style, tmp_path / "checkpoint")
    original = zoo.Original.load(tmp_path / "checkpoint", style)
    convert_or_refuse(tmp_path / "checkpoint", style, original, trust_remote_code=True)


@pytest.mark.parametrize("name", sampled(zoo.LIBRARY, 3))
def test_architectures_of_transformers(name: str, tmp_path: Path) -> None:
    """They need no permission: their code is not in the checkpoint."""
    original = zoo.make_library_checkpoint(name, tmp_path / "checkpoint")
    convert_or_refuse(tmp_path / "checkpoint", original.style, original)


# --- without the code ------------------------------------------------------------------------------------------

GELU = {"activation": "gelu", "norm_eps": 1e-5}
# style -> (options that a refusal must name, what is stated on top of a calibration). What is stated there is what no
# text of a few hundred tokens can tell: the logits of the two GELUs differ by 1e-3 at most, those of two eps by less.
# The text of "boxed" nearly repeats itself.
WITHOUT_CODE: dict[str, tuple[str, dict[str, Any]]] = {
    "bochkov": ("--lift --rope-style --rope-base --activation --norm-eps --attention-scale --rope-dim --values", GELU),
    "bochkov_tile": (
        "--lift --rope-style --rope-base --activation --norm-eps --attention-scale --rope-dim --values",
        GELU,
    ),
    "bochkov_scrambled": (
        "--lift --rope-style --rope-base --activation --norm-eps --attention-scale --rope-dim --values",
        GELU,
    ),
    "bochkov_learned": ("--rope-style --rope-base --activation --norm-eps --attention-scale --rope-dim", GELU),
    "gpt2": (
        "--rope-style --activation --qkv-order --attention-scale --rope-dim --values",
        {"activation": "gelu_tanh"},
    ),
    "gpt2_vkq": (
        "--lift --rope-style --activation --qkv-order --attention-scale --rope-dim --values",
        {"activation": "gelu_tanh"},
    ),
    "llama": ("--lift --bit-order --affine-orientation --rope-style --attention-scale --rope-dim --values", {}),
    "llama_gqa": ("--lift --bit-order --affine-orientation --rope-style --attention-scale --rope-dim --values", {}),
    "llama_w12": (
        "--lift --bit-order --affine-orientation --rope-style --gate-up-order --attention-scale --rope-dim --values",
        {},
    ),
    "neox": (
        "--lift --bit-order --rope-style --activation --qkv-order --attention-scale --values",
        {"activation": "gelu"},
    ),
    "neox_kvq": (
        "--lift --bit-order --rope-style --activation --qkv-order --attention-scale --values",
        {"activation": "gelu"},
    ),
    "seeded_stored": (
        "--lift --affine-orientation --rope-style --activation --attention-scale --rope-dim --values",
        {"activation": "gelu"},
    ),
    "seeded_stored_left_bf16": (
        "--lift --affine-orientation --rope-style --activation --attention-scale --rope-dim --values",
        {"activation": "gelu"},
    ),
    "nano_stored": (
        "--norm --norm-eps --rope-style --rope-base --activation --attention-scale --rope-dim --values",
        GELU,
    ),
    "boxed": (
        "--norm-eps --rope-style --activation --attention-scale --values",
        {"activation": "gelu_tanh", "norm_eps": 1e-5, "attention_scale": 32**-0.5},
    ),
}


def without_code(name: str, directory: Path) -> tuple[zoo.Style, zoo.Original]:
    """The checkpoint of a style with everything in config.json, confident predictions, and no .py file."""
    style = zoo.STYLES[name]
    style = dataclasses.replace(style, tokenizer=True, scale=(*style.scale, (style.author.head, 6.0)))
    zoo.make_checkpoint(style, directory, full_config=True)
    original = zoo.Original.load(directory, style)
    for path in directory.glob("*.py"):
        path.unlink()
    return style, original


@pytest.mark.parametrize("name", sampled(WITHOUT_CODE, 4))
def test_without_code_ambiguities_are_listed(name: str, tmp_path: Path) -> None:
    without_code(name, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError) as refusal:
        convert(tmp_path / "checkpoint", tmp_path / "out.gguf", "f32", n_threads=1)
    options, _ = WITHOUT_CODE[name]
    assert [o for o in [*options.split(), "--calibrate"] if o not in str(refusal.value)] == []
    assert "--trust-remote-code" not in str(refusal.value)  # it would not help
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", sampled(WITHOUT_CODE, 7))
def test_without_code_calibrated(name: str, tmp_path: Path) -> None:
    style, original = without_code(name, tmp_path / "checkpoint")
    text = tmp_path / "text.txt"
    text.write_text(zoo.sampled_text(original), encoding="utf-8")
    _, stated = WITHOUT_CODE[name]
    convert_or_refuse(tmp_path / "checkpoint", style, original, calibrate=text, overrides=stated)


def test_without_permission_the_code_is_not_run(tmp_path: Path) -> None:
    zoo.make_checkpoint(zoo.STYLES["bochkov"], tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint").glob("*.py"):
        path.write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n" + path.read_text())
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        convert(tmp_path / "checkpoint", tmp_path / "out.gguf", "f32", n_threads=1)
    assert not (tmp_path / "run").exists()


def test_everything_stated(tmp_path: Path) -> None:
    style, original = without_code("bochkov_tile", tmp_path / "checkpoint")
    stated = {"lift": "tile", "rope_style": "half", "rope_base": 10000.0, **GELU}
    stated |= {"values": (0.0, 1.0), "attention_scale": 32**-0.5, "rope_dim": 32}
    convert_or_refuse(tmp_path / "checkpoint", style, original, overrides=stated)


def test_recoding_in_the_code_only(tmp_path: Path) -> None:
    """The matrix is drawn from a seed: nothing in the files says which, and no text can be asked."""
    style, original = without_code("seeded_left", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="--affine"):
        convert(tmp_path / "checkpoint", tmp_path / "out.gguf", "f32", n_threads=1)
    embed = original.model.embed
    stated = {"affine": (embed.A.numpy(), embed.b.numpy()), "bit_order": "lsb", "lift": "tile"}
    stated |= {"affine_orientation": "Ac", "rope_style": "half", "qkv_order": "qkv", "activation": "gelu"}
    stated |= {"values": (0.0, 1.0), "attention_scale": 32**-0.5, "rope_dim": 32}
    convert_or_refuse(tmp_path / "checkpoint", style, original, overrides=stated)


def test_code_that_cannot_be_imported(tmp_path: Path) -> None:
    zoo.make_checkpoint(zoo.STYLES["bochkov"], tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint").glob("*.py"):
        path.write_text("import flash_attention_of_another_machine\n" + path.read_text())
    with pytest.raises(CheckpointError, match="flash_attention_of_another_machine"):
        convert(tmp_path / "checkpoint", tmp_path / "out.gguf", "f32", n_threads=1, trust_remote_code=True)


def test_code_that_raises_in_the_constructor(tmp_path: Path) -> None:
    zoo.make_checkpoint(zoo.STYLES["seeded"], tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "modeling_seeded.py"
    path.write_text(
        path.read_text().replace("assert int(", "raise RuntimeError('needs eight GPUs')\n        assert int(")
    )
    with pytest.raises(CheckpointError, match="needs eight GPUs"):
        convert(tmp_path / "checkpoint", tmp_path / "out.gguf", "f32", n_threads=1, trust_remote_code=True)


def test_checkpoint_is_left_as_it_was(tmp_path: Path) -> None:
    zoo.make_checkpoint(zoo.STYLES["gpt2"], tmp_path / "checkpoint")
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint").rglob("*")}
    convert(tmp_path / "checkpoint", tmp_path / "out.gguf", "f32", n_threads=1, trust_remote_code=True)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint").rglob("*")} == before


# --- the zoo itself: what it asks of the converter can be seen in the logits ------------------------------------


@pytest.mark.parametrize("name", sampled((n for n, s in zoo.STYLES.items() if s.alternatives), 4))
def test_other_conventions_change_the_logits(name: str, tmp_path: Path) -> None:
    style = zoo.STYLES[name]
    zoo.make_checkpoint(style, tmp_path)
    original = zoo.Original.load(tmp_path, style)
    ids = zoo.prompt(original)
    logits = original.logits(ids)
    for alternative in style.alternatives:
        zoo.write_code(tmp_path, style, alternative)
        assert relative_error(zoo.Original.load(tmp_path, style).logits(ids), logits) > style.visible, alternative


# A head of another size has tensors of other shapes: there is no ordinary checkpoint with the same ones.
@pytest.mark.parametrize(
    "name",
    sampled((n for n, s in zoo.REFUSED.items() if s.expect == "refuse" and n != "head_size_not_d_over_h"), 4),
)
def test_what_is_refused_changes_the_logits(name: str, tmp_path: Path) -> None:
    """Without its peculiarity the checkpoint would be an ordinary one, and its logits are others."""
    style = zoo.REFUSED[name]
    zoo.make_checkpoint(style, tmp_path)
    original = zoo.Original.load(tmp_path, style)
    ids = zoo.prompt(original)
    logits = original.logits(ids)
    config = {key: value for key, value in style.config.items() if key != "hidden_act"}
    plain = dataclasses.replace(style, edits=(), config=config)
    zoo.write_code(tmp_path, plain)
    ordinary = zoo.build_model(tmp_path, plain)
    assert not ordinary.load_state_dict(original.model.state_dict(), strict=False).missing_keys
    assert relative_error(zoo.Original(ordinary, plain).logits(ids), logits) > style.visible
