"""Several completions of a prompt, and a seed for each prompt: every one is what it is alone."""

import asyncio
import dataclasses

import numpy as np
import pytest

from fixmin_cpp import Model
from fixmin_cpp.errors import ArgumentError, ArgumentTypeError
from fixmin_cpp.generation_options import candidate_seed

SETTINGS = {"max_new_tokens": 12, "temperature": 1.2, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
MASK = 2**64 - 1


def splitmix64(seed, index):
    """Number `index` of the sequence (Steele, Lea, Flood 2014), 64 bits."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def facts(completion):
    """All but the times."""
    return dataclasses.replace(completion, timings=None)


def mean_logprob(model, prompt, completion):
    """By the scores of prompt and answer together."""
    ids = model.encode(prompt) + completion.token_ids
    return float(np.mean(model.score(ids).logprobs[-len(completion.token_ids) :].astype(np.float64)))


def test_seeds_of_candidates():
    # The first numbers of the sequence of 1234567, as published with the reference implementation.
    assert [splitmix64(1234567, i) for i in range(2)] == [6457827717110365317, 3203168211198807973]
    for seed in (0, 7, MASK):
        assert [candidate_seed(seed, i) for i in range(4)] == [
            seed,
            *(splitmix64(seed, 8 * i + 7) >> 11 for i in (1, 2, 3)),
        ]


def test_n_completions_are_those_of_their_seeds(model):
    got = model.generate("the cat", n=4, seed=7, **SETTINGS)
    assert [c.seed for c in got.candidates] == [candidate_seed(7, i) for i in range(4)]
    assert facts(got) == dataclasses.replace(facts(got.candidates[0]), candidates=got.candidates)
    for candidate in got.candidates:
        assert facts(candidate) == facts(model.generate("the cat", seed=candidate.seed, **SETTINGS))
    assert len({tuple(c.token_ids) for c in got.candidates}) == 4
    assert model.generate("the cat", seed=7, **SETTINGS).candidates is None


def test_n_of_a_list(model_path):
    prompts = ["the cat", "a", "x" * 40]
    with Model(model_path, n_kv=64, n_batch=16, n_parallel=3) as model:
        got = model.generate(prompts, n=3, seed=[5, 6, 2**64 - 1], **SETTINGS)
        for prompt, seed, completion in zip(prompts, (5, 6, 2**64 - 1), got, strict=True):
            assert [c.seed for c in completion.candidates] == [candidate_seed(seed, i) for i in range(3)]
            for candidate in completion.candidates:
                assert facts(candidate) == facts(model.generate(prompt, seed=candidate.seed, **SETTINGS))
        later = asyncio.run(model.agenerate(prompts, n=3, seed=[5, 6, 2**64 - 1], **SETTINGS))
        assert list(map(facts, later[0].candidates)) == list(map(facts, got[0].candidates))
        assert [c.token_ids for c in later] == [c.token_ids for c in got]


def test_random_seeds_are_reported(model):
    first, second = (model.generate(["a", "a"], n=2, **SETTINGS) for _ in range(2))
    seeds = [c.seed for completion in first + second for c in completion.candidates]
    assert len(set(seeds)) == 8


def test_the_prompt_is_read_once(model_path):
    with Model(model_path) as model:
        # A whole block and the token that is always computed: the same whether the first one still runs or has ended.
        ids = np.random.default_rng(0).integers(0, 200, 33).tolist()
        completion = model.generate(ids, n=4, seed=1, **SETTINGS)
        assert [c.timings.n_cached for c in completion.candidates] == [0, 32, 32, 32]
        apart = model.generate(ids, n=4, seed=1, prefix_cache=False, **SETTINGS)
        assert [c.timings.n_cached for c in apart.candidates] == [0, 0, 0, 0]
        assert [c.token_ids for c in apart.candidates] == [c.token_ids for c in completion.candidates]


@pytest.mark.parametrize("n", [1, 2])
def test_best_of_gives_the_most_probable(model, n):
    everyone = model.generate("the cat", n=6, seed=3, **SETTINGS).candidates
    means = [mean_logprob(model, "the cat", c) for c in everyone]
    order = sorted(range(6), key=lambda i: -means[i])
    assert order[:n] != list(range(n))  # else this test would show nothing
    best = model.generate("the cat", n=n, best_of=6, seed=3, **SETTINGS)
    chosen = best.candidates if n > 1 else [best]
    assert list(map(facts, chosen)) == [facts(everyone[i]) for i in order[:n]]
    assert best.logprobs is None
    assert facts(model.generate("the cat", best_of=2, n=2, seed=3, **SETTINGS).candidates[0]) == facts(everyone[0])


def test_logprobs_of_candidates(model):
    options = SETTINGS | {"seed": 3, "logprobs": 1, "prompt_logprobs": 2}
    got = model.generate("the cat", n=3, **options)
    for candidate in got.candidates:
        alone = model.generate("the cat", **(options | {"seed": candidate.seed}))
        assert candidate.logprobs == alone.logprobs
        assert candidate.prompt_logprobs == alone.prompt_logprobs
    assert got.candidates[1].prompt_logprobs
    best = model.generate("the cat", best_of=5, **options)
    assert [t.token_id for t in best.logprobs] == best.token_ids
    assert best.prompt_logprobs == got.prompt_logprobs


def test_an_empty_completion_is_the_worst(model):
    """Nothing can be said of how probable no token is."""
    first = model.generate("the cat", seed=3, **SETTINGS)
    options = SETTINGS | {"stop_ids": [first.token_ids[0]], "seed": 3}
    everyone = model.generate("the cat", n=4, **options).candidates
    assert everyone[0].token_ids == []
    assert any(c.token_ids for c in everyone)
    assert model.generate("the cat", n=3, best_of=4, **options).candidates[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ArgumentError, "n must be between 1 and 1024, got 0"),
        ({"n": True}, ArgumentTypeError, "n must be an integer, got True"),
        ({"n": 2.0}, ArgumentTypeError, "n must be an integer, got float"),
        ({"n": 2}, ArgumentError, "n=2 needs a temperature above 0"),
        ({"best_of": 3}, ArgumentError, "best_of=3 needs a temperature above 0"),
        ({"n": 3, "best_of": 2, "temperature": 1.0}, ArgumentError, "best_of is 2, below n, which is 3"),
        ({"best_of": 1025}, ArgumentError, "best_of must be between 1 and 1024"),
        ({"seed": [1]}, ArgumentTypeError, "seed must be an integer for a single prompt"),
        ({"seed": ["1"]}, ArgumentTypeError, r"seed\[0\] must be an integer, got str '1'"),
        ({"seed": [1, -2]}, ArgumentError, r"seed\[1\] must be between 0 and .*, got -2"),
        ({"seed": "12"}, ArgumentTypeError, "seed must be an integer, got str '12'"),
    ],
)
def test_wrong_counts_and_seeds(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.generate("a", **arguments)
    with pytest.raises(error, match=message):
        asyncio.run(model.agenerate("a", **arguments))


def test_seeds_for_a_list(model):
    got = model.generate(["a", "a"], seed=np.array([1, 2]), **SETTINGS)
    assert [c.seed for c in got] == [1, 2]
    with pytest.raises(ArgumentError, match="seed has 3 entries, but there are 2 prompts"):
        model.generate(["a", "b"], seed=(1, 2, 3))


@pytest.mark.parametrize("name", ["n", "best_of", "on_token"])
def test_a_stream_is_one_completion(model, name):
    for call in (model.stream, model.astream):
        with pytest.raises(ArgumentTypeError, match=f"{name} is an argument of Model.generate"):
            call("a", **{name: 2})
