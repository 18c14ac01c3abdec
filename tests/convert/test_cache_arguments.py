"""Checkpoints whose code knows the cache under one of its two names, under both, or not at all."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import oracle  # noqa: E402

from fixmin_cpp.convert.convert import convert  # noqa: E402
from fixmin_cpp.reference.configuration_fixmin import FixMinConfig  # noqa: E402
from fixmin_cpp.reference.modeling_fixmin import FixMinForCausalLM  # noqa: E402

REFERENCE = Path(__file__).parents[2] / "reference"
BOTH = "        cache = one_cache(cache, past_key_values)\n"
EDITS = {
    "both": [],
    "old": [(r"        cache: Cache \| None = None,\n", ""), (re.escape(BOTH), "        cache = past_key_values\n")],
    "new": [(r"        past_key_values: Cache \| None = None,\n", ""), (re.escape(BOTH), "")],
    "none": [
        (r"        past_key_values: Cache \| None = None,\n", ""),
        (r"        cache: Cache \| None = None,\n", ""),
        (r"        use_cache: bool \| None = None,\n", ""),
        (re.escape(BOTH), "        cache, use_cache = None, False\n"),
    ],
    "required": [(r"past_key_values: Cache \| None = None,\n        use_cache", "past_key_values,\n        use_cache")],
}


@pytest.mark.parametrize("kind", EDITS)
def test_conversion(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = FixMinConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    model = FixMinForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
        ids = torch.randint(0, 60, (1, 20))
        expected = model(ids, use_cache=False).logits[0].double().numpy()
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    for path in REFERENCE.glob("*_fixmin.py"):
        shutil.copy(path, folder)
    text = (folder / "modeling_fixmin.py").read_text(encoding="utf-8")
    below, name, code = text.partition("class FixMinForCausalLM")
    for pattern, new in EDITS[kind]:
        before, code = code, re.sub(pattern, new, code)
        assert code != before, pattern
    if kind == "required":
        code = code.replace(
            "attention_mask: Tensor | None = None,\n        position_ids: Tensor | None = None,\n",
            "attention_mask,\n        position_ids,\n",
        )
    (folder / "modeling_fixmin.py").write_text(below + name + code, encoding="utf-8")
    report = convert(folder, tmp_path / "out.gguf", "f32", trust_remote_code=True, n_threads=1)
    assert report.certificate.passed
    got = oracle.forward(tmp_path / "out.gguf", ids[0].numpy())
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-4
