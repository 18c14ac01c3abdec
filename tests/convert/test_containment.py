"""The checkpoint's code may end the process, print and change settings: an error, or put back; never a lost process."""

import json
import locale
import logging
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from spec_factory import make_reference, save_checkpoint

from fixmin_cpp.convert.convert import convert
from fixmin_cpp.convert.observed.containment import contained
from fixmin_cpp.convert.resolve import resolve
from fixmin_cpp.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


def checkpoint(tmp_path: Path, line: str, where: str) -> Path:
    """A checkpoint whose code runs `line` when it is imported, constructed or called."""
    folder = save_checkpoint(make_reference(), tmp_path / "tiny")
    path = folder / "modeling_fixmin.py"
    text = path.read_text()
    if where == "import":
        text = text.replace("\nclass FixMinForCausalLM", f"\n{line}\n\n\nclass FixMinForCausalLM")
    elif where == "constructor":
        text = text.replace("        self.lm_head = ", f"        {line}\n        self.lm_head = ")
    else:
        text = text.replace("        if use_cache is None:", f"        {line}\n        if use_cache is None:", 1)
    assert line in text
    path.write_text(text)
    return folder


@pytest.mark.parametrize("where", ["import", "constructor", "forward"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import sys; sys.exit(3)", r"ended the process \(status 3\)"),
        ("exit()", "ended the process"),
        ("import os; os._exit(0)", r"ended the process: os\._exit"),
        ("import os; os.abort()", r"ended the process: os\.abort"),
        ("import os; os.execv('/bin/true', ['true'])", r"ended the process: os\.execv"),
    ],
)
def test_code_that_ends_the_process(tmp_path: Path, line: str, message: str, where: str) -> None:
    folder = checkpoint(tmp_path, line, where)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "m.gguf", "f32", trust_remote_code=True)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def settings() -> dict:
    """What belongs to the process and what code likes to change."""
    return {
        "folder": os.getcwd(), "environment": dict(os.environ), "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(), "threads": torch.get_num_threads(), "gradients": torch.is_grad_enabled(),
        "torch numbers": torch.get_rng_state().tolist(), "random": random.getstate(),
        "numpy numbers": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "handlers": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers), logging.root.manager.disable),
        "errors": np.geterr(), "stdout": sys.stdout, "hook": sys.excepthook, "arguments": list(sys.argv),
        "path": list(sys.path), "locale": locale.setlocale(locale.LC_ALL), "recursion": sys.getrecursionlimit(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }  # fmt: skip


CHANGES = """
import os, sys, random, signal, logging, numpy, warnings, tempfile
os.chdir(tempfile.gettempdir())
os.environ["FIXMIN_ISA"] = "none"
os.environ.pop("PATH", None)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(3)
torch.set_grad_enabled(False)
torch.use_deterministic_algorithms(True)
torch.manual_seed(1), numpy.random.seed(1), random.seed(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, lambda *_: None)
logging.basicConfig(level=logging.DEBUG, force=True)
logging.disable(logging.ERROR)
numpy.seterr(all="raise")
warnings.simplefilter("ignore")
sys.excepthook = print
sys.argv[:] = ["other"]
sys.setrecursionlimit(5000)
torch.set_default_dtype(torch.float32)
"""


@pytest.mark.parametrize("where", ["import", "forward"])
def test_what_code_changes_is_put_back(tmp_path: Path, where: str) -> None:
    code = f"exec({CHANGES!r}, globals())"
    folder = checkpoint(tmp_path, code, where)
    before = settings()
    with resolve(folder, trust_remote_code=True) as resolved:
        assert {k: v for k, v in settings().items() if "numbers" not in k and k != "random"} == {
            k: v for k, v in before.items() if "numbers" not in k and k != "random"
        }
        assert resolved.spec.block_count == 2
    assert settings() == before


def test_a_relative_folder_and_code_that_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, "import os; os.chdir('/')", "forward")
    monkeypatch.chdir(tmp_path)
    assert convert("tiny", "m.gguf", "f32", trust_remote_code=True).path.exists()
    assert (tmp_path / "m.gguf").is_file()


def test_what_code_prints_is_told_and_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, "print('loading', 'kernels')", "forward")
    lines: list[str] = []
    with resolve(folder, trust_remote_code=True, log=lines.append):
        pass
    assert lines.count("the checkpoint's code prints: loading kernels") == 1, "once, not for every prompt"
    assert "kernels" not in capsys.readouterr().out


def test_much_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with contained(lines.append):
        print("\n".join(map(str, range(100))))
    assert lines == [*(f"the checkpoint's code prints: {i}" for i in range(10)),
                     "the checkpoint's code prints 90 lines more"]  # fmt: skip
    with contained(print):
        print("x")
    assert capsys.readouterr().out == "the checkpoint's code prints: x\n", "what `tell` prints does not come back"


# --- code that is not there, or not for this machine -------------------------------------------------------------


@pytest.mark.parametrize("file", ["modeling_fixmin.py", "configuration_fixmin.py"])
def test_auto_map_names_a_file_that_is_not_there(tmp_path: Path, file: str) -> None:
    folder = save_checkpoint(make_reference(), tmp_path / "tiny")
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=rf"auto_map names '{file[:-3]}\..*there is no {file}"):
        resolve(folder, trust_remote_code=True)
    if file.startswith("modeling"):
        with resolve(folder, overrides={"lift": "tile"}) as resolved:
            assert any(f"there is no {file}" in warning for warning in resolved.warnings)


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        ({"AutoModelForCausalLM": "someone/code--modeling.Model"}, "repository someone/code, copy it"),
        ({"AutoModelForCausalLM": "modeling_fixmin.Other"}, r"class Other, which modeling_fixmin\.py does not define"),
        ({"AutoModelForCausalLM": "Model"}, "must be 'module.Class'"),
        ({"AutoModelForCausalLM": 7}, "must be 'module.Class'"),
        (["modeling_fixmin.Model"], "must map names"),
    ],
)
def test_auto_map_that_names_nothing(tmp_path: Path, auto_map: object, message: str) -> None:
    folder = save_checkpoint(make_reference(), tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    with pytest.raises(CheckpointError, match=message):
        resolve(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import flash_attention_of_others.kernels", "pip install flash_attention_of_others"),
        ("from transformers.modeling_utils import find_pruneable_heads_of_2020", "another release of transformers"),
        ("from transformers.no_such_module import x", r"config\.json says 4\.30\.0.*transformers==4\.\*"),
        ("import transformers; transformers.NoSuchClass", "another release of transformers"),
    ],
)
def test_code_for_another_environment(tmp_path: Path, line: str, message: str) -> None:
    folder = checkpoint(tmp_path, line, "import")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "4.30.0"}))
    with pytest.raises(CheckpointError, match=message):
        resolve(folder, trust_remote_code=True)
