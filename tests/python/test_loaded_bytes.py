"""What counts is what was loaded: files that are replaced, written to or cut under a model."""

import os
import shutil
import subprocess
import sys

import pytest
from gguf_factory import make_model

import fixmin_cpp
from fixmin_cpp import GGUFError, Model, _core


def test_state_of_a_replaced_file_is_refused(tmp_path):
    ids = [3] * 70
    a, b = (make_model(tmp_path / f"{n}.gguf", seed=ord(n), context_length=128) for n in "ab")
    kept = shutil.copy(a, tmp_path / "kept.gguf")
    with Model(a) as model:
        os.replace(b, a)
        model.save_state(tmp_path / "state", ids)
    with Model(a) as other, pytest.raises(ValueError, match="another model"):
        other.load_state(tmp_path / "state")
    with Model(kept) as same:
        assert same.load_state(tmp_path / "state") == ids


def test_a_file_written_to_since_is_refused(tmp_path):
    path = make_model(tmp_path / "a.gguf", context_length=128)
    with Model(path) as model:
        os.utime(path, ns=(1, 1))
        with pytest.raises(fixmin_cpp.FixminError, match="written to since it was loaded"):
            model.save_state(tmp_path / "state", [3] * 70)


def test_gguf_file_cut_while_open(tmp_path):
    path = make_model(tmp_path / "a.gguf", context_length=128)
    file = _core.GgufFile(str(path))
    expected = file.metadata
    os.truncate(path, 0)
    assert file.metadata.keys() == expected.keys()
    assert file.tensors
    with pytest.raises(GGUFError, match=r"a\.gguf: the file was cut"):
        file.tensor_data(file.tensors[-1].name)


@pytest.mark.parametrize("kept", [0, 100])
def test_cut_while_loading(tmp_path, kept):
    path = make_model(tmp_path / "a.gguf", block_count=3)
    with pytest.raises(GGUFError, match=r"a\.gguf: the file was cut"):
        Model(path, progress=lambda done: os.truncate(path, kept))


LEARNED = """
import os, sys, fixmin_cpp
model = fixmin_cpp.Model(sys.argv[1])
model.generate([1, 2], max_new_tokens=3, ignore_eos=True)
os.truncate(sys.argv[1], 4096)
for f in (lambda: model.generate([1, 2], max_new_tokens=3, ignore_eos=True), lambda: model.logits([5, 6])):
    try:
        f()
    except fixmin_cpp.GGUFError as error:
        print(error)
"""


def test_learned_embedding_cut_in_use(tmp_path):
    path = make_model(tmp_path / "learned.gguf", code_kind="learned", vocab_size=4096)
    result = subprocess.run([sys.executable, "-c", LEARNED, str(path)], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{path}: the file was cut") for line in lines)


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(make_model(tmp_path / "a.gguf").read_bytes()[:-100])
    for use in (_core.GgufFile, Model):
        with pytest.raises(GGUFError, match=r"broken\.gguf: GGUF tensor"):
            use(str(path))
