"""The sampler against the definitions in float64 (sampling_oracle.py), statistics of its draws, and misuse."""

import math

import numpy as np
import pytest
import sampling_oracle as oracle
from engine_runs import score
from gguf_factory import make_model
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fixmin_cpp import _core

ISAS = _core.system_info()["isas_supported"]
OFF = dict(top_k=0, top_p=1.0, min_p=0.0)  # everything that is on by default
NAN, INF = math.nan, math.inf


def native(**values):
    return _core.SamplingParams(**values)


def sampler(history=(), isa=None, **values):
    return _core.Sampler(native(**{"temperature": 1.0} | values), list(history), isa)


def expectation(history=(), **values):
    return oracle.DEFAULTS | values


def row(size, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def bits(chosen):
    """A bool [V] as the bit set that the sampler takes."""
    padded = np.zeros(-len(chosen) % 32 + len(chosen), bool)
    padded[: len(chosen)] = chosen
    return np.packbits(padded, bitorder="little").view(np.uint32)


def assert_same(got, expected_ids, expected):
    ids, probabilities = got
    assert sorted(ids.tolist()) == sorted(expected_ids.tolist())
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    of = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    np.testing.assert_allclose([of[i] for i in expected_ids.tolist()], expected, rtol=2e-5, atol=1e-9)


# --- the chain ---------------------------------------------------------------------------------------------------

SHARES = st.floats(0.05, 1.0)
CHAINS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.8, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 3, 40, 300, 5000]),
        "top_p": st.one_of(st.just(1.0), SHARES),
        "min_p": st.one_of(st.just(0.0), st.floats(0.001, 0.6)),
    },
    optional={
        "top_n_sigma": st.floats(0.1, 3.0),
        "typical_p": SHARES,
        "xtc_probability": st.sampled_from([0.5, 1.0]),
        "xtc_threshold": st.floats(0.01, 0.6),
        "min_keep": st.integers(0, 9),
        "dynatemp_range": st.floats(0.1, 2.0),
        "dynatemp_exponent": st.floats(0.2, 3.0),
        "repeat_penalty": st.floats(0.8, 1.5),
        "presence_penalty": st.floats(-1, 2),
        "frequency_penalty": st.floats(-1, 2),
        "repeat_last_n": st.sampled_from([-1, 0, 5, 64]),
        "dry_multiplier": st.floats(0.1, 2.0),
        "dry_allowed_length": st.integers(0, 4),
        "logit_bias": st.dictionaries(st.integers(0, 4), st.sampled_from([-INF, -2.5, 0.75, 4.0]), max_size=3),
        "banned_ids": st.lists(st.integers(0, 4), max_size=3),
    },
)


def tidy(p):
    """As the parameters arrive in C++: rounded to float32."""
    return {name: float(np.float32(value)) if isinstance(value, float) else value for name, value in p.items()}


@settings(max_examples=300)
@given(
    chain=CHAINS,
    size=st.sampled_from([6, 31, 32, 33, 200, 1025, 5003]),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.5, 3.0, 8.0]),
    history=st.lists(st.integers(0, 5), max_size=30),
    step=st.integers(0, 100),
)
def test_chain_is_that_of_the_definitions(chain, size, seed, scale, history, step):
    p = tidy(expectation(**chain, seed=seed))
    logits = row(size, seed, scale)
    ids, probabilities, margin = oracle.distribution(logits, p, history, step)
    assume(margin > 2e-5)
    assert_same(sampler(history, seed=seed, **chain).probabilities(logits, step), ids, probabilities)


@pytest.mark.parametrize(
    "chain",
    [
        {},
        dict(top_n_sigma=1.0),
        dict(typical_p=0.7),
        dict(top_p=0.9),
        dict(min_p=0.02),
        dict(xtc_probability=1.0, xtc_threshold=0.02),
        dict(dynatemp_range=0.5),
        dict(min_p=0.3, min_keep=30),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.05, 2.5])
def test_one_truncation_alone_on_a_large_vocabulary(chain, scale):
    """Without top_k: every one has a way of its own through a whole row. At 0.05 the row is nearly flat."""
    logits = row(40_001, 5, scale)
    p = tidy(expectation(**OFF | chain))
    ids, probabilities, margin = oracle.distribution(logits, p)
    assert margin > 2e-7
    assert_same(sampler(**OFF | chain).probabilities(logits, 0), ids, probabilities)


def test_defaults_are_those_of_llama_cpp():
    for name, value in oracle.DEFAULTS.items():
        if name not in ("temperature", "dry_sequence_breakers", "banned_ids", "allowed_ids", "stop_ids", "n_prompt"):
            assert getattr(_core.SamplingParams(), name) == pytest.approx(value), name
    assert _core.SamplingParams().temperature == 0


def test_equal_logits_are_taken_by_their_ids():
    flat = np.zeros(100, np.float32)
    assert sampler(temperature=0.0).sample(flat, 0) == 0
    assert sampler(**OFF | dict(top_k=7)).probabilities(flat, 0)[0].tolist() == list(range(7))
    assert sampler(**OFF | dict(top_p=0.25)).probabilities(flat, 0)[0].tolist() == list(range(25))
    ids, probabilities = sampler(**OFF | dict(min_p=1.0)).probabilities(flat, 0)
    assert ids.tolist() == list(range(100))
    assert probabilities.tolist() == [0.01] * 100


def test_typical_can_leave_out_the_most_probable():
    """Entropy 0.898 nats; surprises 0.51, 1.20 and 2.30: the second is nearest to it."""
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    assert sampler(**OFF | dict(typical_p=0.2)).probabilities(logits, 0)[0].tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-38, 1e-10, 1e10, 3e38])
def test_extreme_temperatures(temperature):
    logits = row(100)
    ids, probabilities = sampler(**OFF, temperature=temperature).probabilities(logits, 0)
    assert len(ids) == 100
    expected = np.full(100, 0.01) if temperature > 1 else np.eye(100)[logits.argmax()]
    np.testing.assert_allclose(probabilities[np.argsort(ids)], expected, atol=1e-8)


def test_dynamic_temperature_can_fall_to_greedy():
    """Entropy 0 (to rounding): the low end of the range, 0."""
    logits = np.array([0.0, 90.0, -90.0], np.float32)
    assert sampler(**OFF, dynatemp_range=2.0).sample(logits, 0) == 1


# --- changes of single logits ------------------------------------------------------------------------------------


@given(
    history=st.lists(st.integers(0, 3), max_size=40),
    breakers=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=2),
    allowed_length=st.integers(0, 4),
    last_n=st.sampled_from([-1, 0, 1, 7, 20]),
    split=st.integers(0, 40),
)
# Of two breakers that begin at the same token the longer one counts: 3 stands behind it, not 2 3.
@example(history=[2, 3, 0, 1, 2, 3], breakers=[[1], [1, 2]], allowed_length=1, last_n=-1, split=6)
def test_dry_against_brute_force(history, breakers, allowed_length, last_n, split):
    chain = dict(
        dry_multiplier=0.5, dry_allowed_length=allowed_length, dry_penalty_last_n=last_n, dry_sequence_breakers=breakers
    )
    logits = row(5, len(history), 1.0)
    ids, probabilities, _ = oracle.distribution(logits, expectation(**OFF | chain), history)
    tested = sampler(history[:split], **OFF | chain)
    for token in history[split:]:
        tested.accept(token)
    assert_same(tested.probabilities(logits, len(history)), ids, probabilities)


def test_dry_of_a_known_case():
    """ "1 2 3" stands before 4 and before 5; after "9 1 2 3" comes 5: n = 3 for 4, n = 4 for 5."""
    history = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3]
    logits = np.zeros(10, np.float32)
    _, probabilities = sampler(history, **OFF, dry_multiplier=0.8, dry_base=2.0).probabilities(logits, 0)
    assert np.log(probabilities[0] / probabilities[4]) == pytest.approx(0.8 * 2, abs=1e-6)
    assert np.log(probabilities[0] / probabilities[5]) == pytest.approx(0.8 * 4, abs=1e-6)
    assert probabilities[0] == probabilities[9] == probabilities[1]


def test_dry_of_an_endless_repetition_is_finite():
    history = [1] * 5000
    logits = np.zeros(4, np.float32)
    assert sampler(history, temperature=0.0, dry_multiplier=1e30).sample(logits, 0) == 0
    _, probabilities = sampler(history, **OFF, dry_multiplier=1e30).probabilities(logits, 0)
    assert probabilities.tolist() == [1 / 3, 0, 1 / 3, 1 / 3]


@given(
    history=st.lists(st.integers(0, 7), max_size=50),
    last_n=st.sampled_from([-1, 0, 1, 10, 64]),
    repeat=st.sampled_from([0.7, 1.0, 1.3]),
    presence=st.sampled_from([-0.5, 0.0, 1.0]),
    frequency=st.sampled_from([-0.25, 0.0, 0.5]),
    split=st.integers(0, 50),
    openai=st.booleans(),
)
def test_penalties_against_brute_force(history, last_n, repeat, presence, frequency, split, openai):
    chain = dict(
        repeat_penalty=repeat, presence_penalty=presence, frequency_penalty=frequency, repeat_last_n=last_n, top_k=0
    ) | dict(openai_penalties=openai)
    logits = row(8, len(history))
    ids, probabilities, _ = oracle.distribution(logits, expectation(**OFF | chain, n_prompt=split), history)
    tested = sampler(history[:split], **OFF | chain)
    for token in history[split:]:
        tested.accept(token)
    assert_same(tested.probabilities(logits, 0), ids, probabilities)


@given(data=st.data(), size=st.sampled_from([5, 32, 64, 100]))
def test_bans_masks_and_biases(data, size):
    some = st.lists(st.integers(0, size - 1), max_size=4)
    chain = dict(
        banned_ids=data.draw(some),
        allowed_ids=data.draw(some),
        stop_ids=data.draw(some),
        min_new_tokens=2,
        logit_bias={i: data.draw(st.sampled_from([-INF, -1.0, 2.0])) for i in data.draw(some)},
    )
    kind = data.draw(st.sampled_from(["none", "few", "most"]))
    allowed = None
    if kind != "none":
        allowed = np.full(size, kind == "most")
        allowed[data.draw(some)] ^= True
    step = data.draw(st.integers(0, 3))
    logits = row(size)
    x = oracle.adjusted(logits, expectation(**chain), (), step, allowed)
    mask = None if allowed is None else bits(allowed)
    for values in (OFF, dict(temperature=0.0), {}):
        tested = sampler(**values | chain)
        if not np.isfinite(x).any():
            with pytest.raises(_core.FixminError, match="no token is left"):
                tested.sample(logits, step, mask)
        elif values == OFF:
            ids, probabilities, _ = oracle.distribution(logits, expectation(**OFF | chain), (), step, allowed)
            assert_same(tested.probabilities(logits, step, mask), ids, probabilities)
        else:
            drawn = tested.sample(logits, step, mask)
            assert np.isfinite(x[drawn])
            assert values == {} or drawn == x.argmax()


def test_greedy_follows_biases_and_penalties():
    logits = np.array([1.0, 3.0, 2.0, -1.0], np.float32)
    assert sampler(temperature=0.0).sample(logits, 0) == 1
    assert sampler(temperature=0.0, banned_ids=[1]).sample(logits, 0) == 2
    assert sampler(temperature=0.0, logit_bias={3: 5.0}).sample(logits, 0) == 3
    assert sampler([1], temperature=0.0, presence_penalty=1.5).sample(logits, 0) == 2
    assert sampler([1, 2], temperature=0.0, repeat_penalty=4.0).sample(logits, 0) == 0
    assert sampler(temperature=0.0, stop_ids=[1], min_new_tokens=3).sample(logits, 2) == 2
    assert sampler(temperature=0.0, stop_ids=[1], min_new_tokens=3).sample(logits, 3) == 1
    ids, probabilities = sampler(temperature=0.0).probabilities(logits, 0)
    assert (ids.tolist(), probabilities.tolist()) == ([1], [1.0])


# --- draws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 500, 40_001])
@pytest.mark.parametrize("chain", [OFF, {}, dict(OFF, top_p=0.8)], ids=str)
def test_draw_is_the_token_that_the_random_number_of_the_step_stands_for(size, chain):
    logits = row(size, 1)
    for seed in (0, 2**64 - 1):
        tested = sampler(seed=seed, **chain)
        for step in [*range(60), 2**40]:
            ids, probabilities = tested.probabilities(logits, step)
            reached = np.cumsum(probabilities)
            number = oracle.draw_number(seed, step)
            assert np.abs(reached - number).min() > 1e-9
            assert tested.sample(logits, step) == ids[np.searchsorted(reached, number, "right")]


@pytest.mark.parametrize(
    "chain",
    [
        dict(OFF),
        dict(OFF, temperature=0.6),
        dict(),
        dict(OFF, top_p=0.6),
        dict(OFF, min_p=0.1, temperature=2.0),
        dict(OFF, typical_p=0.6),
        dict(OFF, top_n_sigma=1.5),
        dict(OFF, dynatemp_range=0.7),
        dict(OFF, repeat_penalty=1.5, presence_penalty=0.5),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(chain):
    """Chi-squared of 4000 draws, with a fixed seed; its mean would be dof, its deviation sqrt(2 dof)."""
    logits, history, n = row(24, 2, 1.5), [3, 3, 7], 4000
    ids, probabilities, _ = oracle.distribution(logits, tidy(expectation(**{"temperature": 1.0} | chain)), history)
    tested = sampler(history, seed=11, **chain)
    counts = np.bincount([tested.sample(logits, step) for step in range(n)], minlength=24)
    assert set(np.flatnonzero(counts)) <= set(ids.tolist())
    expected = n * probabilities
    chi2 = ((counts[ids] - expected) ** 2 / expected).sum()
    dof = len(ids) - 1
    assert chi2 < dof + 4 * math.sqrt(2 * dof) + 1


def test_xtc_happens_as_often_as_asked():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    tested = sampler(**OFF, xtc_probability=0.3, xtc_threshold=0.1, seed=4)
    left = [tested.probabilities(logits, step)[0].tolist() for step in range(2000)]
    cut = [ids == [2, 3] for ids in left]
    assert all(c or ids == [0, 1, 2, 3] for c, ids in zip(cut, left, strict=True))
    assert cut == [oracle.xtc_number(4, step) < float(np.float32(0.3)) for step in range(2000)]
    assert abs(sum(cut) - 600) < 4 * math.sqrt(2000 * 0.3 * 0.7)


def test_seeds_and_steps_are_independent():
    """Pairs of draws from 8 equally probable tokens that follow each other, over steps and over seeds."""
    logits = np.zeros(8, np.float32)
    by_step = [sampler(**OFF, seed=5).sample(logits, step) for step in range(6400)]
    by_seed = [sampler(**OFF, seed=seed).sample(logits, 0) for seed in range(6400)]
    for draws in (by_step, by_seed):
        pairs = np.zeros((8, 8))
        np.add.at(pairs, (draws[:-1], draws[1:]), 1)
        chi2 = ((pairs - 6399 / 64) ** 2 / (6399 / 64)).sum()
        assert 63 - 4 * math.sqrt(126) < chi2 < 63 + 4 * math.sqrt(126)


# --- mirostat ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_mirostat_against_a_loop_in_float64(version, temperature):
    values = dict(mirostat=version, mirostat_tau=3.0, mirostat_eta=0.2, temperature=temperature)
    p = tidy(expectation(**values))
    tested = sampler(seed=3, **values)
    mu, compared = 6.0, 0
    assert tested.mirostat_mu == mu
    for step in range(80):
        logits = row(3000, step, 2.0)
        order = np.lexsort((np.arange(3000), -logits))
        x = logits[order].astype(np.float64)
        ids, probabilities = tested.probabilities(logits, step)
        n, margin = oracle.mirostat_keep(x, p, mu)
        if margin > 1e-3:
            compared += 1
            assert_same((ids, probabilities), order[:n], oracle.softmax(x[:n] / p["temperature"]))
        drawn = tested.sample(logits, step)
        assert tested.mirostat_mu == pytest.approx(mu, rel=1e-6)
        tested.accept(drawn)
        surprise = -math.log2(probabilities[ids.tolist().index(drawn)])
        mu -= p["mirostat_eta"] * (surprise - 3.0)
        assert tested.mirostat_mu == pytest.approx(mu, rel=1e-4)
        mu = tested.mirostat_mu
    assert compared > 60


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_reaches_its_target(version):
    tested = sampler(mirostat=version, mirostat_tau=4.0, mirostat_eta=0.1, seed=1)
    surprises = []
    for step in range(1500):
        logits = row(1000, step, 1.5)
        ids, probabilities = tested.probabilities(logits, step)
        drawn = tested.sample(logits, step)
        surprises.append(-math.log2(probabilities[ids.tolist().index(drawn)]))
        tested.accept(drawn)
    assert np.mean(surprises[300:]) == pytest.approx(4.0, abs=0.15)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("logits", [np.zeros(50), np.array([1.0]), np.array([-INF, 2.0]), np.array([0, 1e4, -1e4])])
def test_mirostat_on_odd_rows(version, logits):
    tested = sampler(mirostat=version)
    drawn = tested.sample(logits.astype(np.float32), 0)
    assert np.isfinite(logits[drawn])
    tested.accept(drawn)
    assert math.isfinite(tested.mirostat_mu)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("tau", "eta"), [(3e38, 0.1), (0.0, 3e38), (3e38, 3e38), (1.0, 1e6)])
def test_mirostat_with_absurd_settings(version, tau, eta):
    tested = sampler(mirostat=version, mirostat_tau=tau, mirostat_eta=eta)
    for step in range(6):
        tested.accept(tested.sample(row(50, step), step))
        assert math.isfinite(tested.mirostat_mu)


@pytest.mark.parametrize(
    "values",
    [
        dict(top_n_sigma=3e38),
        dict(top_n_sigma=1e-38),
        dict(typical_p=1e-30),
        dict(top_p=1e-30),
        dict(min_p=1e-38),
        dict(xtc_probability=1.0, xtc_threshold=0.0),
        dict(dynatemp_range=3e38, dynatemp_exponent=3e38),
        dict(dynatemp_range=3e38, dynatemp_exponent=0.0),
        dict(mirostat=1),
        dict(mirostat=2),
        dict(min_keep=1000),
    ],
    ids=str,
)
@pytest.mark.parametrize("logits", [[3e38, -3e38, 0.0], [0.0], [-INF, 1.0, -INF], [0.0, 0.0], [1e-40, 0.0, -1e-40]])
def test_extremes_draw_a_token_that_there_is(values, logits):
    logits = np.array(logits, np.float32)
    for base in ({}, OFF):
        tested = sampler(**base | values)
        for step in range(5):
            ids, probabilities = tested.probabilities(logits, step)
            assert probabilities.sum() == pytest.approx(1)
            drawn = tested.sample(logits, step)
            assert drawn in ids.tolist()
            assert logits[drawn] > -INF
            tested.accept(drawn)


# --- what is remembered ------------------------------------------------------------------------------------------


def test_only_accept_changes_what_comes_next():
    logits = row(200)
    values = dict(seed=9, mirostat=2, repeat_penalty=1.3, dry_multiplier=0.8)
    asked, plain = sampler([1, 2, 1], **values), sampler([1, 2, 1], **values)
    for step in range(20):
        for other in (7, step, step + 1):
            asked.sample(row(200, other), other)
            asked.probabilities(logits, other)
        drawn = plain.sample(logits, step)
        assert asked.sample(logits, step) == drawn
        asked.accept(drawn)
        plain.accept(drawn)
        assert asked.mirostat_mu == plain.mirostat_mu


def test_mirostat_does_not_learn_from_tokens_that_it_did_not_draw():
    tested = sampler(mirostat=2)
    drawn = tested.sample(row(100), 0)
    tested.accept((drawn + 1) % 100)
    assert tested.mirostat_mu == 10
    tested.accept(drawn)
    assert tested.mirostat_mu == 10


# --- the same on every instruction set ---------------------------------------------------------------------------

SETTINGS = [
    dict(temperature=0.0),
    dict(OFF),
    dict(OFF, temperature=0.7),
    dict(),
    dict(OFF, top_p=0.9),
    dict(OFF, typical_p=0.9),
    dict(OFF, top_n_sigma=1.0, dynatemp_range=0.5),
    dict(OFF, min_p=0.02, xtc_probability=0.5),
    dict(mirostat=1),
    dict(mirostat=2),
    dict(repeat_penalty=1.2, frequency_penalty=0.1, dry_multiplier=0.8),
]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_same_tokens_and_bits_on_every_isa(values):
    results = set()
    for isa in ISAS:
        tested = sampler([1, 2, 3], isa, seed=2**63 + 1, **values)
        tokens, shares = [], b""
        for step in range(12):
            logits = row(20_011, step, 2.0)
            shares += b"".join(part.tobytes() for part in tested.probabilities(logits, step))
            tokens.append(tested.sample(logits, step))
            tested.accept(tokens[-1])
        results.add((tuple(tokens), shares, tested.mirostat_mu))
    assert len(results) == 1


# --- log-probabilities -------------------------------------------------------------------------------------------


LOWEST = float(np.finfo(np.float32).min)


def expected_logprobs(logits):
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


@pytest.mark.parametrize("size", [1, 5, 33, 1000, 40_001])
@pytest.mark.parametrize("k", [0, 1, 20, 1024])
def test_top_logprobs(size, k):
    logits = np.round(row(size, size), 2)  # with ties
    logprobs = expected_logprobs(logits)
    order = np.lexsort((np.arange(size), -logits))
    for chosen in {0, size - 1, size // 2, int(order[0])}:
        results = [_core.top_logprobs(logits, k, chosen, isa) for isa in ISAS]
        logprob, rank, ids, values = results[0]
        assert logprob == pytest.approx(logprobs[chosen], abs=1e-5)
        assert order[rank - 1] == chosen
        assert ids.tolist() == order[:k].tolist()
        np.testing.assert_allclose(values, logprobs[order[:k]], atol=1e-5)
        for other in results:
            assert other[:2] == (logprob, rank)
            assert [part.tobytes() for part in other[2:]] == [ids.tobytes(), values.tobytes()]


def test_top_logprobs_are_those_of_score(tmp_path):
    engine = _core.Engine(str(make_model(tmp_path / "model.gguf")))
    ids = np.random.default_rng(0).integers(0, 77, 20).astype(np.uint32)
    logits, scores = engine.logits(ids), score(engine, ids)
    assert [_core.top_logprobs(logits[t], 3, int(ids[t + 1]))[0] for t in range(19)] == scores.tolist()


def test_top_logprobs_with_impossible_tokens():
    logits = np.array([0.0, -INF, 1.0, -INF], np.float32)
    logprob, rank, ids, values = _core.top_logprobs(logits, 4, 3)
    assert (logprob, rank, ids.tolist()) == (LOWEST, 4, [2, 0])
    np.testing.assert_allclose(np.exp(values).sum(), 1, atol=1e-6)


def test_top_logprobs_are_finite():
    """JSON has no infinity."""
    logits = np.array([3e38, -3e38, 0.0, 1.0], np.float32)
    logprob, rank, ids, values = _core.top_logprobs(logits, 4, 1)
    assert (logprob, rank, ids.tolist()) == (LOWEST, 4, [0, 3, 2, 1])
    assert values.tolist() == [0.0, float(-logits[0]), float(-logits[0]), LOWEST]


@pytest.mark.parametrize("logits", [[NAN, 0.0], [0.0, INF], [-INF, -INF]])
def test_top_logprobs_of_what_is_not_finite(logits):
    with pytest.raises(_core.FixminError, match="not finite"):
        _core.top_logprobs(np.array(logits, np.float32), 1, 0)


def test_top_logprobs_misused():
    with pytest.raises(ValueError, match="k is 1025"):
        _core.top_logprobs(row(10), 1025, 0)
    with pytest.raises(ValueError, match=r"chosen is 10.*10"):
        _core.top_logprobs(row(10), 1, 10)
    with pytest.raises(ValueError, match="dimension"):
        _core.top_logprobs(np.zeros((2, 2), np.float32), 1, 0)


# --- misuse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("values", [dict(temperature=0.0), {}, OFF, dict(banned_ids=[1]), dict(mirostat=2)], ids=str)
def test_logits_that_are_not_finite(bad, values):
    logits = row(100)
    logits[1] = bad
    with pytest.raises(_core.FixminError, match="the model's logits are not finite"):
        sampler(**values).sample(logits, 0)


def test_biases_that_overflow():
    with pytest.raises(_core.FixminError, match="after logit_bias and penalties"):
        sampler(logit_bias={0: 3e38}).sample(np.full(5, 3e38, np.float32), 0)


@pytest.mark.parametrize("values", [dict(temperature=0.0), {}, OFF, dict(mirostat=1)], ids=str)
def test_nothing_left_to_draw(values):
    logits = row(40)
    with pytest.raises(_core.FixminError, match="no token is left to draw"):
        sampler(**values).sample(logits, 0, np.zeros(2, np.uint32))
    with pytest.raises(_core.FixminError, match="no token is left to draw"):
        sampler(**values, allowed_ids=[3], banned_ids=[3]).sample(logits, 0)
    with pytest.raises(_core.FixminError, match="no token is left to draw"):
        sampler(**values).probabilities(np.full(40, -INF, np.float32), 0)


@pytest.mark.parametrize(
    "values", [dict(banned_ids=[50]), dict(allowed_ids=[1, 50]), dict(stop_ids=[50]), dict(logit_bias={50: 1.0})]
)
def test_ids_beyond_the_vocabulary(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} has token id 50.*size 50"):
        sampler(**values).sample(row(50), 0)


def test_history_beyond_the_vocabulary_is_ignored():
    """A draft of another vocabulary must not write outside the row."""
    tested = sampler([2**32 - 1, 50, 2**32 - 1, 50], repeat_penalty=2.0, dry_multiplier=1.0, dry_allowed_length=1)
    tested.accept(2**32 - 1)
    assert 0 <= tested.sample(row(50), 0) < 50


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [NAN, INF, -1.0]),
        ("dynatemp_range", [NAN, INF, -1.0]),
        ("dynatemp_exponent", [NAN, INF, -1.0]),
        ("top_n_sigma", [NAN, INF]),
        ("typical_p", [NAN, 0.0, 1.5]),
        ("top_p", [NAN, 0.0, 1.5, -0.1]),
        ("min_p", [NAN, 1.5, -0.1]),
        ("xtc_probability", [NAN, 1.5, -0.1]),
        ("xtc_threshold", [NAN, 1.5, -0.1]),
        ("mirostat", [3]),
        ("mirostat_tau", [NAN, INF, -1.0]),
        ("mirostat_eta", [NAN, INF, -1.0]),
        ("repeat_penalty", [NAN, INF, 0.0, -1.0]),
        ("frequency_penalty", [NAN, INF]),
        ("presence_penalty", [NAN, -INF]),
        ("dry_multiplier", [NAN, INF, -1.0]),
        ("dry_base", [NAN, INF, 0.9]),
        ("logit_bias", [{0: NAN}, {0: INF}]),
    ],
)
def test_parameters_out_of_range(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}.* must be"):
            sampler(**{name: value})


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1), (0,)])
def test_masks_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"allowed must have shape \[2\]"):
        sampler().sample(row(40), 0, np.ones(shape, np.uint32))


def test_logits_of_the_wrong_shape():
    with pytest.raises(ValueError, match="dimension"):
        sampler().sample(np.zeros((2, 3), np.float32), 0)
    with pytest.raises(ValueError, match="no logits"):
        sampler().sample(np.zeros(0, np.float32), 0)
    with pytest.raises(ValueError, match="instruction set"):
        sampler(isa="mmx")
