"""Checkpoints of the reference model say everything: they convert without running their code, to the same file."""

from pathlib import Path

import numpy as np
import pytest

from fixmin_cpp import _core
from fixmin_cpp.convert.convert import convert

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.mark.parametrize("variant", ["fixed", "affine"])
def test_demo_without_running_its_code(variant, tmp_path):
    report = convert(DEMO / variant, tmp_path / "read.gguf", "f16", n_threads=1)
    assert report.certificate.passed
    convert(DEMO / variant, tmp_path / "run.gguf", "f16", n_threads=1, trust_remote_code=True)
    ids = np.arange(40, dtype=np.uint32) * 101
    read, run = (_core.Engine(str(tmp_path / f"{how}.gguf"), n_threads=1).logits(ids) for how in ("read", "run"))
    assert read.tobytes() == run.tobytes()
