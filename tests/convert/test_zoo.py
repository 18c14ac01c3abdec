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


@pytest.mark.parametrize("name", zoo.STYLES)
def test_own_code(name: str, tmp_path: Path) -> None:
    style = zoo.STYLES[name]
    zoo.make_checkpoint(style, tmp_path / "checkpoint")
    original = zoo.Original.load(tmp_path / "checkpoint", style)
    convert_or_refuse(tmp_path / "checkpoint", style, original, trust_remote_code=True)


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    style = zoo.REFUSED[name]
    zoo.make_checkpoint(style, tmp_path / "checkpoint")
    original = zoo.Original.load(tmp_path / "checkpoint", style)
    convert_or_refuse(tmp_path / "checkpoint", style, original, trust_remote_code=True)


@pytest.mark.parametrize("name", zoo.LIBRARY)
def test_architectures_of_transformers(name: str, tmp_path: Path) -> None:
    """They need no permission: their code is not in the checkpoint."""
    original = zoo.make_library_checkpoint(name, tmp_path / "checkpoint")
    convert_or_refuse(tmp_path / "checkpoint", original.style, original)


# --- the zoo itself: what it asks of the converter can be seen in the logits ------------------------------------


@pytest.mark.parametrize("name", [n for n, s in zoo.STYLES.items() if s.alternatives])
def test_other_conventions_change_the_logits(name: str, tmp_path: Path) -> None:
    style = zoo.STYLES[name]
    zoo.make_checkpoint(style, tmp_path)
    original = zoo.Original.load(tmp_path, style)
    ids = zoo.prompt(original)
    logits = original.logits(ids)
    for alternative in style.alternatives:
        zoo.write_code(tmp_path, style, alternative)
        assert relative_error(zoo.Original.load(tmp_path, style).logits(ids), logits) > style.visible, alternative


@pytest.mark.parametrize("name", [n for n, s in zoo.REFUSED.items() if s.expect == "refuse"])
def test_what_is_refused_changes_the_logits(name: str, tmp_path: Path) -> None:
    """Without its peculiarity the checkpoint would be an ordinary one, and its logits are others."""
    style = zoo.REFUSED[name]
    if name == "head_size_not_d_over_h":
        pytest.skip("its tensors have other shapes than an ordinary checkpoint's")
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
