"""What counts is what was loaded: files that are replaced, written to or cut under a model."""

import os
import shutil
import subprocess
import sys

import pytest
from gguf_factory import make_model
from toy_models import byte_level, write_model

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


def test_nothing_of_a_file_is_read_after_loading(tmp_path):
    """Tokenizer and special tokens that others are given: those of the bytes that were loaded."""
    hf = pytest.importorskip("fixmin_cpp.hf")

    def edit(writer):
        writer.add_uint32("tokenizer.ggml.bos_token_id", 5)
        writer.add_uint32("tokenizer.ggml.padding_token_id", 6)

    path = write_model(tmp_path / "a.gguf", byte_level(), more=edit)
    with Model(path) as model:
        expected = hf.load_tokenizer(path)
        path.unlink()
        path.write_bytes(b"what is this")
        tokenizer = hf.load_tokenizer(model)
        assert tokenizer.get_vocab() == expected.get_vocab()
        assert tokenizer.encode("the cat") == model.encode("the cat")
        tokenizer.add_tokens(["cat"])  # on a copy
        assert model.encode("the cat") == expected.encode("the cat")
        assert (tokenizer.bos_token_id, tokenizer.pad_token_id, model.bos_token_id) == (5, 6, 5)
        config = hf.FixMinForCausalLM(model).config
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (5, 6, model.eos_token_id)


@pytest.mark.external
@pytest.mark.filterwarnings("ignore")  # those of the harness
def test_lm_eval_asks_the_loaded_model(tmp_path):
    pytest.importorskip("lm_eval")
    from fixmin_cpp.lm_eval_model import FixMinLM

    path = write_model(tmp_path / "a.gguf", byte_level(), more=lambda w: w.add_uint32("tokenizer.ggml.bos_token_id", 5))
    with Model(path) as model:
        os.unlink(path)
        assert FixMinLM(model).prefix_token_id == 5


def descriptors(name):
    """What this process has open under the name of a file, deleted or not."""
    links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    return [target for link in links if os.path.islink(link) and (target := os.readlink(link)).startswith(str(name))]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.parametrize("kind", ["affine", "learned"])
def test_a_deleted_file_takes_space_until_close(tmp_path, kind):
    path = make_model(tmp_path / "a.gguf", code_kind=kind)
    model = Model(path)
    os.unlink(path)
    assert descriptors(path) == [f"{path} (deleted)"]
    expected = model.generate([1, 2], max_new_tokens=3, ignore_eos=True).token_ids
    assert len(expected) == 3
    stream = model.stream([1, 2], max_new_tokens=3)
    next(stream)
    model.close()
    assert not descriptors(path)  # although `model` is still there
    with pytest.raises(fixmin_cpp.FixminError, match="closed"):
        model.save_state(tmp_path / "state", [1, 2])


def test_touching_a_file_ends_what_reads_its_embedding_there(tmp_path):
    learned, coded = (make_model(tmp_path / f"{kind}.gguf", code_kind=kind) for kind in ("learned", "affine"))
    with Model(learned) as reads, Model(coded) as has_read:
        expected = [model.logits([1, 2]).tobytes() for model in (reads, has_read)]
        for path in (learned, coded):
            os.utime(path, ns=(1, 1))
        assert has_read.logits([1, 2]).tobytes() == expected[1]
        for _ in range(2):
            with pytest.raises(
                GGUFError, match=r"learned\.gguf: the file was cut or written to while the model was in"
            ):
                reads.logits([1, 2])
    with Model(learned) as again:
        assert again.logits([1, 2]).tobytes() == expected[0]


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
