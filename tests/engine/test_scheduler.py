"""Many requests at once: each gives what it gives alone, whatever runs beside it, and nothing is lost or kept."""

import threading
import time

import numpy as np
import pytest
from engine_runs import generate, score
from gguf_factory import make_model

from fixmin_cpp import _core

N_CTX = 160
VOCAB = 77


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return str(
        make_model(
            folder / "m.gguf",
            context_length=N_CTX,
            vocab_size=VOCAB,
            weight_type="Q8_0",
            embedding_length=64,
            head_count=4,
            head_count_kv=2,
            feed_forward_length=96,
            seed=3,
        )
    )


def sampling(**settings):
    return _core.SamplingParams(**settings)


def prompts(n, seed=0, longest=90):
    """Some share their beginnings, some are the same, some repeat themselves."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, VOCAB, longest)
    made = []
    for i in range(n):
        length = int(rng.integers(1, longest))
        kind = i % 4
        if kind == 0:
            ids = base[:length]
        elif kind == 1:
            ids = np.concatenate([base[: length // 2], rng.integers(0, VOCAB, length - length // 2)])
        elif kind == 2:
            ids = np.resize(rng.integers(0, VOCAB, 5), length)
        else:
            ids = rng.integers(0, VOCAB, length)
        made.append(ids.astype(np.uint32))
    return made


def wait(request, timeout=60):
    assert request.wait(2**62, timeout), "the request did not end"
    return request


def outcome(request):
    ids, logprobs, ended = wait(request).read(0)
    assert ended
    return ids, logprobs, request.prompt_logprobs().tobytes()


def settings_of(i):
    """Greedy, and sampled with a seed of its own."""
    return dict(temperature=0.0 if i % 2 else 1.5, seed=i, max_new_tokens=int(5 + 7 * i % 40))


@pytest.fixture(scope="module")
def alone(path):
    """What every request gives with the engine to itself and nothing remembered."""
    results = []
    for i, ids in enumerate(prompts(24)):
        engine = _core.Engine(path, n_threads=1)
        request = engine.submit(ids, sampling(**settings_of(i)), prefix_cache=False, n_logprobs=3, n_prompt_logprobs=0)
        results.append(outcome(request))
    return results


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(n_batch=7, n_threads=2),
        dict(n_batch=33, n_parallel=5),
        dict(n_kv=N_CTX, n_threads=3),
        dict(n_kv=N_CTX + 64, n_batch=20),
        dict(kv_type="f16", n_parallel=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_draft", [0, 6])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_together_as_alone(path, alone, options, n_draft, prefix_cache):
    engine = _core.Engine(path, **options)
    for scored in (False, True):  # scoring computes the whole prompt, generating alone may use what is known
        requests = [
            engine.submit(
                ids,
                sampling(**settings_of(i)),
                prefix_cache=prefix_cache,
                n_draft=n_draft,
                n_logprobs=3,
                n_prompt_logprobs=0 if scored else -1,
            )
            for i, ids in enumerate(prompts(24))
        ]
        for i, request in enumerate(requests):
            ids, logprobs, scores = outcome(request)
            assert ids == alone[i][0], (i, scored)
            assert logprobs == alone[i][1], (i, scored)
            assert scores == (alone[i][2] if scored else b"")
    assert_nothing_is_kept(engine)


def assert_nothing_is_kept(engine):
    engine.clear_prefix_cache()
    engine.clear_prefix_cache()  # the figures are those after the first
    stats = engine.stats()
    assert stats["n_running"] == stats["n_waiting"] == 0
    assert stats["n_free_blocks"] == stats["n_blocks"]


def test_bits_of_logits_beside_other_requests(path):
    """Every row of the logits, not only what was drawn from them."""
    ids = prompts(4)[1]
    expected = _core.Engine(path, n_threads=1).logits(ids).tobytes()
    engine = _core.Engine(path, n_batch=48)
    others = [engine.submit(p, sampling(max_new_tokens=60)) for p in prompts(12, seed=1)]
    for _ in range(10):
        assert engine.logits(ids).tobytes() == expected
        assert engine.logits(ids, last=True).tobytes() == expected[-4 * VOCAB :]
    for request in others:
        wait(request)


def test_a_full_cache_sends_requests_back_and_loses_none(path):
    engine = _core.Engine(path, n_kv=N_CTX)  # 5 blocks
    requests = [engine.submit(p[:10], sampling(max_new_tokens=100)) for p in prompts(6, seed=2, longest=40)]
    free = [generate(_core.Engine(path), p[:10], sampling(max_new_tokens=100)) for p in prompts(6, seed=2, longest=40)]
    for request, expected in zip(requests, free, strict=True):
        assert outcome(request)[0] == expected
    assert engine.stats()["n_preempted"] > 0
    assert_nothing_is_kept(engine)


def test_prefix_cache_finds_every_token_but_the_last(path):
    engine = _core.Engine(path)
    ids = prompts(4, longest=100)[3]
    ids = np.resize(ids, 75).astype(np.uint32)
    first = wait(engine.submit(ids, sampling(max_new_tokens=1))).result()
    again = wait(engine.submit(ids, sampling(max_new_tokens=1))).result()
    longer = np.concatenate([ids, [5]]).astype(np.uint32)
    more = wait(engine.submit(longer, sampling(max_new_tokens=1))).result()
    other = longer.copy()
    other[40] = (other[40] + 1) % VOCAB
    part = wait(engine.submit(other, sampling(max_new_tokens=1))).result()
    assert [r["n_cached"] for r in (first, again, more, part)] == [0, 74, 75, 40]
    off = wait(engine.submit(ids, sampling(max_new_tokens=1), prefix_cache=False)).result()
    assert off["n_cached"] == 0
    stats = engine.stats()
    assert stats["n_prompt_tokens"] == 75 + 75 + 76 + 76
    assert stats["n_cached_prompt_tokens"] == 74 + 75 + 40


def test_a_known_prompt_in_the_smallest_cache(path):
    """The block with its last tokens is there to be copied, and has to give way to the copy."""
    engine = _core.Engine(path, n_kv=N_CTX)  # 5 blocks
    ids = np.resize(prompts(4)[3], N_CTX - 10).astype(np.uint32)
    first = outcome(engine.submit(ids, sampling(max_new_tokens=5)))
    for _ in range(2):
        again = wait(engine.submit(ids, sampling(max_new_tokens=5)), 30)
        assert outcome(again) == first
        assert again.result()["n_cached"] == 4 * 32
    assert_nothing_is_kept(engine)


def test_a_block_that_is_copied_and_given_away_in_one_step(path):
    """A request takes the beginning of a known block; the one after it, in the same step, takes the block itself."""

    class Waits(EveryThird):
        held, let_go = threading.Event(), threading.Event()

        def allowed(self):
            self.held.set()
            assert self.let_go.wait(60)
            return super().allowed()

    rng = np.random.default_rng(8)
    known, other, mine = (rng.integers(0, VOCAB, n).astype(np.uint32) for n in (39, 60, 4))
    asked = [np.concatenate([known[:36], mine]), other]
    fresh = _core.Engine(path)
    alone = [outcome(fresh.submit(ids, sampling(max_new_tokens=1), n_logprobs=3, prefix_cache=False)) for ids in asked]
    engine = _core.Engine(path, n_kv=N_CTX)  # 5 blocks, of which the known tokens leave 3
    wait(engine.submit(known, sampling(max_new_tokens=1)))
    holds = engine.submit(known[:1], sampling(max_new_tokens=1), mask=Waits(5), prefix_cache=False)
    assert Waits.held.wait(60)
    before = engine.stats()["n_steps"]
    requests = [engine.submit(ids, sampling(max_new_tokens=1), n_logprobs=3) for ids in asked]
    Waits.let_go.set()
    assert [outcome(request) for request in requests] == alone
    assert [request.result()["n_cached"] for request in requests] == [36, 0]
    assert engine.stats()["n_steps"] == before + 2  # one is that of the request that held the others up
    assert outcome(holds)[0]
    assert_nothing_is_kept(engine)


def test_what_was_generated_is_remembered_too(path):
    engine = _core.Engine(path)
    ids = prompts(1, longest=40)[0]
    ids = np.resize(ids, 20).astype(np.uint32)
    answer, _, _ = outcome(engine.submit(ids, sampling(max_new_tokens=50)))
    turn = np.concatenate([ids, answer, [1, 2, 3]]).astype(np.uint32)
    # The last token of the answer was drawn but never fed back.
    assert wait(engine.submit(turn, sampling(max_new_tokens=1))).result()["n_cached"] == 20 + 50 - 1


def test_a_request_after_another_shares_its_prompt(path):
    engine = _core.Engine(path)
    ids = np.resize(prompts(4)[3], 70).astype(np.uint32)
    leader = engine.submit(ids, sampling(max_new_tokens=30))
    followers = [engine.submit(ids, sampling(max_new_tokens=30), after=leader) for _ in range(3)]
    expected = outcome(leader)[0]
    for request in followers:
        assert outcome(request)[0] == expected
        assert request.result()["n_cached"] >= 64  # whole blocks
    cancelled = engine.submit(ids, sampling(max_new_tokens=30))
    cancelled.cancel()
    assert outcome(engine.submit(ids, sampling(max_new_tokens=30), after=cancelled))[0] == expected


def expected_scores(engine, ids, first_row):
    """Log-probabilities and ranks of the tokens behind first_row, from logits in float64."""
    logits = engine.logits(ids[:-1]).astype(np.float64)[first_row:]
    own = logits[np.arange(len(logits)), ids[first_row + 1 :]]
    logprobs = own - logits.max(1) - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
    return logprobs, (logits > own[:, None]).sum(1) + 1


@pytest.mark.parametrize("options", [dict(), dict(n_batch=7), dict(n_kv=N_CTX)], ids=str)
def test_scores_of_a_part(path, options):
    """What stands before it comes from the prefix cache; the last token is predicted only."""
    engine = _core.Engine(path, **options)
    ids = np.resize(prompts(4, longest=100)[3], N_CTX + 1).astype(np.uint32)
    for first_row in (90, 0, 31, 32, 90, N_CTX - 1):
        request = engine.submit(
            ids[:-1], sampling(max_new_tokens=0), n_prompt_logprobs=0, first_row=first_row, next=int(ids[-1])
        )
        known = wait(request).result()["n_cached"]
        logprobs, ranks = expected_scores(engine, ids, first_row)
        assert request.prompt_logprobs() == pytest.approx(logprobs, rel=1e-5)
        assert request.prompt_ranks().tolist() == ranks.tolist()
        assert known <= first_row
        assert request.prompt_logprobs().tobytes() == score(engine, ids[:-1])[first_row:].tobytes() + (
            request.prompt_logprobs()[-1:].tobytes()
        )
    assert known >= first_row // 32 * 32  # found in the cache
    assert_nothing_is_kept(engine)


def test_scores_that_were_not_reached(path):
    engine = _core.Engine(path)
    late = wait(engine.submit(prompts(4)[3], sampling(max_new_tokens=5), n_prompt_logprobs=0, timeout_s=0.0))
    assert late.result()["finish_reason"] == "timeout"
    assert late.prompt_logprobs().tolist() == []


def test_bad_rows(path):
    engine = _core.Engine(path)
    ids = prompts(4)[3][:10]
    for rows in ([3, 3], [3, 2], [10], []):
        with pytest.raises(ValueError, match="rows must rise"):
            engine.logits(ids, rows=rows)
    with pytest.raises(ValueError, match="77"):
        engine.submit(ids, sampling(max_new_tokens=0), next=77)


def test_drafts_are_verified(path):
    """A model that repeats itself accepts most guesses."""
    engine = _core.Engine(path, n_kv=4 * N_CTX)
    ids = np.resize(np.arange(4), 40).astype(np.uint32)
    plain = outcome(engine.submit(ids, sampling(max_new_tokens=100)))[0]
    before = engine.stats()["n_steps"]
    request = wait(engine.submit(ids, sampling(max_new_tokens=100), n_draft=8))
    steps = engine.stats()["n_steps"] - before
    assert request.read(0)[0] == plain
    result = request.result()
    assert result["n_drafted"] >= result["n_accepted"] > 0
    assert steps <= 101 - result["n_accepted"]
    assert engine.stats()["n_generated"] == 200


def test_cancelled_waiting_and_running(path):
    engine = _core.Engine(path, n_parallel=1)
    running = [engine.submit(prompts(4)[3], sampling(max_new_tokens=60), prefix_cache=False) for _ in range(40)]
    waiting = engine.submit(prompts(4)[3], sampling(max_new_tokens=60))
    waiting.cancel()
    assert wait(waiting).result()["finish_reason"] == "cancelled"
    assert waiting.read(0)[0] == []
    for request in running:
        request.cancel()
    assert {wait(request).result()["finish_reason"] for request in running} <= {"cancelled", "length"}
    assert_nothing_is_kept(engine)


def test_timeout(path):
    engine = _core.Engine(path)
    late = wait(engine.submit(prompts(4)[3], sampling(max_new_tokens=60), timeout_s=0.0))
    assert late.result()["finish_reason"] == "timeout"
    in_time = wait(engine.submit(prompts(4)[3], sampling(max_new_tokens=6), timeout_s=60.0))
    assert in_time.result()["finish_reason"] == "length"


def test_close_ends_what_runs(path):
    engine = _core.Engine(path)
    requests = [engine.submit(p, sampling(max_new_tokens=60)) for p in prompts(30, longest=80)]
    engine.close()
    for request in requests:
        assert request.wait(2**62, 10)
        assert request.result()["finish_reason"] in ("cancelled", "length")


def test_jobs_between_requests(path):
    """A measurement has the threads to itself, and everybody goes on afterwards."""
    engine = _core.Engine(path)
    requests = [engine.submit(p, sampling(max_new_tokens=50)) for p in prompts(8)]
    assert len(engine.read_ceiling(1 << 20, 2)) == 2
    squares = _core.InputSquares(engine)
    assert squares.add(engine, prompts(4)[3]).tobytes() == score(engine, prompts(4)[3]).tobytes()
    expected = [generate(_core.Engine(path), p, sampling(max_new_tokens=50)) for p in prompts(8)]
    assert [outcome(r)[0] for r in requests] == expected


class EveryThird:
    """Allows ids that 3 divides; says it is finished after some tokens."""

    def __init__(self, most):
        self.seen = []
        self.most = most

    def allowed(self):
        bits = np.zeros(96, bool)
        bits[0:VOCAB:3] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token_id):
        self.seen.append(token_id)

    def finished(self):
        return len(self.seen) == self.most


def test_what_a_mask_raises(path):
    """Whoever asks for the result gets it, with its traceback, as often as it is asked for."""

    class Raises(EveryThird):
        def allowed(self):
            if self.seen:
                raise KeyError("of the mask")
            return super().allowed()

    engine = _core.Engine(path)
    request = wait(engine.submit(prompts(1)[0], sampling(max_new_tokens=5), mask=Raises(5)))
    for _ in range(2):
        with pytest.raises(KeyError, match="of the mask") as caught:
            request.result()
        assert caught.traceback[-1].name == "allowed"
    assert_nothing_is_kept(engine)


def test_mailbox_says_who_has_news(path):
    engine = _core.Engine(path)
    mailbox = _core.Mailbox()
    requests = {}
    for p in prompts(10):
        request = engine.submit(p, sampling(max_new_tokens=20), mailbox=mailbox)
        requests[request.number] = request
    left = set(requests)
    deadline = time.monotonic() + 60
    while left:
        assert time.monotonic() < deadline
        for number in mailbox.wait(5.0):
            if requests[number].read(0)[2]:
                left.discard(number)
    assert mailbox.wait(0.0) == []
    threading.Timer(0.05, mailbox.close).start()
    assert mailbox.wait(60.0) == []


def test_random_cancels_leave_nothing_behind(path):
    rng = np.random.default_rng(0)
    engine = _core.Engine(path, n_kv=2 * N_CTX)
    made = prompts(40, seed=5)
    requests = []
    for round_ in range(10):
        for i in range(40):
            timeout = float(rng.choice([0.0, 0.001, 0.01, 60.0]))
            requests.append(
                engine.submit(made[i], sampling(max_new_tokens=int(rng.integers(1, 30))), timeout_s=timeout, n_draft=3)
            )
        for request in rng.permutation(np.array(requests, object))[: 10 + round_]:
            request.cancel()
    reasons = {wait(r).result()["finish_reason"] for r in requests}
    assert reasons <= {"cancelled", "timeout", "length"}
    assert_nothing_is_kept(engine)
    expected = generate(_core.Engine(path), made[0], sampling(max_new_tokens=30))
    assert outcome(engine.submit(made[0], sampling(max_new_tokens=30)))[0] == expected


def test_bad_sizes(path):
    with pytest.raises(ValueError, match="n_kv is 100"):
        _core.Engine(path, n_kv=100)
    with pytest.raises(ValueError, match="n_parallel"):
        _core.Engine(path, n_parallel=0)


def test_a_mask_decides_what_may_come(path):
    engine = _core.Engine(path)
    masks = [EveryThird(7), EveryThird(100)]
    ids = prompts(4)[3]
    requests = [
        engine.submit(ids, sampling(max_new_tokens=12, temperature=t, seed=1), mask=mask, n_draft=4)
        for t, mask in zip((0.0, 2.0), masks, strict=True)
    ]
    plain = engine.submit(ids, sampling(max_new_tokens=12))
    for request, mask, n in zip(requests, masks, (7, 12), strict=True):
        token_ids = outcome(request)[0]
        assert token_ids == mask.seen
        assert len(token_ids) == n
        assert all(i % 3 == 0 for i in token_ids)
    assert any(i % 3 for i in outcome(plain)[0])


def test_a_mask_that_fails_ends_its_request_only(path):
    class Fails(EveryThird):
        def accept(self, token_id):
            raise KeyError("mine")

    engine = _core.Engine(path)
    bad = engine.submit(prompts(4)[3], sampling(max_new_tokens=12), mask=Fails(5))
    good = engine.submit(prompts(4)[3], sampling(max_new_tokens=12))
    wait(bad)
    with pytest.raises(KeyError, match="mine"):
        bad.result()
    assert len(outcome(good)[0]) == 12
    assert_nothing_is_kept(engine)
