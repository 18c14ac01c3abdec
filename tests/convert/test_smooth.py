"""`fixmin quantize ... w8a8 --smooth`: the model stays the same in float32, and outliers cost less."""

import json
import signal
import subprocess
import time
from pathlib import Path

import fixmin_cli
import numpy as np
import pytest
from gguf import GGUFReader
from gguf_factory import make_model
from oracle import forward

import fixmin_cpp
from fixmin_cpp import _core
from fixmin_cpp.atomic_file import AtomicFile
from fixmin_cpp.convert.convert import convert
from fixmin_cpp.convert.gguf_file.formats import F32
from fixmin_cpp.convert.gguf_file.readback import read_gguf
from fixmin_cpp.convert.gguf_file.writer import Layout, TensorPlan
from fixmin_cpp.errors import ArgumentError, CheckpointError
from fixmin_cpp.quantization import smooth
from fixmin_cpp.quantization.imatrix import collect
from fixmin_cpp.quantization.requantize import _metadata
from fixmin_cpp.quantization.smooth import Group, Smoother, applied, groups, mean_squares

DEMO = Path(__file__).parents[2] / "examples" / "demo"
OUTLIER = 100

MODELS = {
    "layernorm": {},
    "rmsnorm, swiglu": {"norm": "rmsnorm", "activation": "swiglu"},
    "grouped queries": {"head_count": 8, "head_count_kv": 2},
    "learned": {"code_kind": "learned"},
}


def ids_for(n):
    return list(range(1, n + 1))


def write(source, target, tensors):
    """A file like the source's with other tensors, in F32."""
    spec = read_gguf(source).spec
    plans = [TensorPlan(name, recipe.shape, F32, recipe) for name, recipe in tensors(spec).items()]
    with AtomicFile(target) as file:
        Layout(plans, _metadata(source, "f32", None, None, None)).write(file, {}, 2, lambda *_: None)
        file.commit()
    return target


@pytest.mark.parametrize("name", MODELS)
def test_logits_keep_their_bits_in_float32(tmp_path, name):
    source = make_model(tmp_path / "source.gguf", block_count=2, **MODELS[name])
    ids = ids_for(40)
    rng = np.random.default_rng(1)

    def moved(spec):
        squares = {
            name: np.exp(3 * rng.standard_normal(recipe.shape[-1])).astype(np.float32)
            for name, recipe in spec.tensors.items()
            if len(recipe.shape) == 2
        }
        smoother = Smoother(spec, squares)
        factors = smoother.factors(0.7, smoother.kinds)
        assert all(len(set(values)) > 2 for _, values in factors)  # not nothing
        return applied(spec, factors).tensors

    target = write(source, tmp_path / "moved.gguf", moved)
    assert target.read_bytes() != source.read_bytes()
    options = {"kv_type": "f32", "n_threads": 2}
    with fixmin_cpp.Model(source, **options) as one, fixmin_cpp.Model(target, **options) as other:
        assert np.array_equal(one.logits(ids), other.logits(ids))
    expected = forward(source, ids)  # float64
    np.testing.assert_allclose(forward(target, ids), expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_groups_are_what_reads_the_same_channels(tmp_path):
    spec = read_gguf(make_model(tmp_path / "m.gguf", block_count=2, activation="swiglu", norm="rmsnorm")).spec
    found = {(group.kind, group.multiplied[0]) for group in groups(spec)}
    assert ("qkv", "blk.1.attn_q.weight") in found
    assert not any(name.startswith("blk.0.attn_q") for _, name in found)  # folded
    assert len(found) == 4 * 2 - 1 + 1
    assert next(group for group in groups(spec) if group.kind == "down").divided == (
        "blk.0.ffn_up.weight",
        "blk.0.ffn_up.bias",
    )


def test_columns_of_shared_values():
    group = Group("attn_output", (), (), head_dim=2, heads_per_kv_head=3)
    channels = np.array([1, 2, 3, 4], np.float32)
    assert group.columns(channels).tolist() == [1, 2] * 3 + [3, 4] * 3
    assert group.channels(np.array([1, 9, 5, 2, 3, 4, 0, 0, 7, 1, 0, 8], np.float32)).tolist() == [5, 9, 7, 8]


def test_a_channel_of_nothing_has_the_factor_one(tmp_path):
    spec = read_gguf(make_model(tmp_path / "m.gguf", block_count=2)).spec
    squares = {name: np.ones(r.shape[-1], np.float32) for name, r in spec.tensors.items() if len(r.shape) == 2}
    squares["blk.1.attn_q.weight"][3] = 0
    factors = dict(Smoother(spec, squares).factors(0.5, ["qkv"]))
    assert next(iter(factors.values()))[3] == 1


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The demo with one channel of two norms of each layer 100 times as large: the same model."""
    folder = tmp_path_factory.mktemp("planted")
    convert(DEMO / "fixed", folder / "f32.gguf", "f32", trust_remote_code=True)

    def tensors(spec):
        channel = np.ones(spec.embedding_length, np.float32)
        channel[7] = 1 / OUTLIER
        return applied(spec, [(g, channel) for g in groups(spec) if g.kind in ("qkv", "gate_up")]).tensors

    return write(folder / "f32.gguf", folder / "planted.gguf", tensors)


def test_an_outlier_costs_at_most_a_tenth(planted, tmp_path):
    """KL(float32 || w8a8) on text that the factors were not chosen by."""
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    with fixmin_cpp.Model(planted, kv_type="f32") as model:
        ids = model.token_ids(text)
    report = fixmin_cpp.quantize(planted, tmp_path / "smooth.gguf", "w8a8", smooth=ids[:2048]).smooth
    fixmin_cpp.quantize(planted, tmp_path / "plain.gguf", "w8a8")
    assert report.alpha is not None
    assert report.kl_after < report.kl_before / 10

    def divergence(name):
        return fixmin_cpp.perplexity(tmp_path / name, ids[2048:4096], base=planted).divergence.kl_mean

    assert divergence("smooth.gguf") < divergence("plain.gguf") / 10


def test_of_an_importance_matrix(planted, tmp_path):
    with fixmin_cpp.Model(planted) as model:
        ids = model.token_ids((DEMO / "heldout.txt").read_text(encoding="utf-8"))[:1000]
        collect(model, ids, tmp_path / "imatrix.gguf")
    report = fixmin_cpp.quantize(planted, tmp_path / "out.gguf", "w8a8", smooth=tmp_path / "imatrix.gguf").smooth
    assert report.kl_after < report.kl_before / 10
    metadata = _core.GgufFile(str(tmp_path / "out.gguf")).metadata
    assert metadata["fixmin.quantize.smooth"] == "imatrix.gguf"
    assert json.loads(metadata["fixmin.smooth.report"])["alpha"] == report.alpha


def test_command_says_what_it_changed(tmp_path):
    source = make_model(tmp_path / "source.gguf", block_count=2, embedding_length=64)
    ids = tmp_path / "text.txt"
    ids.write_text("text")
    done = fixmin_cli.fixmin("quantize", source, tmp_path / "o.gguf", "w8a8", "--smooth", ids)
    assert done.returncode != 0  # no tokenizer in it
    assert b"tokenizer" in done.stderr
    assert not (tmp_path / "o.gguf").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.gguf", "text.txt"]
    done = fixmin_cli.fixmin("quantize", source, ids, "w8a8", "--smooth", ids)
    assert b"is an input" in done.stderr
    assert ids.read_text() == "text"


def test_text_from_stdin(planted, tmp_path):
    text = (DEMO / "heldout.txt").read_bytes()[:3000]
    done = fixmin_cli.fixmin("quantize", planted, tmp_path / "out.gguf", "w8a8", "--smooth", "-", stdin=text)
    assert (done.returncode, b"that it was not chosen by" in done.stdout) == (0, True), done.stderr


def test_terminated(planted, tmp_path):
    """Nothing is left beside the file that was to be."""
    arguments = ["quantize", planted, tmp_path / "out.gguf", "w8a8", "--smooth", DEMO / "heldout.txt"]
    with subprocess.Popen([*fixmin_cli.FIXMIN, *map(str, arguments)], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + fixmin_cli.TIMEOUT
        while not list(tmp_path.glob(".smooth-*/*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        process.communicate(timeout=fixmin_cli.TIMEOUT)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"type": "q8_0", "smooth": [1, 2, 3]}, "is for w8a8"),
        ({"type": "w8a8", "smooth": [1] * 127}, "at least 128 tokens, got 127"),
        ({"type": "w8a8", "smooth": __file__}, "is the name of a file; give a Path"),
        ({"type": "w8a8", "smooth": Path(fixmin_cpp._core.__file__)}, "neither UTF-8 text .* nor an importance matrix"),
    ],
)
def test_what_is_refused(tmp_path, arguments, message):
    source = make_model(tmp_path / "source.gguf", block_count=2)
    with pytest.raises(ArgumentError, match=message):
        fixmin_cpp.quantize(source, tmp_path / "out.gguf", **arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]


def test_statistics_are_those_of_the_importance_matrix(tmp_path):
    source = make_model(tmp_path / "source.gguf", block_count=2)
    with fixmin_cpp.Model(source, n_threads=2) as model:
        ids = np.array(ids_for(50), np.uint32)
        collect(model, ids, tmp_path / "imatrix.gguf", ctx=50)
        found = mean_squares(model, ids)
    from fixmin_cpp.quantization.imatrix import read_imatrix

    for name, values in read_imatrix(tmp_path / "imatrix.gguf").items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def test_converted_with_a_certificate(tmp_path, monkeypatch):
    """The file keeps its factors, so that the certificate of a conversion and `fixmin verify` know them."""
    monkeypatch.setattr(smooth, "_LEAST_GAIN", 10.0)  # the demo gains little
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:4000]
    path = tmp_path / "out.gguf"
    report = fixmin_cpp.convert(DEMO / "affine", path, "w8a8", trust_remote_code=True, smooth=text)
    assert report.certificate.passed
    assert report.smooth.alpha is not None
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    exponents = _core.GgufFile(str(path)).metadata["fixmin.smooth.exponents"]
    assert np.count_nonzero(exponents) == report.smooth.n_channels
    done = fixmin_cli.fixmin("verify", path, DEMO / "affine", "--trust-remote-code")
    assert (done.returncode, b": certified" in done.stdout) == (0, True), done.stderr
    with pytest.raises(ArgumentError, match="has been smoothed"):
        fixmin_cpp.quantize(path, tmp_path / "again.gguf", "w8a8", smooth=[1, 2, 3], allow_requantize=True)
    metadata = _core.GgufFile(str(path)).metadata
    assert json.loads(metadata["fixmin.smooth.report"])["kl_after"] == report.smooth.kl_after
    changed = path.read_bytes().replace(b"fixmin.smooth.exponents", b"fixmin.smooth.exponentz")
    path.write_bytes(changed)  # another model's weights, as far as anyone can tell
    assert fixmin_cli.fixmin("verify", path, DEMO / "affine", "--trust-remote-code").returncode == 1


def test_quantised_and_verified(tmp_path, monkeypatch):
    """Also a file of `fixmin quantize` says which factors it has."""
    monkeypatch.setattr(smooth, "_LEAST_GAIN", 10.0)
    fixmin_cpp.convert(DEMO / "affine", tmp_path / "f32.gguf", "f32", trust_remote_code=True)
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    path = tmp_path / "out.gguf"
    report = fixmin_cpp.quantize(tmp_path / "f32.gguf", path, "w8a8", smooth=text).smooth
    assert report.alpha is not None
    done = fixmin_cli.fixmin("verify", path, DEMO / "affine", "--trust-remote-code")
    assert (done.returncode, b": certified" in done.stdout) == (0, True), done.stdout + done.stderr
    with pytest.raises(ArgumentError, match=r"already quantised \(W8A8\)"):
        fixmin_cpp.quantize(path, tmp_path / "again.gguf", "q8_0")


def test_an_importance_matrix_of_nothing(tmp_path):
    spec = read_gguf(make_model(tmp_path / "m.gguf", block_count=2)).spec
    squares = {name: np.zeros(r.shape[-1], np.float32) for name, r in spec.tensors.items() if len(r.shape) == 2}
    with pytest.raises(ArgumentError, match="no inputs of any matrix"):
        Smoother(spec, squares)


def test_exponents_out_of_range(tmp_path):
    spec = read_gguf(make_model(tmp_path / "m.gguf", block_count=2)).spec
    exponents = smooth.packed(spec, [])
    exponents[3] = -128
    with pytest.raises(fixmin_cpp.GGUFError, match="from -30 to 30"):
        smooth.remembered({smooth.EXPONENTS_KEY: exponents}, spec)


def test_a_matrix_that_may_change_is_no_copy(tmp_path):
    source = make_model(tmp_path / "m.gguf", block_count=2, weight_type="W8A8")
    with pytest.raises(ArgumentError, match="already quantised"):
        fixmin_cpp.quantize(source, tmp_path / "out.gguf", "w8a8", smooth=ids_for(90) * 3)


def test_what_a_conversion_refuses(tmp_path):
    with pytest.raises(CheckpointError, match="smooth is for w8a8"):
        fixmin_cpp.convert(DEMO / "affine", tmp_path / "out.gguf", "q8_0", trust_remote_code=True, smooth=[1, 2])
    text = tmp_path / "text.txt"
    text.write_text("text")
    with pytest.raises(ArgumentError, match="is an input"):
        fixmin_cpp.convert(DEMO / "affine", text, "w8a8", trust_remote_code=True, smooth=text)
    assert text.read_text() == "text"


def test_factors_that_gain_nothing_are_left_out(tmp_path):
    source = make_model(tmp_path / "source.gguf", block_count=2)
    report = fixmin_cpp.quantize(source, tmp_path / "smooth.gguf", "w8a8", smooth=ids_for(90) * 3).smooth
    fixmin_cpp.quantize(source, tmp_path / "plain.gguf", "w8a8")
    assert (report.alpha, report.kinds, report.n_channels) == (None, (), 0)
    assert report.kl_after == report.kl_before
    assert "none" in report.summary()
    plain, smoothed = (GGUFReader(tmp_path / name).tensors for name in ("plain.gguf", "smooth.gguf"))
    for one, other in zip(plain, smoothed, strict=True):
        assert np.array_equal(one.data, other.data)
