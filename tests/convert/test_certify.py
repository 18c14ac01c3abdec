"""The certificate: it passes what is right and each of its lines fails for the fault it is there to find."""

import math
import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import oracle
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_factory import make_model
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from spec_factory import array_recipe, make_reference, make_resolved, save_checkpoint

from fixmin_cpp import _core
from fixmin_cpp.convert import certify as module
from fixmin_cpp.convert.certify import (
    OWN_CODE,
    REFERENCE,
    Certificate,
    certify,
    compare_weights,
    make_prompts,
    open_engine,
    pending,
    remembered_overrides,
    rounding_error,
    verify,
)
from fixmin_cpp.convert.gguf_file.formats import OUT_TYPES, quantize_rows
from fixmin_cpp.convert.gguf_file.readback import read_gguf
from fixmin_cpp.convert.gguf_file.writer import AtomicFile, Layout, Provenance
from fixmin_cpp.convert.spec import CodeSpec, Resolved
from fixmin_cpp.convert.streaming import reference_logits, round_activations
from fixmin_cpp.errors import CheckpointError, GGUFError

SHA = "00" * 32


pytestmark = pytest.mark.usefixtures("one_thread")


def write(path: Path, resolved: Resolved, outtype: str) -> Path:
    layout = Layout.plan(resolved.spec, outtype, Provenance("test", "test", SHA, (), "{}", "test"))
    with AtomicFile(path) as file:
        layout.write(file, pending(resolved, outtype).figures())
        file.commit()
    return path


def failed(certificate: Certificate) -> set[str]:
    """Names of the lines that failed."""
    assert certificate.passed == (not certificate.problems and all(c.passed for c in certificate.checks))
    return {check.name for check in certificate.checks if not check.passed}


class Altered:
    """An engine with a fault."""

    def __init__(self, path: Path, n_ctx: int) -> None:
        self.engine = open_engine(path, n_ctx)
        self.closed = False

    def codes(self, ids):
        return self.engine.codes(ids)

    def logits(self, ids):
        return self.engine.logits(ids)

    def hidden_states(self, ids, layer):
        return self.engine.hidden_states(ids, layer)

    def close(self):
        self.engine.close()


class OracleRunner:
    """The float64 oracle of the tests in the place of the engine."""

    def __init__(self, path: Path, n_ctx: int) -> None:
        self.path, spec = path, read_gguf(path).spec
        self.codes = spec.code.codes

    def logits(self, ids):
        return oracle.forward(self.path, ids).astype(np.float32)

    def hidden_states(self, ids, layer):
        return oracle.hidden_states(self.path, ids)[layer].astype(np.float32)

    def close(self):
        pass


# --- what is right passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code_kind", ["affine", "table", "learned"])
@pytest.mark.parametrize("outtype", OUT_TYPES)
def test_right_files_pass(tmp_path, outtype, code_kind):
    resolved = make_resolved(make_reference(code_kind=code_kind))
    certificate = certify(write(tmp_path / "m.gguf", resolved, outtype), resolved)
    assert failed(certificate) == set()
    assert certificate.passed
    assert certificate.against == OWN_CODE
    assert certificate.code_mismatches == (None if code_kind == "learned" else 0)
    assert certificate.weights == sum(math.prod(r.shape) for r in resolved.spec.tensors.values())
    assert certificate.conventions_error < 1e-5
    assert certificate.engine_error < 1e-5, "also for quantised types: the rounding of activations is accounted for"
    assert 0 < certificate.logit_error < OUT_TYPES[outtype].logit_tolerance
    if outtype == "f32":
        assert certificate.logit_error < 1e-5
        assert certificate.weight_error == 0


@pytest.mark.parametrize(
    "options",
    [
        {"norm_type": "rmsnorm", "activation": "swiglu", "mlp_bias": False, "lm_head_bias": False},
        {"activation": "gelu_tanh", "rope_style": "interleaved", "rope_dim": 8, "num_key_value_heads": 2},
        {"qkv_bias": True, "attn_out_bias": True, "norm_bias": False, "attn_scale": 0.3, "rope_theta": 500.0},
        {"code_lift": "interleave", "vocab_size": 250, "code_values": (-1.0, 1.0)},
    ],
)
def test_options_of_the_model(tmp_path, options):
    resolved = make_resolved(make_reference(code_kind="affine", **options))
    path = write(tmp_path / "m.gguf", resolved, "f32")
    for open_runner in (open_engine, OracleRunner):
        certificate = certify(path, resolved, open_runner)
        assert certificate.passed, certificate.lines()
        assert certificate.logit_error < 1e-5


def test_a_bias_on_some_projections_only(tmp_path):
    """The reference model has one switch for q, k and v; what is missing counts as zero."""
    model = make_reference(qkv_bias=True)
    with torch.no_grad():
        model.model.layers[0].attn_k.bias.zero_()
    resolved = make_resolved(model)
    del resolved.spec.tensors["blk.0.attn_k.bias"]
    certificate = certify(write(tmp_path / "m.gguf", resolved, "f32"), resolved)
    assert certificate.passed, certificate.lines()


def test_without_the_checkpoints_code(tmp_path):
    resolved = make_resolved(make_reference(), own_code=False)
    certificate = certify(write(tmp_path / "m.gguf", resolved, "q8_0"), resolved)
    assert certificate.passed
    assert certificate.against == REFERENCE
    assert "conventions_error" not in certificate.figures()
    assert not any("own code" in line and "not run" not in line for line in certificate.lines())


@pytest.mark.parametrize("own_code", [True, False])
@pytest.mark.parametrize("code_kind", ["affine", "learned"])
def test_pending_and_final_figures_fit_the_same_header(tmp_path, code_kind, own_code):
    resolved = make_resolved(make_reference(code_kind=code_kind), own_code=own_code)
    blank = pending(resolved, "q8_0")
    final = certify(write(tmp_path / "m.gguf", resolved, "q8_0"), resolved)
    shape = [(name, type(value)) for name, value in blank.figures().items()]
    assert shape == [(name, type(value)) for name, value in final.figures().items()]
    assert not blank.passed
    assert all(check.tolerance is None or not check.passed for check in blank.checks)


# --- what is wrong fails, and where -----------------------------------------------------------------------------


def test_one_wrong_code_is_found(tmp_path):
    class WrongCode(Altered):
        def codes(self, ids):
            codes = self.engine.codes(ids)
            codes[ids == 73, 2] ^= 1
            return codes

    for own_code in (True, False):
        resolved = make_resolved(make_reference(code_kind="affine"), own_code=own_code)
        certificate = certify(write(tmp_path / "m.gguf", resolved, "q8_0"), resolved, WrongCode)
        assert certificate.code_mismatches == 1
        assert failed(certificate) == {"codes"}


@pytest.mark.parametrize("outtype", ["q8_0", "q4_0", "f16", "bf16"])
def test_one_weight_that_is_a_step_off_is_found(tmp_path, outtype):
    """A single stored number changed by its smallest step: invisible in the logits, not in the weights."""
    resolved = make_resolved(make_reference())
    path = write(tmp_path / "m.gguf", resolved, outtype)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    offset = {"q8_0": 2 + 5, "q4_0": 2 + 5, "f16": 2 * 5, "bf16": 2 * 5}[outtype]
    with path.open("r+b") as file:
        file.seek(tensor.data_offset + offset)
        byte = file.read(1)[0]
        file.seek(tensor.data_offset + offset)
        file.write(bytes([byte ^ 2]))
    certificate = certify(path, resolved)
    assert failed(certificate) == {"weights"}


def test_a_wrong_convention_hides_in_q4_0_but_not_from_the_certificate(tmp_path):
    """The reason for the chain: tanh for erf GELU is far below the rounding of 4-bit weights."""
    model = make_reference()
    resolved = make_resolved(model, activation="gelu_tanh")
    certificate = certify(write(tmp_path / "m.gguf", resolved, "q4_0"), resolved)
    assert failed(certificate) == {"conventions"}
    assert certificate.logit_error < OUT_TYPES["q4_0"].logit_tolerance


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_style": "interleaved"}, "rope_style"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"attention_scale": 0.3}, "attention_scale"),
        ({"code": CodeSpec("affine", 7, np.eye(7, dtype=np.uint8), np.ones(7, np.uint8))}, "shift"),
    ],
)
def test_a_file_with_other_conventions_is_named(tmp_path, change, words):
    resolved = make_resolved(make_reference())
    path = write(tmp_path / "m.gguf", replace(resolved, spec=replace(resolved.spec, **change)), "q8_0")
    certificate = certify(path, resolved)
    assert not certificate.passed
    assert len(certificate.problems) == 1
    assert words in certificate.problems[0]


def test_missing_and_additional_tensors_are_named(tmp_path):
    resolved = make_resolved(make_reference())
    tensors = dict(resolved.spec.tensors)
    tensors["output.extra"] = tensors.pop("output.bias")
    path = write(tmp_path / "m.gguf", replace(resolved, spec=replace(resolved.spec, tensors=tensors)), "q8_0")
    problems = " ".join(certify(path, resolved).problems)
    assert "output.bias is missing in the file" in problems
    assert "output.extra" in problems


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_a_block_that_computes_something_else_is_found(tmp_path, outtype):
    class WrongBlock(Altered):
        def hidden_states(self, ids, layer):
            states = self.engine.hidden_states(ids, layer)
            return states * np.float32(1.2) if layer == 1 else states

    resolved = make_resolved(make_reference())
    certificate = certify(write(tmp_path / "m.gguf", resolved, outtype), resolved, WrongBlock)
    assert "engine, worst" in failed(certificate)


@pytest.mark.parametrize("outtype", ["f32", "q4_0"])
def test_logits_that_are_slightly_off_are_found(tmp_path, outtype):
    class Scaled(Altered):
        def logits(self, ids):
            return self.engine.logits(ids) * np.float32(1.3)

    resolved = make_resolved(make_reference(num_hidden_layers=1))
    certificate = certify(write(tmp_path / "m.gguf", resolved, outtype), resolved, Scaled)
    assert "engine, worst" in failed(certificate)


def test_wrong_input_of_the_first_block_is_found(tmp_path):
    class WrongStart(Altered):
        def hidden_states(self, ids, layer):
            states = self.engine.hidden_states(ids, layer)
            if layer == 0:
                states[3, 4] += 1
            return states

    resolved = make_resolved(make_reference())
    certificate = certify(write(tmp_path / "m.gguf", resolved, "f32"), resolved, WrongStart)
    assert {"engine", "engine, worst"} <= failed(certificate)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_fail(tmp_path, value):
    class Broken(Altered):
        def logits(self, ids):
            logits = self.engine.logits(ids)
            logits[-1, -1] = value
            return logits

    resolved = make_resolved(make_reference())
    with np.errstate(invalid="ignore"):
        certificate = certify(write(tmp_path / "m.gguf", resolved, "q8_0"), resolved, Broken)
    assert "logits" in failed(certificate)


def test_the_runner_is_closed_even_if_it_fails(tmp_path):
    class Failing(Altered):
        runners: list = []  # noqa: RUF012

        def __init__(self, path, n_ctx):
            super().__init__(path, n_ctx)
            self.runners.append(self)

        def logits(self, ids):
            raise RuntimeError("out of order")

        def close(self):
            self.closed = True

    resolved = make_resolved(make_reference())
    with pytest.raises(RuntimeError, match="out of order"):
        certify(write(tmp_path / "m.gguf", resolved, "q8_0"), resolved, Failing)
    assert Failing.runners[0].closed


# --- parts ------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-9, 1e4),
    outtype=st.sampled_from(["f16", "bf16", "q8_0", "q4_0"]),
)
def test_rounding_error_accepts_every_correct_rounding(seed, scale, outtype):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((4, 64)) * scale * 10.0 ** rng.integers(-3, 1, (4, 1))).astype(np.float32)
    ggml_type = OUT_TYPES[outtype].ggml
    stored = gguf.quants.dequantize(quantize_rows(rows, ggml_type).reshape(-1), ggml_type).reshape(rows.shape)
    assert rounding_error(rows, stored, ggml_type) <= 1


@given(seed=st.integers(0, 2**32 - 1), position=st.integers(0, 63))
def test_rounding_error_refuses_a_step_of_q8_0(seed, position):
    rows = np.random.default_rng(seed).standard_normal((1, 64)).astype(np.float32)
    raw = quantize_rows(rows, Type.Q8_0)
    block, element = divmod(position, 32)
    codes = raw.reshape(2, 34)[:, 2:].view(np.int8)
    true = gguf.quants.dequantize(raw.reshape(-1), Type.Q8_0)
    # The next code away from the true value; 127 is the end of the range.
    code = int(codes[block, element]) + (1 if true[position] >= rows[0, position] else -1)
    assume(abs(code) <= 127)
    codes[block, element] = code
    stored = gguf.quants.dequantize(raw.reshape(-1), Type.Q8_0).reshape(rows.shape)
    assert rounding_error(rows, stored, Type.Q8_0) > 1


def test_rounding_error_of_f32_is_all_or_nothing():
    rows = np.ones((2, 3), dtype=np.float32)
    assert rounding_error(rows, rows.copy(), Type.F32) == 0
    other = rows.copy()
    other[1, 1] = np.nextafter(np.float32(1), np.float32(2))
    assert rounding_error(rows, other, Type.F32) == math.inf


def test_compare_weights_reads_every_weight_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 300)
    resolved = make_resolved(make_reference(qkv_bias=True))
    stored = read_gguf(write(tmp_path / "m.gguf", resolved, "q8_0"))
    spec, read = resolved.spec, {}

    def counting(name, recipe):
        def read_rows(start, stop):
            read[name] = read.get(name, 0) + stop - start
            return recipe.read_rows(start, stop)

        return replace(recipe, read_rows=read_rows)

    spec.tensors = {name: counting(name, recipe) for name, recipe in spec.tensors.items()}
    total, worst = compare_weights(stored, spec)
    assert read == {name: recipe.shape[0] for name, recipe in spec.tensors.items()}
    assert total == sum(math.prod(recipe.shape) for recipe in spec.tensors.values())
    assert 0.5 < worst <= 1
    values = spec.tensors["output_norm.bias"].load().copy()
    values[-1] += 1
    spec.tensors["output_norm.bias"] = array_recipe(values)
    assert compare_weights(stored, spec)[1] == math.inf


@pytest.mark.parametrize("block", [32, 64])  # 64: a whole row
def test_activations_are_rounded_as_the_design_says(block):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    x[0, 0], x[0, 1:5] = 127.0, (0.5, 1.5, 2.5, -0.5)  # a scale of 1: ties go to the even neighbour
    x[2, :32] = 0
    expected = np.empty_like(x)
    for row, out in zip(x.reshape(-1, block), expected.reshape(-1, block), strict=True):
        amax = np.abs(row).max()
        if amax == 0:
            out[:] = 0
            continue
        out[:] = np.rint(row * (np.float32(127) / amax)) * (amax / np.float32(127))
    rounded = round_activations(torch.from_numpy(x), block).numpy()
    assert np.array_equal(rounded, expected)
    assert rounded[0, 1:5].tolist() == [0, 2, 2, 0]


def test_streamed_logits_equal_the_model():
    """One block at a time, and weights asked for once."""
    model = make_reference(code_kind="table", num_key_value_heads=2, qkv_bias=True)
    resolved = make_resolved(model)
    prompts = [np.arange(n, dtype=np.uint32) for n in (1, 9, 30)]
    for ours, prompt in zip(reference_logits(resolved.spec, prompts), prompts, strict=True):
        np.testing.assert_allclose(ours, resolved.reference_logits(prompt), rtol=1e-4, atol=1e-5)


def test_prompts_fit_the_model():
    spec = make_resolved(make_reference(max_position_embeddings=5)).spec
    prompts = make_prompts(spec)
    assert max(len(p) for p in prompts) == 5
    assert {0, spec.vocab_size - 1} <= set(np.concatenate(prompts).tolist())
    assert all(p.dtype == np.uint32 and p.max() < spec.vocab_size for p in prompts)
    again = make_prompts(spec)
    assert all(np.array_equal(a, b) for a, b in zip(prompts, again, strict=True))


@pytest.mark.parametrize("key", ["fixmin.vocab_size", "fixmin.rope.style", "fixmin.code.affine_matrix"])
def test_readback_names_a_missing_key(tmp_path, key):
    path = make_model(tmp_path / "m.gguf", edit=lambda writer: writer.kv_data[0].pop(key))
    with pytest.raises(GGUFError, match=key):
        read_gguf(path)


def test_readback_refuses_other_architectures_and_wrong_types(tmp_path):
    def rename(writer):
        writer.kv_data[0]["general.architecture"].value = "llama"

    def retype(writer):
        del writer.kv_data[0]["fixmin.vocab_size"]
        writer.add_string("fixmin.vocab_size", "100")

    with pytest.raises(GGUFError, match="architecture 'llama'"):
        read_gguf(make_model(tmp_path / "a.gguf", edit=rename))
    with pytest.raises(GGUFError, match=r"fixmin\.vocab_size is of the wrong type"):
        read_gguf(make_model(tmp_path / "b.gguf", edit=retype))


def test_readback_equals_gguf(tmp_path):
    path = make_model(tmp_path / "m.gguf", weight_type="Q4_0", code_kind="table")
    stored = read_gguf(path)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name != "token_code.weight":
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            recipe = stored.spec.tensors[tensor.name]
            assert np.array_equal(recipe.load(), expected)
            assert np.array_equal(recipe.load_rows(1, 3), expected[1:3])


# --- verify -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(make_reference(code_kind="affine"), tmp_path_factory.mktemp("verify") / "checkpoint")


@pytest.fixture(scope="module")
def converted(checkpoint):
    from fixmin_cpp.convert.convert import convert

    return convert(checkpoint, checkpoint.parent / "m.gguf", "q4_0", trust_remote_code=True).path


def test_verify_repeats_the_certificate(checkpoint, converted):
    certificate = verify(converted, checkpoint, trust_remote_code=True)
    stored = _core.GgufFile(str(converted)).metadata
    assert certificate.passed
    for name, value in certificate.figures().items():
        assert stored[f"fixmin.convert.certificate.{name}"] == pytest.approx(value, rel=1e-5), name
    assert stored["fixmin.convert.certificate.against"] == certificate.against


def test_verify_notices_another_checkpoint(checkpoint, converted, tmp_path):
    model = make_reference(code_kind="affine")
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1
    other = save_checkpoint(model, tmp_path / "other")
    certificate = verify(converted, other, trust_remote_code=True)
    assert failed(certificate) >= {"weights"}
    assert any("SHA-256" in problem for problem in certificate.problems)


def test_verify_notices_weights_stored_anew(checkpoint, converted, tmp_path):
    """The same numbers in another file: not the one that was certified, and said in one line."""
    other = save_checkpoint(make_reference(code_kind="affine"), tmp_path / "other")
    weights = other / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "note": "stored anew"})
    certificate = verify(converted, other, trust_remote_code=True)
    assert len(certificate.problems) == 1
    assert len(certificate.lines()) == 1
    assert "is another checkpoint: its weights have SHA-256" in certificate.lines()[0]
    assert not certificate.passed


def test_verify_notices_other_tokens(tmp_path):
    from fixmin_cpp.convert.convert import convert

    demo = Path(__file__).resolve().parents[2] / "examples" / "demo" / "affine"
    path = convert(demo, tmp_path / "m.gguf", "q8_0").path
    assert verify(path, demo).passed
    data = path.read_bytes()
    vocab = data.index(b'"vocab"', data.index(b"tokenizer.huggingface.json"))
    merges = data.index(b'"merges"', vocab)
    end = data.index(b"tokenizer.ggml.eos_token_id") + len("tokenizer.ggml.eos_token_id") + 4
    word = data.index(b'"', merges + 20) + 1
    for key, place in {
        "tokenizer.huggingface.json": word,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.tokens": data.index(b"Paris", data.index(b"tokenizer.ggml.tokens")),
    }.items():
        other = bytearray(data)
        other[place] ^= 1
        path.write_bytes(other)
        certificate = verify(path, demo)
        assert not certificate.passed
        assert [problem.split(" ")[0] for problem in certificate.problems] == [key]


def test_verify_of_no_checkpoint(converted, tmp_path):
    with pytest.raises(CheckpointError):
        verify(converted, tmp_path)
    with pytest.raises(OSError, match="missing"):
        verify(tmp_path / "missing.gguf", tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"lift": "tile", "rope_base": 500.0}', {"lift": "tile", "rope_base": 500.0}),
        ('{"trust_remote_code": true}', {}),
        ('{"affine": ["/etc/passwd", "b"]}', {}),
        ('{"calibrate": "/etc/passwd"}', {}),
        ("[1]", {}),
        ("no json", {}),
        (7, {}),
    ],
)
def test_a_file_cannot_ask_for_code_or_files(text, expected):
    assert remembered_overrides({"fixmin.convert.overrides": text}) == expected


def test_file_type_of_another_tool(tmp_path):
    resolved = make_resolved(make_reference())
    path = write(tmp_path / "m.gguf", resolved, "q8_0")
    raw = bytearray(path.read_bytes())
    key = b"general.file_type"
    at = raw.index(key) + len(key) + 4
    raw[at : at + 4] = (18).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(GGUFError, match=r"general\.file_type 18"):
        certify(path, resolved)
    assert os.path.exists(path)
