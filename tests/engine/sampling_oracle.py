"""The sampling chain in float64 NumPy, from the definitions in docs/sampling.md; slow, plain, independent of csrc.

A cut may fall so near a token that float32 decides otherwise: Cut.margin is how near, in the unit of the comparison.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

MASK = 2**64 - 1

DEFAULTS = dict(
    temperature=1.0,
    dynatemp_range=0.0,
    dynatemp_exponent=1.0,
    top_n_sigma=-1.0,
    top_k=40,
    typical_p=1.0,
    top_p=0.95,
    min_p=0.05,
    xtc_probability=0.0,
    xtc_threshold=0.1,
    min_keep=0,
    repeat_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    repeat_last_n=64,
    openai_penalties=False,
    n_prompt=0,  # of history, tokens that are the prompt's: for openai_penalties
    dry_multiplier=0.0,
    dry_base=1.75,
    dry_allowed_length=2,
    dry_penalty_last_n=-1,
    dry_sequence_breakers=(),
    logit_bias={},
    banned_ids=(),
    allowed_ids=(),
    min_new_tokens=0,
    stop_ids=(),
    mirostat=0,
    mirostat_tau=5.0,
    mirostat_eta=0.1,
    seed=0,
)


def uniform(seed, index):
    """Number `index` of SplitMix64 in [0, 1), 53 bits (Steele, Lea, Flood 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 11) / 2**53


def draw_number(seed, step):
    return uniform(seed, 8 * step)


def xtc_number(seed, step):
    return uniform(seed, 8 * step + 1)


def softmax(x):
    w = np.exp(x - x.max())
    return w / w.sum()


def entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


@dataclass
class Cut:
    """Tokens that are left, most probable first, and the least distance of a token from a limit on the way."""

    ids: np.ndarray
    x: np.ndarray
    exact_ties: bool = True  # equal logits are equal in float32 too
    margin: float = field(default=math.inf)

    def near(self, distances):
        distances = np.abs(np.asarray(distances, dtype=np.float64))
        self.margin = min([self.margin, *distances[~np.isnan(distances)].tolist()])

    def keep(self, chosen):
        self.ids, self.x = self.ids[chosen], self.x[chosen]

    def gap(self, n):
        """Between the last one kept and the first one left out, if the first n are kept."""
        if 0 < n < len(self.x) and not (self.exact_ties and self.x[n - 1] == self.x[n]):
            self.near([self.x[n - 1] - self.x[n]])

    def order(self):
        order = np.lexsort((self.ids, -self.x))
        self.keep(order)


def window(history, last_n):
    return list(history) if last_n < 0 else list(history)[len(history) - min(last_n, len(history)) :]


def penalties(x, p, history):
    recent = Counter(window(history, p["repeat_last_n"]))
    for token in recent:
        x[token] = x[token] / p["repeat_penalty"] if x[token] > 0 else x[token] * p["repeat_penalty"]
    for token, count in (Counter(history[p["n_prompt"] :]) if p["openai_penalties"] else recent).items():
        x[token] -= count * p["frequency_penalty"] + p["presence_penalty"]


def since_breaker(tokens, breakers):
    """Tokens behind the breaker that begins last, of those the longest."""
    for start in range(len(tokens) - 1, -1, -1):
        ends = [start + len(b) for b in breakers if tokens[start : start + len(b)] == list(b)]
        if ends:
            return len(tokens) - max(ends)
    return len(tokens)


def dry_lengths(p, history):
    """Token -> length of the longest repetition that it would continue, by trying every place and every length."""
    tokens = window(history, p["dry_penalty_last_n"])
    limit = since_breaker(tokens, p["dry_sequence_breakers"])
    n, least = len(tokens), p["dry_allowed_length"]
    longest = {}
    for at in range(1, n):
        for length in range(min(at, limit) + 1):
            if tokens[at - length : at] == tokens[n - length :]:
                longest[tokens[at]] = max(longest.get(tokens[at], 0), length)
    alone = {b[0] for b in p["dry_sequence_breakers"] if len(b) == 1}
    if n <= least:
        return {}
    return {token: length for token, length in longest.items() if length >= least and token not in alone}


def adjusted(logits, p, history=(), step=0, allowed=None):
    x = np.array(logits, dtype=np.float64)
    banned = set(p["banned_ids"]) | (set(p["stop_ids"]) if step < p["min_new_tokens"] else set())
    if allowed is not None:
        banned |= set(np.flatnonzero(~np.asarray(allowed)).tolist())
    if p["allowed_ids"]:
        banned |= set(range(len(x))) - set(p["allowed_ids"])
    x[list(banned)] = -np.inf
    for token, bias in p["logit_bias"].items():
        x[token] += np.float32(bias)
    penalties(x, p, history)
    if p["dry_multiplier"] > 0:
        for token, length in dry_lengths(p, history).items():
            x[token] -= p["dry_multiplier"] * p["dry_base"] ** (length - p["dry_allowed_length"])
    return x


def survivors(logits, p, history=(), step=0, allowed=None):
    """A Cut with what the truncations leave; mirostat is not one of them."""
    x = adjusted(logits, p, history, step, allowed)
    ids = np.flatnonzero(x > -np.inf)
    changed = bool(p["logit_bias"]) or p["dry_multiplier"] > 0 or bool(history)
    cut = Cut(ids, x[ids], exact_ties=not changed)
    cut.order()

    if p["top_n_sigma"] > 0:
        floor = cut.x.max() - p["top_n_sigma"] * cut.x.std()
        cut.near(cut.x - floor)
        cut.keep(cut.x >= floor)
    if p["top_k"] > 0:
        cut.gap(p["top_k"])
        cut.keep(slice(p["top_k"]))
    if p["typical_p"] < 1:
        probability = softmax(cut.x)
        distance = np.abs(-(cut.x - cut.x.max()) + np.log(np.exp(cut.x - cut.x.max()).sum()) - entropy(probability))
        order = np.lexsort((cut.ids, -cut.x, distance))
        reached = np.cumsum(probability[order])
        cut.near(reached - p["typical_p"])
        enough = (reached > p["typical_p"]) & (np.arange(1, len(order) + 1) >= p["min_keep"])
        n = int(np.argmax(enough)) + 1 if enough.any() else len(order)
        if n < len(order) and cut.x[order[n - 1]] != cut.x[order[n]]:
            cut.near([distance[order[n - 1]] - distance[order[n]]])
        cut.keep(order[:n])
        cut.order()
    if p["top_p"] < 1:
        reached = np.cumsum(softmax(cut.x))
        cut.near(reached - p["top_p"])
        enough = (reached >= p["top_p"]) & (np.arange(1, len(reached) + 1) >= p["min_keep"])
        n = int(np.argmax(enough)) + 1 if enough.any() else len(reached)
        cut.gap(n)
        cut.keep(slice(n))
    if p["min_p"] > 0:
        floor = cut.x[0] + math.log(p["min_p"])
        cut.near(cut.x[1:] - floor)
        n = max(int((cut.x >= floor).sum()), min(p["min_keep"], len(cut.x)))
        cut.gap(n)
        cut.keep(slice(n))
    if p["xtc_probability"] > 0 and p["xtc_threshold"] <= 0.5 and xtc_number(p["seed"], step) < p["xtc_probability"]:
        probability = softmax(cut.x)
        cut.near(probability - p["xtc_threshold"])
        n_above = int((probability >= p["xtc_threshold"]).sum())
        if n_above >= 2 and len(cut.x) - (n_above - 1) >= p["min_keep"]:
            cut.gap(n_above - 1)
            cut.keep(slice(n_above - 1, None))
    return cut


def temperature_of(cut, p):
    t, spread = p["temperature"], p["dynatemp_range"]
    if spread == 0 or len(cut.x) < 2:
        return t
    share = entropy(softmax(cut.x)) / math.log(len(cut.x))
    low = max(0.0, t - spread)
    return low + (t + spread - low) * share ** p["dynatemp_exponent"]


def distribution(logits, p, history=(), step=0, allowed=None):
    """(ids, probabilities, margin), most probable first."""
    cut = survivors(logits, p, history, step, allowed)
    t = temperature_of(cut, p)
    if t == 0:
        cut.keep(slice(1))
        t = 1.0
    return cut.ids, softmax(cut.x / t), cut.margin


def mirostat_limit(x, p, mu, vocab_size=None):
    """The k of mirostat 1 before it is rounded and bounded. vocab_size: of all logits, those of x if None."""
    rank = np.arange(1, min(100, len(x)))
    steps, falls = np.log((rank + 1) / rank), (x[: len(rank)] - x[1 : len(rank) + 1]) / p["temperature"]
    zipf = float((steps * falls).sum() / (steps**2).sum())
    epsilon = zipf - 1
    return (epsilon * 2**mu / (1 - float(vocab_size or len(x)) ** -epsilon)) ** (1 / zipf)


def mirostat_keep(x, p, mu, vocab_size=None):
    """How many of the logits x (falling) mirostat keeps, and how near the limit is."""
    if len(x) == 1:
        return 1, math.inf
    if p["mirostat"] == 2:
        surprise = -np.log2(softmax(x / p["temperature"]))
        return max(1, int((surprise <= mu).sum())), np.abs(surprise - mu).min()
    k = mirostat_limit(x, p, mu, vocab_size)
    return min(max(1, int(k)), len(x)), abs(k - round(k)) if k < len(x) + 1 else k - len(x)
