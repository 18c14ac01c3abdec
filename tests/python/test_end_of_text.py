"""A file may name several tokens that end a text: generation, beams, grammars and transformers obey all of them."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_factory import make_model
from toy_models import byte_level

from fixmin_cpp import GGUFError, Model
from fixmin_cpp.tokenizer import EOS_IDS_KEY, end_of_text_ids

PROMPT = "the cat"


def write(path: Path, eos_id: int | None, eos_ids: list[int] | None = None, seed: int = 0) -> Path:
    """A small random model that names these ids; the weights do not depend on them."""
    tokenizer = byte_level()

    def edit(writer: GGUFWriter) -> None:
        if eos_id is not None:
            writer.add_uint32("tokenizer.ggml.eos_token_id", eos_id)
        if eos_ids is not None:
            writer.add_array(EOS_IDS_KEY, eos_ids)

    return make_model(path, vocab_size=tokenizer.get_vocab_size(), tokenizer_json=tokenizer.to_str(), edit=edit)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What the model writes when nothing ends it."""
    with Model(write(tmp_path_factory.mktemp("endless") / "m.gguf", None)) as model:
        assert model.info["eos_token_ids"] == []
        return model.generate(PROMPT, max_new_tokens=12).token_ids


def two_ends(tokens: list[int]) -> tuple[int, int]:
    """A token that comes up late, and one that comes up before it."""
    late = next(t for t in reversed(tokens) if tokens.index(t) >= 2)
    return late, tokens[tokens.index(late) - 1]


def test_generation_ends_at_whichever_comes_first(tmp_path: Path, tokens: list[int]) -> None:
    late, early = two_ends(tokens)
    with Model(write(tmp_path / "m.gguf", late, [late, early])) as model:
        assert model.info["eos_token_id"] == late
        assert model.info["eos_token_ids"] == [late, early]
        completion = model.generate(PROMPT, max_new_tokens=12)
        assert completion.token_ids == tokens[: tokens.index(early)]
        assert completion.finish_reason == "eos"
        on = model.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
        assert not {late, early} & set(on.token_ids), "both are banned"
        longer = model.generate(PROMPT, max_new_tokens=12, min_new_tokens=8).token_ids
        assert len(longer) >= 8
        assert not {late, early} & set(longer[:8])


def test_beams_end_at_each(tmp_path: Path, tokens: list[int]) -> None:
    """The two most probable first tokens both end a text: with two beams they are the answer."""
    with Model(write(tmp_path / "endless.gguf", None)) as model:
        row = model.logits(PROMPT, last=True).astype(np.float64)
        free = model.beam_search(PROMPT, num_beams=1, max_new_tokens=8)
        assert free[0].token_ids == tokens[:8]
    best = np.argsort(-row)[:2]
    expected = row[best] - row.max() - np.log(np.exp(row - row.max()).sum())
    with Model(write(tmp_path / "m.gguf", int(best[1]), best.tolist())) as model:
        beams = model.beam_search(PROMPT, num_beams=2, max_new_tokens=8, early_stopping=True)
        assert [(beam.token_ids, beam.ended) for beam in beams] == [([], True)] * 2
        np.testing.assert_allclose([beam.logprob for beam in beams], expected, atol=1e-5)
        on = model.beam_search(PROMPT, num_beams=2, max_new_tokens=8)
        assert not any(set(best) & set(beam.token_ids) for beam in on)


def test_a_grammar_may_end_with_each(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    from fixmin_cpp.constrain import Compiler, Constraint
    from fixmin_cpp.tokenizer import TextTokenizer

    backend = byte_level()
    size, end, other = backend.get_vocab_size(), backend.token_to_id("</s>"), backend.token_to_id("<s>")
    compiler = Compiler(TextTokenizer(backend), size, end, other_eos_ids=[other])
    for last in (end, other):
        matcher = compiler.matcher(Constraint.check(choices=["cat", "cats"]))
        for letter in "cat":
            mask = matcher.mask()
            assert not any(mask[i // 32] >> np.uint32(i % 32) & 1 for i in (end, other))
            matcher.accept(backend.encode(letter).ids[0])
        mask = matcher.mask()
        assert all(mask[i // 32] >> np.uint32(i % 32) & 1 for i in (end, other))
        matcher.accept(last)
        assert matcher.finished


def test_transformers_ends_at_each(tmp_path: Path, tokens: list[int]) -> None:
    pytest.importorskip("transformers")
    import torch

    from fixmin_cpp.hf import FixMinForCausalLM

    late, early = two_ends(tokens)
    model = FixMinForCausalLM.from_gguf(write(tmp_path / "m.gguf", late, [late, early]))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    try:
        ids = model.engine.encode(PROMPT)
        prompts = [ids, model.engine.encode(PROMPT + " the cat")[-len(ids) :], ids[1:] + tokens[:1]]
        for rows in (prompts[:1], prompts):
            own, theirs = (model.generate(torch.tensor(rows), **options, native=native) for native in (True, False))
            assert torch.equal(own, theirs)
            expected = tokens[: tokens.index(early) + 1]
            assert own[0, len(ids) :][: len(expected)].tolist() == expected, "answers end with the token"
        for end in (late, early):  # another set than the file's
            model.generate(torch.tensor([ids]), **options, eos_token_id=end)
            assert not model.last_decoding.native
    finally:
        model.close()


def test_old_files_and_files_without_gguf_s_own_key(tmp_path: Path) -> None:
    assert end_of_text_ids({"tokenizer.ggml.eos_token_id": 3}, 10) == (3,)
    assert end_of_text_ids({EOS_IDS_KEY: np.array([4, 5], np.uint32)}, 10) == (4, 5)
    assert end_of_text_ids({"tokenizer.ggml.eos_token_id": 5, EOS_IDS_KEY: [4, 5]}, 10) == (5, 4)
    assert end_of_text_ids({}, 10) == ()


@pytest.mark.parametrize("value", [3, "3", [10], [True], [1.0], [-1], np.array([1.0])])
def test_ids_that_are_none(value: object) -> None:
    with pytest.raises(GGUFError, match=EOS_IDS_KEY):
        end_of_text_ids({EOS_IDS_KEY: value}, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.mkdir(), "a folder, not a GGUF file"),
        (lambda p: (p.mkdir(), (p / "config.json").touch()), "fixmin convert"),
        (lambda p: (p.mkdir(), (p / "a.gguf").touch()), r"give a file in it: a\.gguf"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda p: p.write_bytes(b"<!doctype html>"), "HTML page"),
        (lambda p: p.write_bytes(b""), "0 bytes"),
        (lambda p: p.write_bytes(b"\x1f\x8b\x08\0" + bytes(99)), "packed with gzip"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)), "zip archive"),
        (lambda p: p.write_bytes((99).to_bytes(8, "little") + b'{"x"'), "a safetensors file"),
        (lambda p: p.write_bytes(b'{"error":"Invalid username or password."}'), "Invalid username"),
    ],
)
def test_what_is_given_in_the_place_of_a_model(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(IsADirectoryError if (tmp_path / "model").is_dir() else GGUFError, match=message):
        Model(tmp_path / "model")


def test_other_names_in_the_place_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="fixmin run owner/name"):
        Model("owner/name")
    Path("model.safetensors").touch()
    with pytest.raises(GGUFError, match="weights of a checkpoint"):
        Model("model.safetensors")
    with pytest.raises(OSError, match="absent"):
        Model("absent.gguf")
