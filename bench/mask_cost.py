"""What constrained output costs per token: compiling, masks along real texts, and masks of many requests at once.

    python bench/mask_cost.py [--tokenizer tokenizer.json] [--markdown OUT.md]

Without a tokenizer one of 65,536 tokens is made: characters and random n-grams, as the published checkpoints have.
Every text is a valid output, cut by the tokenizer itself; a mask is computed before each of its tokens. "random" does
the same along random walks, which visit states that no sensible text does. All times are wall clock. The
first pass over a text is reported beside the following ones: llguidance builds the states of its lexer as they are met
and keeps them with the compiled form.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models

from fixmin_cpp.constrain import Compiler, Constraint, Matcher
from fixmin_cpp.tokenizer import TextTokenizer

N_VOCAB = 65536
N_PASSES = 20

RECORD = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 80},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "authors": {"type": "array", "items": {"type": "string"}, "maxItems": 10},
        "kind": {"enum": ["article", "book", "thesis", "report"]},
        "open": {"type": "boolean"},
    },
    "required": ["title", "year", "authors", "kind", "open"],
    "additionalProperties": False,
}
RECORD_TEXT = json.dumps(
    {
        "title": "On the number of bits that a token needs, and what a model does with the rest",
        "year": 2025,
        "authors": ["A. Author", "Another One", "Somebody Else"],
        "kind": "article",
        "open": True,
    }
)
ARITHMETIC = """
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /0|[1-9][0-9]*/
"""
LIST_GBNF = 'root ::= item+\nitem ::= "- " [^\\n]+ "\\n"\n'
WORDS = [
    f"{a}{b}{c}"
    for a in "bdfgklmnpr"
    for b in ("a", "e", "i", "o", "u", "ai", "ou", "ei", "oo", "ea")
    for c in "dlmnrstkpg"
]

# name, constraint, a text that satisfies it
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("any JSON", {"json_schema": True}, RECORD_TEXT),
    ("JSON schema", {"json_schema": RECORD}, RECORD_TEXT),
    ("regex: date", {"regex": r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z"}, "2025-11-22T13:25:00Z"),
    (
        "regex: sentence",
        {"regex": r"[A-Z][a-z ,]{20,400}\."},
        "The " + "capital of the country lies on a river, " * 4 + "far away.",
    ),
    ("Lark: arithmetic", {"grammar": ARITHMETIC}, "(12+34)*(56-78/(9+10))-11*(12+(13-14)*15)+16/17"),
    ("GBNF: list", {"grammar": LIST_GBNF}, "- the first of these\n- and another one\n- the last\n"),
    ("3 choices", {"choices": ["positive", "negative", "neutral"]}, "neutral"),
    ("1000 choices", {"choices": WORDS}, WORDS[517]),
]


def made_tokenizer() -> Tokenizer:
    """Characters below U+D800 and random n-grams of letters; decoded by concatenation."""
    rng = np.random.default_rng(0)
    vocab = {chr(i): i for i in range(0xD800)}
    merges = []
    letters = "etaoinshrdlucmfwypvbgk "
    while len(vocab) < N_VOCAB - 1:
        left = "".join(rng.choice(list(letters), rng.integers(1, 6)))
        right = str(rng.choice(list(letters)))
        if left in vocab and left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
    vocab["</s>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.decoder = decoders.Sequence([])
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds, and what `act` returns."""
    start = time.perf_counter()
    result = act()
    return 1e6 * (time.perf_counter() - start), result


def along(matcher: Matcher, ids: list[int]) -> Iterator[tuple[float, float, float]]:
    """For each token of a text: µs for the mask, for accept() and for forced()."""
    for token_id in ids:
        mask_us, mask = timed(matcher.mask)
        if not mask[token_id // 32] >> (token_id % 32) & 1:
            raise ValueError(f"token {token_id} does not fit")
        forced_us, _ = timed(matcher.forced)
        accept_us, _ = timed(lambda i=token_id: matcher.accept(i))
        yield mask_us, accept_us, forced_us
    if not matcher.may_end:
        raise ValueError("the text is not complete")


def random_walk(matcher: Matcher, rng: np.random.Generator, n_tokens: int) -> Iterator[float]:
    """µs per mask while any allowed token is as likely as any other."""
    for _ in range(n_tokens):
        if matcher.finished:
            return
        mask_us, mask = timed(matcher.mask)
        yield mask_us
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        matcher.accept(int(rng.choice(allowed)))


def measure(compiler: Compiler, tokenizer: TextTokenizer, described: dict[str, Any], text: str) -> dict[str, float]:
    constraint = Constraint.check(**described)
    assert constraint is not None
    compile_us, matcher = timed(lambda: compiler.matcher(constraint))
    ids = tokenizer.encode(text)
    first = np.array(list(along(matcher, ids)))
    passes = [list(along(compiler.matcher(constraint), ids)) for _ in range(N_PASSES)]
    later = np.concatenate([np.array(steps) for steps in passes])
    rng = np.random.default_rng(1)
    walks = [us for _ in range(N_PASSES) for us in random_walk(compiler.matcher(constraint), rng, 30)]
    return {
        "tokens": len(ids),
        "compile": compile_us,
        "again": float(np.median([timed(lambda: compiler.matcher(constraint))[0] for _ in range(50)])),
        "first": float(first[:, 0].mean()),
        "mask": float(later[:, 0].mean()),
        "p99": float(np.percentile(later[:, 0], 99)),
        "random": float(np.mean(walks)),
        "accept": float(later[:, 1].mean()),
        "forced": float(later[:, 2].mean()),
    }


def many(tokenizer: TextTokenizer, eos_id: int | None, n_matchers: int, n_threads: int) -> float:
    """µs per mask when a batch of requests with four schemas gets its masks in one call, over a whole text."""
    compiler = Compiler(tokenizer, N_VOCAB, eos_id, n_threads=n_threads)
    ids = tokenizer.encode(RECORD_TEXT)
    out = np.empty((n_matchers, compiler.n_words), np.uint32)
    total = 0.0
    for count in range(3):  # the first pass warms up
        schemas = [{**RECORD, "title": str(i % 4)} for i in range(n_matchers)]
        matchers = [compiler.matcher(Constraint.check(json_schema=schema)) for schema in schemas]  # type: ignore[arg-type]
        for token_id in ids:
            us, errors = timed(partial(compiler.fill_masks, matchers, out))
            assert not any(errors)
            total += us if count else 0.0
            for matcher in matchers:
                matcher.accept(token_id)
    return total / (2 * len(ids) * n_matchers)


def table(rows: list[tuple[str, dict[str, float]]]) -> str:
    names = list(rows[0][1])
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for label, values in rows:
        lines.append(
            f"| {label} | " + " | ".join(f"{values[name]:,.{0 if name == 'tokens' else 1}f}" for name in names) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; without it one is made")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    arguments = parser.parse_args()

    backend = Tokenizer.from_file(str(arguments.tokenizer)) if arguments.tokenizer else made_tokenizer()
    tokenizer, eos_id = TextTokenizer(backend), backend.token_to_id("</s>")
    build_us, compiler = timed(lambda: Compiler(tokenizer, N_VOCAB, eos_id))
    parts = [f"Compiler for {backend.get_vocab_size():,} tokens: {build_us / 1e6:.2f} s. Below, microseconds."]
    parts.append(table([(name, measure(compiler, tokenizer, described, text)) for name, described, text in CASES]))
    counts = (1, 4, 16, 64)
    parts.append(
        table(
            [
                (
                    f"{n} thread{'s' * (n > 1)}",
                    {f"{count} requests": many(tokenizer, eos_id, count, n) for count in counts},
                )
                for n in (1, 2)
            ]
        )
    )
    text = "\n\n".join(parts) + "\n"
    print(text, end="")
    if arguments.markdown:
        arguments.markdown.write_text(text)


if __name__ == "__main__":
    main()
