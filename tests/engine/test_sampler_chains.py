"""Whole chains of the sampler over several steps against the definitions in float64 (sampling_oracle.py).

Parameters, masks, prompts and rows are drawn. What is compared: the tokens that are left, their probabilities and
order, and the token that the documented random number of the step stands for.
"""

import math

import numpy as np
import pytest
import sampling_oracle as oracle
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from fixmin_cpp import _core

INF = math.inf
some_ids = st.lists(st.integers(0, 40), max_size=4)
shares = st.floats(0.03125, 1.0, width=32)
flat = st.sampled_from
BIASES = flat([-INF, -2.5, 0.75, 4.0])

CHAIN = {
    "top_n_sigma": st.floats(0.125, 3.0, width=32),
    "top_k": flat([0, 1, 3, 40, 300]),
    "typical_p": shares,
    "top_p": shares,
    "min_p": st.floats(0.0, 0.625, width=32),
    "xtc_probability": st.floats(0.0, 1.0, width=32),
    "xtc_threshold": st.floats(0.0, 0.625, width=32),
    "min_keep": st.integers(0, 12),
}
WARMTH = {
    "dynatemp_range": st.floats(0.0, 2.0, width=32),
    "dynatemp_exponent": st.floats(0.25, 3.0, width=32),
}
SINGLE = {
    "repeat_penalty": st.floats(0.75, 1.5, width=32),
    "presence_penalty": st.floats(-1, 2, width=32),
    "frequency_penalty": st.floats(-1, 2, width=32),
    "repeat_last_n": flat([-1, 0, 1, 5, 64]),
    "openai_penalties": st.booleans(),
    "dry_multiplier": st.floats(0.0, 2.0, width=32),
    "dry_base": st.floats(1.0, 2.0, width=32),
    "dry_allowed_length": st.integers(0, 4),
    "dry_penalty_last_n": flat([-1, 0, 3, 12]),
    "dry_sequence_breakers": st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=2),
    # Often of tokens that came up before: what a penalty makes of a logit depends on what a bias made of it.
    "logit_bias": st.dictionaries(st.one_of(st.integers(0, 5), st.integers(0, 40)), BIASES, max_size=6),
    "banned_ids": some_ids,
    "allowed_ids": st.one_of(st.just([]), st.lists(st.integers(0, 40), min_size=5, max_size=30)),
    "stop_ids": some_ids,
    "min_new_tokens": st.integers(0, 3),
}
MIROSTAT = {
    "mirostat": flat([1, 2]),
    "mirostat_tau": st.floats(0.0, 8.0, width=32),
    "mirostat_eta": st.floats(0.0, 1.0, width=32),
}
temperatures = flat([0.25, 0.8125, 1.0, 1.75])
bases = flat([{}, dict(top_k=0, top_p=1.0, min_p=0.0)])  # what is on by default, and nothing


def row(size, seed, scale):
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def packed(chosen):
    """A bool [V] as the bit set that the sampler takes."""
    padded = np.zeros(-len(chosen) % 32 + len(chosen), bool)
    padded[: len(chosen)] = chosen
    return np.packbits(padded, bitorder="little").view(np.uint32)


@st.composite
def masks(draw, size):
    """None, or what a grammar allows: few tokens, or all but few."""
    kind = draw(flat(["none", "none", "none", "few", "most"]))
    if kind == "none":
        return None
    mask = np.full(size, kind == "most")
    mask[draw(st.lists(st.integers(0, 40), min_size=8 * (kind == "few"), max_size=30))] ^= True
    return mask


def left(p, logits, history, step, mask, mu):
    """(ids, probabilities, margin) most probable first, of what may be drawn; no ids: nothing may."""
    x = oracle.adjusted(logits, p, history, step, mask)
    if not (x > -INF).any():
        return np.array([], int), np.array([]), INF
    if p["temperature"] == 0:
        best = int(x.argmax())
        others = np.delete(x, best)
        return np.array([best]), np.ones(1), float(x[best] - others.max()) if len(others) else INF
    if not p["mirostat"]:
        return oracle.distribution(logits, p, history, step, mask)
    ids = np.flatnonzero(x > -INF)
    ids = ids[np.lexsort((ids, -x[ids]))]
    n, margin = oracle.mirostat_keep(x[ids], p, mu, len(logits))
    return ids[:n], oracle.softmax(x[ids[:n]] / p["temperature"]), margin


def drawing_order(p, ids):
    """docs/sampling.md, "Random numbers": the most probable first where top_k chose them, else by ids.

    None: it may be either, as min_keep chooses only where too few are left.
    """
    if (p["top_k"] > 0 and not p["mirostat"]) or p["mirostat"] == 1 or len(ids) == 1:
        return ids.tolist()
    return None if p["min_keep"] > 1 and not p["mirostat"] else sorted(ids.tolist())


def follow(chain, size, seed, scale, prompt, data, n_steps=3):
    """Some steps of a generation; how many were compared."""
    prompt = [i % size for i in prompt]
    p = oracle.DEFAULTS | chain | {"seed": seed, "n_prompt": len(prompt)}
    tested = _core.Sampler(_core.SamplingParams(**chain, seed=seed), prompt, None)
    history, mu = list(prompt), 2.0 * p["mirostat_tau"]
    for step in range(n_steps):
        logits, mask = row(size, seed + step, scale), data.draw(masks(size))
        arguments = (logits, step) if mask is None else (logits, step, packed(mask))
        ids, probabilities, margin = left(p, logits, history, step, mask, mu)
        if not len(ids):
            with pytest.raises(_core.FixminError, match="no token is left"):
                tested.sample(*arguments)
            return event("nothing is left")
        assume(margin > (1e-3 if p["mirostat"] else 5e-5))
        got_ids, got = tested.probabilities(*arguments)
        assert sorted(got_ids.tolist()) == sorted(ids.tolist())
        of = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
        np.testing.assert_allclose(got, [of[i] for i in got_ids.tolist()], rtol=1e-4, atol=1e-9)
        order = drawing_order(p, ids)
        if order is not None and len(set(probabilities.tolist())) == len(ids):
            assert got_ids.tolist() == order
        # The first token at which the running sum exceeds the number.
        reached = np.cumsum([of[i] for i in got_ids.tolist()])
        number = oracle.draw_number(seed, step)
        assume(len(ids) == 1 or np.abs(reached[:-1] - number).min() > 1e-5)
        drawn = int(got_ids[min(int(np.searchsorted(reached, number, "right")), len(ids) - 1)])
        assert tested.sample(*arguments) == drawn
        tested.accept(drawn)
        history.append(drawn)
        mu -= p["mirostat_eta"] * (-math.log2(of[drawn]) - p["mirostat_tau"])
        if p["mirostat"]:
            assert tested.mirostat_mu == pytest.approx(mu, rel=1e-3, abs=1e-3)
            mu = tested.mirostat_mu
    return event("compared")


sizes = flat([41, 64, 65, 300, 1025])
seeds = st.integers(0, 2**64 - 4)
scales = flat([0.5, 3.0, 8.0])
prompts = st.lists(st.integers(0, 5), max_size=24)


@settings(max_examples=300)
@given(
    chain=st.fixed_dictionaries({"temperature": temperatures}, optional=SINGLE | WARMTH),
    base=bases,
    truncations=st.one_of(*(st.lists(flat(sorted(CHAIN)), max_size=n, unique=True) for n in (0, 2, 5))),
    size=sizes,
    seed=seeds,
    scale=scales,
    prompt=prompts,
    data=st.data(),
)
def test_a_chain_is_that_of_the_definitions(chain, base, truncations, size, seed, scale, prompt, data):
    drawn = {name: data.draw(CHAIN[name], label=name) for name in truncations}
    follow(chain | base | drawn, size, seed, scale, prompt, data)


@settings(max_examples=200)
@given(
    chain=st.fixed_dictionaries({"temperature": temperatures} | MIROSTAT, optional=SINGLE),
    others=st.fixed_dictionaries({}, optional=CHAIN | WARMTH),
    size=sizes,
    seed=seeds,
    scale=flat([1.0, 2.0, 4.0]),
    prompt=prompts,
    data=st.data(),
)
def test_mirostat_takes_the_place_of_truncations(chain, others, size, seed, scale, prompt, data):
    """What narrows the choice otherwise has no effect."""
    follow(chain | others, size, seed, scale, prompt, data)


@settings(max_examples=100)
@given(
    chain=st.fixed_dictionaries({"temperature": st.just(0.0)}, optional=SINGLE),
    others=st.fixed_dictionaries({}, optional=CHAIN | WARMTH),
    size=sizes,
    seed=seeds,
    prompt=prompts,
    data=st.data(),
)
def test_without_a_temperature_the_most_probable_is_taken(chain, others, size, seed, prompt, data):
    follow(chain | others, size, seed, 3.0, prompt, data)
