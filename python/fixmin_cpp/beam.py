"""Beam search: the continuations of highest probability as a whole, not token by token.

Every step is one request per beam for one token. What the beams have in common, and what each has computed, is found in
the prefix cache, so that a step computes one token of each beam, all of them together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import _core
from .running import wait_all

__all__ = ["Beam", "beam_search"]


@dataclass(frozen=True)
class Beam:
    """A continuation: its tokens, without the end-of-text token, and the sum of their log-probabilities."""

    token_ids: list[int]
    logprob: float  # that of the end-of-text token included, if it ended so
    score: float  # logprob / length ** length_penalty
    ended: bool  # by an end-of-text token


@dataclass
class _Search:
    n_beams: int
    length_penalty: float
    early_stopping: bool
    n_candidates: int  # most probable tokens that are looked at in a step
    live: list[tuple[list[int], float]] = field(default_factory=lambda: [([], 0.0)])  # tokens, log-probability
    found: list[Beam] = field(default_factory=list)  # the best n_beams, falling

    def score(self, logprob: float, length: int) -> float:
        return logprob / length**self.length_penalty

    def keep(self, token_ids: list[int], logprob: float, length: int, ended: bool) -> None:
        self.found.append(Beam(token_ids, logprob, self.score(logprob, length), ended))
        self.found = sorted(self.found, key=lambda beam: -beam.score)[: self.n_beams]

    def finished(self) -> bool:
        """Whether no live beam can displace one that was found, as transformers estimates it."""
        if len(self.found) < self.n_beams:
            return False
        if self.early_stopping:
            return True
        best = max(logprob for _, logprob in self.live)
        return self.score(best, len(self.live[0][0])) <= self.found[-1].score

    def best(self) -> list[Beam]:
        """What was found, and what would have gone on, as it is."""
        for token_ids, logprob in self.live:
            if token_ids:
                self.keep(token_ids, logprob, len(token_ids), False)
        return self.found

    def advance(self, tops: Sequence[Sequence[tuple[int, float]]], eos_ids: frozenset[int]) -> None:
        """One more token: `tops` has the n_candidates most probable ones after each live beam."""
        candidates = [
            (logprob + more, beam, token_id)
            for beam, (_, logprob) in enumerate(self.live)
            for token_id, more in tops[beam]
        ]
        candidates.sort(key=lambda c: (-c[0], c[1], c[2]))
        live: list[tuple[list[int], float]] = []
        for rank, (logprob, beam, token_id) in enumerate(candidates[: self.n_candidates]):
            before = self.live[beam][0]
            if token_id in eos_ids:
                if rank < self.n_beams:
                    self.keep(before, logprob, len(before) + 1, True)
            elif len(live) < self.n_beams:
                live.append(([*before, token_id], logprob))
        self.live = live


def beam_search(
    engine: _core.Engine,
    prompt: NDArray[np.uint32],
    *,
    n_beams: int,
    max_new_tokens: int,
    length_penalty: float,
    early_stopping: bool,
    eos_ids: frozenset[int],
) -> list[Beam]:
    """The best n_beams continuations of `prompt` [T], falling; scores and ends as in transformers' beam search."""
    # So many that n_beams go on even if every end-of-text token is among the best of each beam; as in transformers.
    n_candidates = max(2, 1 + len(eos_ids)) * n_beams
    search = _Search(n_beams, length_penalty, early_stopping, n_candidates)
    params = _core.SamplingParams(max_new_tokens=1)
    for _ in range(max_new_tokens):
        requests = [
            engine.submit(np.append(prompt, np.array(ids, np.uint32)), params, n_logprobs=n_candidates)
            for ids, _ in search.live
        ]
        wait_all(requests)
        tops = []
        for request in requests:
            request.result()  # raises what went wrong
            logprobs = request.read(0)[1]
            if not logprobs:  # the model was closed
                return search.best()
            tops.append(logprobs[0][3])
        search.advance(tops, eos_ids)
        if search.finished():
            return search.found
    return search.best()
