"""The sampler against llama.cpp's own samplers, called by ctypes: one by one, in chains, and mirostat step by step."""

import math
import sys
from pathlib import Path

import llama_peer
import numpy as np
import pytest
import sampling_oracle as oracle
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))  # its toy models

from toy_models import byte_level, write_model

from fixmin_cpp import _core
from fixmin_cpp.export.llama_cpp import export
from fixmin_cpp.tokenizer import TextTokenizer

pytestmark = [pytest.mark.external, llama_peer.needs_python]

OFF = dict(top_k=0, top_p=1.0, min_p=0.0)
TOKENIZER = TextTokenizer(byte_level())


def examples(n):
    return settings(max_examples=n, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    source = write_model(folder / "in.gguf", byte_level())
    with llama_peer.Samplers(export(source, folder / "out.gguf").path) as samplers:
        yield samplers


def row(size, seed, scale):
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def ours(values, logits, history=(), step=0):
    """Probabilities by id."""
    chain = OFF | {"temperature": 1.0} | values
    ids, shares = _core.Sampler(_core.SamplingParams(**chain), list(history), None).probabilities(logits, step)
    return dict(zip(ids.tolist(), shares.tolist(), strict=True))


def assert_same(got, theirs):
    """`theirs`: logits by id. Their float32 softmax is left out: it is of the logits in double here."""
    assert got.keys() == theirs.keys()
    ids = sorted(theirs)
    expected = oracle.softmax(np.array([theirs[i] for i in ids], np.float64))
    np.testing.assert_allclose([got[i] for i in ids], expected, rtol=1e-4, atol=1e-9)


def margin_of(values, logits, history=(), step=0):
    """How near a token lies to a limit, by the float64 oracle: nearer than float32 tells both may be right."""
    return oracle.distribution(logits, oracle.DEFAULTS | OFF | values, history, step)[2]


rows = st.builds(row, st.sampled_from([6, 33, 200, 1025]), st.integers(0, 2**32), st.sampled_from([0.5, 3.0, 8.0]))
share = st.floats(0.03125, 0.96875, width=32)
keep = st.sampled_from([0, 1, 4, 20])
histories = st.lists(st.integers(0, 5), max_size=24)

# Our parameters, and llama.cpp's samplers for them.
TRUNCATIONS = {
    "top_n_sigma": st.tuples(st.floats(0.125, 3.0, width=32)).map(
        lambda v: ({"top_n_sigma": v[0]}, [["top_n_sigma", v[0]]])
    ),
    "top_k": st.sampled_from([1, 3, 40, 300]).map(lambda k: ({"top_k": k}, [["top_k", k]])),
    "typical_p": st.tuples(share, keep).map(lambda v: ({"typical_p": v[0], "min_keep": v[1]}, [["typical", *v]])),
    "top_p": st.tuples(share, keep).map(lambda v: ({"top_p": v[0], "min_keep": v[1]}, [["top_p", *v]])),
    "min_p": st.tuples(share, keep).map(lambda v: ({"min_p": v[0], "min_keep": v[1]}, [["min_p", *v]])),
    # With probability 1 no random number counts.
    "xtc": st.tuples(st.floats(0.0, 0.625, width=32), keep).map(
        lambda v: (
            {"xtc_probability": 1.0, "xtc_threshold": v[0], "min_keep": v[1]},
            [["xtc", 1.0, v[0], v[1], 1]],
        )
    ),
    "temperature": st.floats(0.125, 4.0, width=32).map(lambda t: ({"temperature": t}, [["temp", t]])),
    "dynatemp": st.tuples(
        st.floats(0.125, 2.0, width=32), st.floats(0.125, 2.0, width=32), st.floats(0.25, 3.0, width=32)
    ).map(
        lambda v: (
            dict(zip(("temperature", "dynatemp_range", "dynatemp_exponent"), v, strict=True)),
            [["temp_ext", *v]],
        )
    ),
}


@pytest.mark.parametrize("name", TRUNCATIONS)
@examples(100)
@given(data=st.data(), logits=rows)
def test_one_sampler_alone(llama, name, data, logits):
    values, samplers = data.draw(TRUNCATIONS[name])
    assume(margin_of(values, logits) > 1e-4)
    ((theirs, _),) = llama(samplers, [logits])
    assert_same(ours(values, logits), theirs)


@examples(100)
@given(
    logits=rows,
    history=histories,
    last_n=st.sampled_from([-1, 0, 1, 5, 64]),
    repeat=st.floats(0.75, 1.5, width=32),
    frequency=st.floats(-1, 2, width=32),
    presence=st.floats(-1, 2, width=32),
)
def test_penalties(llama, logits, history, last_n, repeat, frequency, presence):
    values = dict(repeat_last_n=last_n, repeat_penalty=repeat, frequency_penalty=frequency, presence_penalty=presence)
    n = len(history) if last_n < 0 else last_n  # as llama.cpp's programs read -1
    ((theirs, _),) = llama([["penalties", n, repeat, frequency, presence]], [logits], history)
    assert_same(ours(values, logits, history), theirs)


@examples(100)
@given(logits=rows, bias=st.dictionaries(st.integers(0, 5), st.floats(-5, 5, width=32), max_size=4))
def test_logit_bias(llama, logits, bias):
    ((theirs, _),) = llama([["logit_bias", sorted(bias.items())]], [logits])
    assert_same(ours({"logit_bias": bias}, logits), theirs)


# Ids whose texts are "th", "he", "b", "t", ":", "\n\n" and others, among which breakers are met in part and as a whole.
WORDS = [TOKENIZER.encode(text)[0] for text in ("th", "he", "b", "t", "e", ":", "\n\n", "a", "x", "ab")]


@examples(200)
@given(
    seed=st.integers(0, 2**32),
    history=st.lists(st.sampled_from(WORDS), max_size=40),
    multiplier=st.floats(0.125, 2.0, width=32),
    base=st.floats(1.0, 2.0, width=32),
    allowed=st.integers(1, 4),
    last_n=st.sampled_from([-1, 3, 12, 64]),
    breakers=st.lists(st.sampled_from(["\n", ":", "the", "ab", "h", "xx", "e:"]), max_size=3, unique=True),
)
def test_dry(llama, seed, history, multiplier, base, allowed, last_n, breakers):
    logits = row(TOKENIZER.backend.get_vocab_size(), seed, 3.0)
    values = dict(
        dry_multiplier=multiplier,
        dry_base=base,
        dry_allowed_length=allowed,
        dry_penalty_last_n=last_n,
        dry_sequence_breakers=[ids for text in breakers for ids in TOKENIZER.sequences_with(text)],
    )
    n = len(history) if last_n < 0 else last_n
    ((theirs, _),) = llama([["dry", multiplier, base, allowed, n, breakers]], [logits], history)
    assert_same(ours(values, logits, history), theirs)


@st.composite
def chains(draw):
    """Our parameters and llama.cpp's chain for them, in the order of its README.

    Some not together: tokens that its top_n_sigma removes stay there with probability 0 (docs/sampling.md), which
    counts for what looks at all that are left.
    """
    order = ["top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc"]
    names = [name for name in order if draw(st.booleans())]
    if "top_n_sigma" in names:
        names = [name for name in names if name not in ("typical_p", "xtc")]
    min_keep = draw(keep) if "top_n_sigma" not in names else 0
    values, samplers = {"min_keep": min_keep}, []
    for name in names:
        more, made = draw(TRUNCATIONS[name])
        values |= {field: value for field, value in more.items() if field != "min_keep"}
        for one in made:
            at = {"typical": 2, "top_p": 2, "min_p": 2, "xtc": 3}.get(one[0])
            samplers.append([min_keep if i == at else value for i, value in enumerate(one)])
    warm = "temperature" if "top_n_sigma" in names else draw(st.sampled_from(["temperature", "dynatemp"]))
    more, made = draw(TRUNCATIONS[warm])
    return values | more, samplers + made


@examples(300)
@given(
    chain=chains(),
    logits=rows,
    history=histories,
    single=st.tuples(st.floats(0.75, 1.5, width=32), st.floats(-1, 2, width=32), st.floats(-1, 2, width=32)),
    dry=st.floats(0.125, 2.0, width=32),
)
def test_whole_chains(llama, chain, logits, history, single, dry):
    values, samplers = chain
    repeat, frequency, presence = single
    values = values | dict(repeat_penalty=repeat, frequency_penalty=frequency, presence_penalty=presence)
    values = values | dict(repeat_last_n=16, dry_multiplier=dry)
    assume(margin_of(values, logits, history) > 1e-4)
    single = [["penalties", 16, repeat, frequency, presence], ["dry", dry, 1.75, 2, len(history), []]]
    ((theirs, _),) = llama(single + samplers, [logits], history)
    assert_same(ours(values, logits, history), theirs)


@pytest.mark.parametrize("version", [1, 2])
@examples(100)
@given(
    size=st.sampled_from([6, 33, 200, 1025]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1.0, 2.0, 4.0]),
    temperature=st.floats(0.5, 2.0, width=32),
    tau=st.floats(0.5, 8.0, width=32),
    eta=st.floats(0.0, 1.0, width=32),
)
def test_mirostat(llama, version, size, seed, scale, temperature, tau, eta):
    """Three steps. llama.cpp draws by other random numbers: ours is asked with seeds until it draws the same token.

    Where its k exceeds an int, of rows that are nearly flat, llama.cpp keeps one token: that is no definition.
    """
    logits = [row(size, seed + i, scale) for i in range(3)]
    made = ["mirostat", seed, tau, eta, 100] if version == 1 else ["mirostat_v2", seed, tau, eta]
    steps = llama([["temp", temperature], made], logits)
    values = dict(mirostat=version, mirostat_tau=tau, mirostat_eta=eta, temperature=temperature)
    p, mu = oracle.DEFAULTS | values, 2 * tau
    drawn: list[int] = []
    for i, (theirs, token) in enumerate(steps):
        x = np.sort(logits[i].astype(np.float64))[::-1]
        assume(oracle.mirostat_keep(x, p, mu, size)[1] > 1e-3)
        assume(version == 2 or oracle.mirostat_limit(x, p, mu, size) < 2**31)
        same = replay(values, logits, drawn)
        if same is None:
            return event(f"{i} steps compared")  # the last token is improbable
        ids, shares = same.probabilities(logits[i], i)
        got = dict(zip(ids.tolist(), shares.tolist(), strict=True))
        assert_same(got, theirs)
        drawn.append(token)
        mu -= eta * (-math.log2(got[token]) - tau)
    event("3 steps compared")


def replay(values, logits, drawn):
    """A sampler that has drawn these tokens; None if no seed of some hundreds does."""
    for seed in range(400):
        tested = _core.Sampler(_core.SamplingParams(**OFF, **values, seed=seed), [], None)
        for i, token in enumerate(drawn):
            if tested.sample(logits[i], i) != token:
                break
            tested.accept(token)
        else:
            return tested
    return None
