"""Exports, read back by the gguf package and computed by the float64 oracle; llama.cpp: test_export_llama_cpp.py."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
from export_cases import CASES
from fixmin_cli import FIXMIN, fixmin
from gguf_factory import make_model
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from toy_models import byte_level, concatenating, write_model

from fixmin_cpp.convert import fold
from fixmin_cpp.errors import ArgumentError, ArgumentTypeError, CheckpointError, UnsupportedError
from fixmin_cpp.export import certificate, graph, tensors
from fixmin_cpp.export.bpe import LlamaTokenizer, from_tokenizer_json
from fixmin_cpp.export.llama_cpp import OUT_TYPES, export
from fixmin_cpp.quantization.requantize import quantize


def exported_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_what_the_model_does(case: str, tmp_path: Path) -> None:
    architecture, options = CASES[case]
    source = make_model(tmp_path / "in.gguf", **options)
    report = export(source, tmp_path / "out.gguf")
    assert report.architecture == architecture == keys(report.path)["general.architecture"]
    ids = np.random.default_rng(2).integers(0, options.get("vocab_size", 100), 20)
    gelu = graph.gelu_erf if options["activation"] == "gelu" else graph.gelu_tanh
    ((ours,),) = graph.logits(graph.Weights.of_file(report.path), [ids], [gelu])
    true = oracle.forward(source, ids)
    assert np.linalg.norm(ours - true) < 1e-6 * np.linalg.norm(true)


def test_what_llama_cpp_has_not_is_measured_and_told(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf", activation="gelu")
    report = export(source, tmp_path / "out.gguf")
    same_weights = export(make_model(tmp_path / "tanh.gguf", activation="gelu_tanh"), tmp_path / "other.gguf")
    ids = np.arange(20)
    erf, tanh = oracle.forward(source, ids), oracle.forward(tmp_path / "tanh.gguf", ids)
    error = np.linalg.norm(erf - tanh) / np.linalg.norm(erf)
    assert report.certificate.gelu_error == pytest.approx(error, rel=0.5)  # of other prompts
    assert same_weights.certificate.gelu_error == 0
    assert any("tanh" in note for note in report.notes)
    assert list(report.notes) == keys(report.path)["fixmin.export.differences"]


@pytest.mark.parametrize("case", ["zeros", "negative", "none", "far"])
def test_folded_bias(case: str) -> None:
    rng = np.random.default_rng(3)
    D, V = 96, 50
    W, z = rng.standard_normal((V, D)).astype(np.float32), rng.standard_normal((40, D))
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    gain, norm_bias = rng.uniform(0.5, 2, D).astype(np.float32), rng.standard_normal(D).astype(np.float32)
    bias = rng.standard_normal(V).astype(np.float32) * {"none": 0, "far": 100}.get(case, 1)
    gain[:10] *= {"zeros": 0, "negative": -1}.get(case, 1)
    folded = fold.Fold.of(gain, norm_bias)
    new = folded.rows(W, bias).astype(np.float64)
    ours = (z * folded.new_gain + folded.new_bias) @ new.T
    true = (z * gain.astype(np.float64) + norm_bias) @ W.T.astype(np.float64) + bias
    assert np.linalg.norm(ours - true) < 3e-7 * np.linalg.norm(true)
    assert np.array_equal(folded.new_gain, folded.new_gain.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "kind"),
    [((0.0, 1.0), "Q4_0"), ((-1.0, 1.0), "Q4_0"), ((0.5, -2.0), "Q4_0"), ((-0.25, 0.0), "Q4_0"), ((0.0, 0.0), "Q4_0"),
     ((1.0, 17.0), "F16"), ((0.1, 0.7), "F32")],
)  # fmt: skip
@pytest.mark.parametrize("code", ["affine", "table"])
def test_the_table_of_codes_is_exact(values: tuple[float, float], kind: str, code: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf", values=values, code_kind=code, block_count=1)
    report = export(source, tmp_path / "out.gguf")
    table = exported_tensors(report.path)["token_embd.weight"]
    assert table.tensor_type.name == kind
    rows = gguf.quants.dequantize(table.data, table.tensor_type)
    assert np.array_equal(rows, oracle.Oracle(source).embed(np.arange(100)).astype(np.float32))


def test_bytes_of_a_quantised_source_are_copied(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf", weight_type="Q4_0", rope_style="interleaved", biases={"ffn_up"})
    report = export(source, tmp_path / "out.gguf")
    before, after = exported_tensors(source), exported_tensors(report.path)
    for name in ("blk.0.attn_output.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight", "output.weight"):
        assert np.array_equal(before[name].data, after[name].data)
        assert before[name].tensor_type == after[name].tensor_type
    # Rows of queries and keys change places, those of the values do not.
    for n, kind in enumerate(["Q8_0", "Q4_0"]):
        fused = after[f"blk.{n}.attn_qkv.weight"]
        assert fused.tensor_type.name == kind
        parts = [before[f"blk.{n}.attn_{part}.weight"].data for part in "qkv"]
        order = np.concatenate([np.r_[0:16:2, 1:16:2] + 16 * head for head in range(4)])
        assert np.array_equal(fused.data, np.concatenate([parts[0][order], parts[1][order], parts[2]]))
    assert not any("quantised again" in note for note in report.notes)


def test_types_are_those_of_fixmin_quantize(tmp_path: Path) -> None:
    options: dict[str, Any] = {"embedding_length": 256, "feed_forward_length": 512, "biases": {"ffn_up"}}
    source = make_model(tmp_path / "in.gguf", **options)
    for kind in ("q4_0", "q8_0", "q4_k_m"):
        same = quantize(source, tmp_path / "quantized.gguf", kind)
        report = export(source, tmp_path / "out.gguf", outtype=kind)
        before, after = exported_tensors(same.path), exported_tensors(report.path)
        for name in ("blk.1.ffn_down.weight", "output.weight", "blk.0.attn_output.weight"):
            assert before[name].tensor_type == after[name].tensor_type
            assert np.array_equal(before[name].data, after[name].data)
        assert report.architecture == ("starcoder2" if kind == "q4_k_m" else "gptneox")


def test_a_quantised_head_is_rounded_twice_and_the_report_says_so(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf", weight_type="Q8_0")
    report = export(source, tmp_path / "out.gguf")
    assert any("output.weight: computed from quantised weights" in note for note in report.notes)
    assert report.types["Q8_0"] == 9
    assert report.folded


def test_w8a8_needs_another_type(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf", weight_type="W8A8")
    with pytest.raises(ArgumentError, match=r"W8A8.*--outtype q8_0"):
        export(source, tmp_path / "out.gguf")
    with pytest.raises(ArgumentError, match="outtype must be one of"):
        export(source, tmp_path / "out.gguf", outtype="w8a8")
    report = export(source, tmp_path / "out.gguf", outtype="f16")
    ids = np.arange(20)
    ((ours,),) = graph.logits(graph.Weights.of_file(report.path), [ids], [graph.gelu_erf])
    true = oracle.forward(source, ids)
    assert np.linalg.norm(ours - true) < 1e-3 * np.linalg.norm(true)


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ({"norm": "rmsnorm", "activation": "gelu"}, "gelu"),
        (
            {"norm": "rmsnorm", "activation": "swiglu", "biases": {"output", "ffn_up"}},
            "bias of the output|biases of ffn_up",
        ),
        ({"norm": "rmsnorm", "activation": "swiglu", "biases": set(), "rope_dim": 8}, "rotation of 8 of the 16"),
        ({"activation": "swiglu", "biases": {"attn_output"}}, "biases of attn_output"),
    ],
)
def test_models_without_a_counterpart_are_refused(options: dict[str, Any], lacking: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf", **options)
    with pytest.raises(UnsupportedError, match=lacking):
        export(source, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_metadata(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_name("A model")
        writer.add_basename("Model")
        writer.add_license("apache-2.0")
        writer.add_string("fixmin.convert.sha256", "ab" * 32)
        writer.add_string("fixmin.convert.certificate.against", "nothing")

    source = make_model(tmp_path / "in.gguf", edit=edit, norm_eps=3e-5, rope_base=123.0)
    found = keys(export(source, tmp_path / "out.gguf", outtype="q8_0").path)
    assert found["general.name"] == "A model"
    assert found["general.basename"] == "Model"
    assert found["general.license"] == "apache-2.0"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert found["fixmin.convert.sha256"] == "ab" * 32
    assert not [key for key in found if key.startswith("fixmin.convert.certificate")]
    assert found["gptneox.attention.layer_norm_epsilon"] == np.float32(3e-5)
    assert found["gptneox.rope.freq_base"] == 123
    assert found["gptneox.use_parallel_residual"] is False
    assert found["fixmin.export.certificate.function_error"] < 1e-5


# --- the certificate ----------------------------------------------------------------------------------------------


def refuses(source: Path, tmp_path: Path, match: str = "its function") -> None:
    target = tmp_path / "out.gguf"
    target.write_bytes(b"before")
    with pytest.raises(CheckpointError, match=match):
        export(source, target)
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_wrong_exports_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "in.gguf", rope_style="interleaved", scale=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "head_order", lambda *arguments: None)
        refuses(source, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(fold.Fold, "rows", lambda self, matrix, bias: matrix)
        refuses(source, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "_scaled", lambda recipe, scale: recipe)
        refuses(source, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "_q4_0_blocks", lambda code, rows, unit: np.zeros((len(rows), 36), np.uint8))
        refuses(source, tmp_path, "its logits")


def test_nan_is_a_problem() -> None:
    good = certificate.Certificate(1, 0.0, 1.0, None, 0.0, 1.0, 0.0, 1.0)
    assert good.problems == []
    assert certificate.Certificate(1, np.nan, 1.0, None, np.nan, 1.0, 0.0, 1.0).problems


# --- the tokenizer ------------------------------------------------------------------------------------------------


def with_regex() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


KINDS = {"bytes": byte_level, "words": with_regex, "characters": concatenating}
MADE = {kind: make() for kind, make in KINDS.items()}
LLAMA = {kind: from_tokenizer_json(json.loads(t.to_str()), t.get_vocab_size()) for kind, t in MADE.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(alphabet="abcthe the日本é😀Paris\nQ.,!?  ", max_size=30))
def test_ids_are_those_of_the_models_own_tokenizer(kind: str, text: str) -> None:
    own = MADE[kind].encode(text, add_special_tokens=False).ids
    if MADE[kind].token_to_id("<unk>") not in own:
        assert LLAMA[kind].encode(text) == own


@pytest.mark.parametrize("kind", ["bytes", "words"])
@given(text=st.text(max_size=30).filter(lambda text: not any(c.isnumeric() for c in text)))
def test_bytes_have_ids_whatever_they_spell(kind: str, text: str) -> None:
    assert LLAMA[kind].encode(text) == MADE[kind].encode(text, add_special_tokens=False).ids


def test_special_tokens_are_found_by_name() -> None:
    for kind, tokenizer in MADE.items():
        for text in ("</s>", "the</s>the", "<s><s>a<pad>"):
            assert LLAMA[kind].encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_unknown_characters() -> None:
    """Beyond U+FFFF one unknown token for each, as the model has it; others llama.cpp drops."""
    letters = ["a", "b", "é", " ", "日"]
    tokenizer = concatenating(letters, [("a", "b")])
    ours = from_tokenizer_json(json.loads(tokenizer.to_str()), tokenizer.get_vocab_size())
    unknown = tokenizer.token_to_id("<unk>")
    for text in ("😀", "a😀🎉b", "ab😀é"):
        own = tokenizer.encode(text, add_special_tokens=False).ids
        assert unknown in own
        assert ours.encode(text) == own
    assert ours.encode("a本b") == ours.encode("a") + ours.encode("b")


def test_digits_are_split_from_their_end() -> None:
    """What llama.cpp's superbpe does to every text: merges of digits do not reach over its limits."""
    tokens = [*"0123456789ab", "12", "1a"]
    ours = LlamaTokenizer("superbpe", tokens, [1] * len(tokens), [("1", "2"), ("1", "a")])
    assert [tokens[i] for i in ours.encode("123412a")] == ["12", "3", "4", "12", "a"]
    assert [tokens[i] for i in ours.encode("1212")] == ["1", "2", "12"]


def test_names_of_tokens_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    tokenizer = concatenating(["a", "b", "[PAD14]", " "], [])
    size = tokenizer.get_vocab_size()
    ours = from_tokenizer_json(json.loads(tokenizer.to_str()), 16)
    assert len(set(ours.tokens)) == 16
    assert ours.types[size:] == [gguf.TokenType.UNUSED] * (16 - size)


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "WordLevel"),
        (Tokenizer(models.Unigram([("a", 0.0)])), "Unigram"),
        (Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True)), "byte_fallback"),
        (Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="_")), "end_of_word_suffix"),
    ],
)
def test_other_models_of_tokenizers_are_refused(tokenizer: Tokenizer, named: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{named}.*--no-tokenizer"):
        from_tokenizer_json(json.loads(tokenizer.to_str()), 1)


def test_normalisers_and_other_splits_are_refused() -> None:
    tokenizer = concatenating()
    size = tokenizer.get_vocab_size()
    for part, value, named in (
        ("normalizer", normalizers.NFC(), "NFC"),
        ("pre_tokenizer", pre_tokenizers.Whitespace(), "Whitespace"),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "a space first"),
    ):
        other = concatenating()
        setattr(other, part, value)
        with pytest.raises(UnsupportedError, match=named):
            from_tokenizer_json(json.loads(other.to_str()), size)


def digits() -> Tokenizer:
    """Merges that llama.cpp's splitting never reaches."""
    letters = [*"0123456789abcdef ", "🙂"]
    merges = [(a, b) for a in "0123456789" for b in "abcdef"]
    return concatenating(letters, merges)


def test_differences_in_ordinary_text_are_refused_unless_allowed(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", digits())
    target = tmp_path / "out.gguf"
    with pytest.raises(UnsupportedError, match="Every token of several characters: 60 of 60"):
        export(source, target)
    assert not target.exists()
    report = export(source, target, allow_token_differences=True)
    assert any("Every token of several characters 60 of 60" in note for note in report.notes)
    assert json.loads(keys(target)["fixmin.export.tokens"])["Every token of several characters"] == [60, 60, 0, 0]
    assert report.tokens is not None
    assert {r.name: r.n_different for r in report.tokens}["Names of special tokens"] > 0  # "<unk>" is no text any more


def test_texts_of_unknown_characters_are_counted_apart(tmp_path: Path) -> None:
    """Of letters that the model does not know llama.cpp may make something else, but not of those that it knows."""
    report = export(write_model(tmp_path / "in.gguf", concatenating()), tmp_path / "out.gguf")
    assert report.tokens is not None
    found = {result.name: result for result in report.tokens}
    assert found["Cyrillic"].n_different == found["Cyrillic"].n_unknown_different == found["Cyrillic"].n_unknown > 0
    assert found["Latin"].n_unknown < found["Latin"].n_texts
    assert all(result.rate == 0 for result in report.tokens if result.ordinary)


def test_tokenizer_keys(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in.gguf", concatenating())
    report = export(source, tmp_path / "out.gguf")
    found = keys(report.path)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "superbpe"
    assert len(found["tokenizer.ggml.tokens"]) == oracle.Oracle(source).key("vocab_size")
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_no_text_ends_at_a_token_that_means_something(tmp_path: Path) -> None:
    """Of a file that names no end llama.cpp takes id 11 for it."""
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    source = make_model(tmp_path / "in.gguf", vocab_size=size + 3, tokenizer_json=tokenizer.to_str())
    found = keys(export(source, tmp_path / "out.gguf").path)
    assert found["tokenizer.ggml.eos_token_id"] >= size
    source = make_model(tmp_path / "full.gguf", vocab_size=size, tokenizer_json=tokenizer.to_str())
    notes = export(source, tmp_path / "out.gguf").notes
    assert any("llama.cpp then takes 11" in note for note in notes)
    assert any("ends a text at </s>" in note for note in notes)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf")
    assert export(source, tmp_path / "out.gguf").tokens is None
    assert keys(tmp_path / "out.gguf")["tokenizer.ggml.model"] == "none"
    other = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    other.decoder = decoders.Fuse()
    source = make_model(tmp_path / "word.gguf", tokenizer_json=other.to_str())
    assert export(source, tmp_path / "out.gguf", tokenizer=False).tokens is None


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    source, target = write_model(tmp_path / "in.gguf", byte_level()), tmp_path / "out.gguf"
    done = fixmin("export", source, "-o", target, "--outtype", "q8_0", "--ollama")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert "gptneox" in text
    assert f"docker model package --gguf {target}" in text
    modelfile = (tmp_path / "Modelfile").read_text()
    assert "FROM ./out.gguf\n" in modelfile
    assert 'TEMPLATE "{{ .Prompt }}"\n' in modelfile
    assert f"PARAMETER num_ctx {oracle.Oracle(source).key('context_length')}\n" in modelfile
    facts = json.loads(fixmin("export", source, "-o", target, "--json").stdout)
    assert facts["path"] == str(target)
    assert facts["certificate"]["top1_agreement"] == 1
    assert facts["tokens"][0]["name"] == "Latin"


def test_the_command_refuses_with_a_line(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf", norm="rmsnorm", activation="gelu")
    before = source.read_bytes()
    for arguments, said in (
        ((source, "-o", tmp_path / "out.gguf"), b"gelu"),
        ((source, "-o", source), b"is an input"),
        ((source, "-o", tmp_path / "out.gguf", "--to", "onnx"), b"to must be one of llama.cpp"),
        ((tmp_path / "no.gguf", "-o", tmp_path / "out.gguf"), b"No such file"),
        ((source, "-o", tmp_path / "out.gguf", "--outtype", "q9"), b"outtype must be one of f32"),
    ):
        done = fixmin("export", *arguments)
        assert done.returncode == 1
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert source.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_arguments(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in.gguf")
    with pytest.raises(ArgumentTypeError, match="model must be"):
        export(3, tmp_path / "out.gguf")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="outtype must be"):
        export(source, tmp_path / "out.gguf", outtype=8)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="another name"):
        export(source, tmp_path / "out.gguf", modelfile_path=tmp_path / "out.gguf")
    with pytest.raises(ArgumentError, match="is an input"):
        export(source, tmp_path / "out.gguf", modelfile_path=source)
    assert "w8a8" not in OUT_TYPES
    assert "q4_k_m" in OUT_TYPES


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = make_model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="are needed"):
        export(source, target, modelfile_path=tmp_path / "Modelfile")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    source = make_model(tmp_path / "in.gguf", embedding_length=256, feed_forward_length=2048, block_count=8)
    process = subprocess.Popen([*FIXMIN, "export", source, "-o", folder / "out.gguf"], stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in folder.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert process.wait(60) == 128 + number
    assert list(folder.iterdir()) == []
