"""Perplexity and divergence against float64 NumPy on whole logits, which fixmin_cpp.evaluate never holds."""

import dataclasses
import json
import os

import numpy as np
import pytest
from fixmin_cli import fixmin
from gguf_factory import make_model
from hypothesis import given
from hypothesis import strategies as st
from toy_models import byte_level, write_model

import fixmin_cpp
from fixmin_cpp import cli_output
from fixmin_cpp.batch import run_batch
from fixmin_cpp.errors import ArgumentError, ArgumentTypeError
from fixmin_cpp.evaluate import windows


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The bare model in Q4_0: the same function, roughly."""
    path = make_model(tmp_path_factory.mktemp("other") / "q4.gguf", weight_type="Q4_0")
    with fixmin_cpp.Model(path) as model:
        yield model


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(3).integers(0, 100, 151)


def log_probabilities(model, window):
    x = model.logits(window).astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def expected(model, ids, ctx, stride, base=None):
    """Token by token: -log p, -log p of the base, KL, same top-1; a token is predicted by the first window it is in."""
    rows, done = [], {0}
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + ctx]
        q = log_probabilities(model, window)
        p = q if base is None else log_probabilities(base, window)
        for i in range(1, len(window)):
            if begin + i not in done:
                done.add(begin + i)
                divergence = sum(np.exp(p[i - 1]) * (p[i - 1] - q[i - 1]))
                same = p[i - 1].argmax() == q[i - 1].argmax()
                rows.append((-q[i - 1, window[i]], -p[i - 1, window[i]], divergence, same))
    return np.array(rows, dtype=np.float64).T


@given(st.integers(2, 60), st.integers(2, 20), st.data())
def test_windows_score_each_token_once(n_tokens, ctx, data):
    stride = data.draw(st.integers(1, ctx))
    scored = []
    for part in windows(n_tokens, ctx, stride):
        assert part.end - part.begin <= ctx
        assert part.begin < part.scored < part.end
        assert (part.rows.start, part.rows.stop) == (part.scored - 1 - part.begin, part.end - 1 - part.begin)
        scored += range(part.scored, part.end)
    never = range(0, n_tokens, stride) if stride == ctx else [0]
    assert scored == [i for i in range(n_tokens) if i not in never]


@pytest.mark.parametrize(("ctx", "stride"), [(64, 64), (64, 20), (17, 17), (10, 1), (64, 63)])
def test_perplexity(bare_model, ids, ctx, stride):
    losses = expected(bare_model, ids, ctx, stride)[0]
    seen = []
    found = fixmin_cpp.perplexity(bare_model, ids, ctx=ctx, stride=stride, progress=lambda *step: seen.append(step))
    assert (found.n_tokens, found.n_scored, found.ctx, found.stride) == (len(ids), losses.size, ctx, stride)
    assert found.divergence is None
    assert found.nll == pytest.approx(losses.mean(), rel=1e-6)
    assert found.nll_error == pytest.approx(losses.std(ddof=1) / np.sqrt(losses.size), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert found.perplexity_error == pytest.approx(found.perplexity * found.nll_error)
    assert found.tok_s > 0
    assert seen == [(i + 1, found.n_windows) for i in range(found.n_windows)]


def test_divergence(bare_model, other, ids):
    losses, base_losses, kl, same = expected(other, ids, 50, 30, bare_model)
    found = fixmin_cpp.perplexity(other, ids, ctx=50, stride=30, base=bare_model)
    far = found.divergence
    delta = np.exp(-losses) - np.exp(-base_losses)
    n = losses.size
    assert found.nll == pytest.approx(losses.mean(), rel=1e-12)
    assert far.base_nll == pytest.approx(base_losses.mean(), rel=1e-12)
    assert far.perplexity_ratio == pytest.approx(np.exp(losses.mean() - base_losses.mean()))
    assert far.kl_mean == pytest.approx(kl.mean())
    assert far.kl_error == pytest.approx(kl.std(ddof=1) / np.sqrt(n))
    assert far.kl_quantiles["99"] == pytest.approx(np.percentile(kl, 99))
    assert far.kl_quantiles["100"] == pytest.approx(kl.max())
    assert far.top1 == same.mean()
    assert far.top1_error == pytest.approx(same.std(ddof=1) / np.sqrt(n))
    assert far.delta_p_mean == pytest.approx(delta.mean())
    assert far.delta_p_error == pytest.approx(delta.std(ddof=1) / np.sqrt(n))
    assert far.delta_p_rms == pytest.approx(np.sqrt(np.mean(delta**2)))
    assert far.delta_p_quantiles["5"] == pytest.approx(np.percentile(delta, 5))
    assert far.delta_p_quantiles["99.9"] == pytest.approx(np.percentile(delta, 99.9))
    assert 0 < far.kl_mean < 0.1
    assert 0.5 < far.top1 <= 1


def test_a_model_does_not_differ_from_itself(bare_model, ids):
    far = fixmin_cpp.perplexity(bare_model, ids, base=bare_model.path).divergence
    assert (far.kl_mean, far.top1, far.delta_p_rms, far.perplexity_ratio) == (0, 1, 0, 1)


def test_saved_logits_are_as_good_as_the_model(bare_model, other, ids, tmp_path):
    file = tmp_path / "base.logits"
    settings = {"ctx": 40, "stride": 25}
    alone = fixmin_cpp.perplexity(bare_model, ids, save_logits=file, **settings)
    assert alone.nll == pytest.approx(expected(bare_model, ids, 40, 25)[0].mean(), rel=1e-12)
    assert file.stat().st_size == 4096 + 4 * alone.n_scored * 100
    saved = fixmin_cpp.perplexity(other, ids, base_logits=file, **settings).divergence
    assert saved == fixmin_cpp.perplexity(other, ids, base=bare_model, **settings).divergence
    with pytest.raises(ArgumentError, match="stride is 25 there and 40 here"):
        fixmin_cpp.perplexity(other, ids, base_logits=file, ctx=40)
    with pytest.raises(ArgumentError, match="sha256"):
        fixmin_cpp.perplexity(other, ids[::-1], base_logits=file, **settings)
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArgumentError, match="damaged"):
        fixmin_cpp.perplexity(other, ids, base_logits=tmp_path / "cut", **settings)
    with pytest.raises(ArgumentError, match=r"base\.logits is damaged: it has become shorter"):
        fixmin_cpp.perplexity(
            other, ids, base_logits=file, progress=lambda done, of: os.truncate(file, 5000), **settings
        )
    fixmin_cpp.perplexity(bare_model, ids, save_logits=file, **settings)
    (tmp_path / "bad").write_bytes(file.read_bytes().replace(b'{"vocab', b'["vocab'))
    with pytest.raises(ArgumentError, match="damaged"):
        fixmin_cpp.perplexity(other, ids, base_logits=tmp_path / "bad", **settings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": [1]}, ArgumentError, "at least 2 tokens"),
        ({"text": []}, ArgumentError, "empty"),
        ({"text": [1, 100]}, ArgumentError, "token ids run from 0 to 99"),
        ({"ctx": 65}, ArgumentError, "ctx must be between 2 and 64"),
        ({"ctx": 1}, ArgumentError, "ctx must be"),
        ({"stride": 0}, ArgumentError, "stride must be"),
        ({"ctx": 10, "stride": 11}, ArgumentError, "stride must be between 1 and 10"),
        ({"max_windows": 0}, ArgumentError, "max_windows must be"),
        ({"base": 5}, ArgumentTypeError, "base must be a Model"),
        ({"base": "a", "base_logits": "b"}, ArgumentError, "not both"),
        ({"base_logits": __file__}, ArgumentError, "not a file of logits"),
    ],
)
def test_wrong_arguments(bare_model, arguments, error, message):
    with pytest.raises(error, match=message):
        fixmin_cpp.perplexity(bare_model, **{"text": [1, 2, 3], **arguments})


def test_another_vocabulary(bare_model, tmp_path):
    path = make_model(tmp_path / "m.gguf", vocab_size=90)
    with pytest.raises(ArgumentError, match="base has 90 tokens, model 100"):
        fixmin_cpp.perplexity(bare_model, [1, 2, 3], base=path)


def test_command(letters_model, tmp_path):
    text = "the cat abc\n日本 Paris. " * 30
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    found = fixmin_cpp.perplexity(letters_model, text, ctx=32, stride=16, base=letters_model)
    options = ["-m", letters_model.path, "-f", file, "--ctx", 32, "--stride", 16]
    result = fixmin("perplexity", *options, "--base-model", letters_model.path, "--json")
    assert result.stderr == b""
    report = json.loads(result.stdout)
    assert report["perplexity"] == found.perplexity
    assert report["divergence"]["kl_mean"] == 0
    caches = fixmin("perplexity", *options, "--base-model", letters_model.path, "--kv-type", "q8_0", "--json")
    assert json.loads(caches.stdout)["divergence"]["kl_mean"] == 0  # both
    caches = ["--base-model", letters_model.path, "--kv-type", "q8_0", "--base-kv-type", "f32", "--json"]
    assert 0 < json.loads(fixmin("perplexity", *options, *caches).stdout)["divergence"]["kl_mean"] < 0.01
    plain = fixmin("perplexity", *options, "--save-logits", tmp_path / "logits")
    assert f"perplexity: {found.perplexity:.6g}\n" in plain.stdout.decode()
    assert b"top1: 1\n" in fixmin("perplexity", *options, "--kl", tmp_path / "logits").stdout
    failed = fixmin("perplexity", "-m", letters_model.path, "-f", tmp_path / "missing")
    assert (failed.returncode, failed.stderr.startswith(b"error: ")) == (1, True)


@pytest.fixture(scope="module")
def steep(tmp_path_factory):
    """A model with finite logits, some of which lie further apart than float32 can hold; and ids that meet those."""
    folder = tmp_path_factory.mktemp("steep")

    def write(name, factor):
        def scale(writer):
            for tensors in writer.tensors:
                for tensor in ("output.weight", "output.bias"):
                    if tensor in tensors:
                        tensors[tensor].tensor = (tensors[tensor].tensor.astype(np.float64) * factor).astype(np.float32)

        return write_model(folder / name, byte_level(), more=scale)

    with fixmin_cpp.Model(write("flat.gguf", 1.0)) as flat:
        ids = flat.encode("the cat the cat")
        logits = flat.logits(ids)
    path = write("steep.gguf", 2.5e38 / np.abs(logits).max())
    with fixmin_cpp.Model(path) as model:
        logits = model.logits(ids).astype(np.float64)
        spread = logits.max(axis=1) - logits.min(axis=1)
        row = int(spread.argmax())
        assert np.isfinite(logits).all()
        assert spread[row] > np.finfo(np.float32).max
        yield model, [*ids[: row + 1], int(logits[row].argmin())]


def test_log_probabilities_beyond_float32(steep, tmp_path):
    """They are numbers that JSON can hold, but no perplexity comes of them."""
    model, ids = steep
    lowest = float(np.finfo(np.float32).min)
    assert model.score(ids).logprobs[-1] == lowest
    with pytest.raises(fixmin_cpp.FixminError, match="further apart than float32"):
        fixmin_cpp.perplexity(model, ids)
    (tmp_path / "in").write_text(json.dumps({"prompt": [int(i) for i in ids]}) + "\n")
    run_batch(model.path, tmp_path / "in", tmp_path / "out", task="score")
    record = json.loads((tmp_path / "out").read_bytes(), parse_constant=pytest.fail)
    assert record["logprobs"][-1] == pytest.approx(lowest, rel=1e-7)
    assert record["perplexity"] is None
    shown = fixmin("generate", "-m", model.path, "-p", "the", "-n", 2, "--logprobs", 200, "--json").stdout
    assert "logprobs" in json.loads(shown, parse_constant=pytest.fail)


def test_a_base_whose_logits_are_not_finite(bare_model, ids, tmp_path):
    path = tmp_path / "base.logits"
    fixmin_cpp.perplexity(bare_model, ids, save_logits=path)
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(fixmin_cpp.FixminError, match="the base's logits are not finite on this text"):
        fixmin_cpp.perplexity(bare_model, ids, base_logits=path)


def test_a_perplexity_beyond_doubles_is_null(steep, capfdbinary):
    model, ids = steep
    with fixmin_cpp.Model(model.path) as again:
        report = fixmin_cpp.perplexity(model, ids, base=again)  # in float64
    assert report.nll > 1e37
    assert report.perplexity == float("inf")
    cli_output.report(dataclasses.asdict(report), True)
    shown = json.loads(capfdbinary.readouterr().out, parse_constant=pytest.fail)
    assert (shown["perplexity"], shown["nll"]) == (None, report.nll)
