"""The converter against checkpoints by many authors: a right file, or a refusal that says why; never a wrong file."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import zoo  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


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
