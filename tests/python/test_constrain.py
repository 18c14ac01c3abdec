"""Constrained output against independent oracles: Python's json, re and ast, jsonschema, and languages written out."""

import ast
import json
import multiprocessing
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from toy_models import SPECIALS, byte_fallback, byte_level, concatenating

from fixmin_cpp import constrain
from fixmin_cpp._core import park_thread
from fixmin_cpp.constrain import Compiler, Constraint, Matcher, token_bytes
from fixmin_cpp.errors import ArgumentError, ArgumentTypeError, BusyError, FixminError, UnsupportedError
from fixmin_cpp.tokenizer import TextTokenizer

llguidance = pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "fixed" / "tokenizer.json"
N_UNKNOWN = 37  # ids that a model has and its tokenizer does not know


def letters() -> Tokenizer:
    """Of the published checkpoints' kind, for JSON: whole characters and n-grams, no bytes, far from all characters."""
    alphabet = [*map(chr, range(0x20, 0x7F)), "\n", "\t", "é", "日", "本", "😀"]
    return concatenating(
        alphabet, [('"', ":"), ('"', ","), ("{", '"'), ("a", "b"), ("日", "本"), ("t", "r"), ("tr", "u"), ("}", "}")]
    )


KINDS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "letters": letters(),
    "demo": Tokenizer.from_file(str(DEMO)),
}
TOKENIZERS = {kind: TextTokenizer(tokenizer) for kind, tokenizer in KINDS.items()}
END = {kind: tokenizer.token_to_id("</s>") for kind, tokenizer in KINDS.items()}
SIZE = {kind: tokenizer.get_vocab_size() + N_UNKNOWN for kind, tokenizer in KINDS.items()}
COMPILERS = {kind: Compiler(TOKENIZERS[kind], SIZE[kind], END[kind], n_threads=2) for kind in KINDS}
ENDLESS = {kind: Compiler(TOKENIZERS[kind], SIZE[kind]) for kind in KINDS}  # of models without an end-of-text token
BYTES = {kind: token_bytes(TOKENIZERS[kind]) for kind in KINDS}

kinds = pytest.mark.parametrize("kind", KINDS)


def start(kind: str, **constraint) -> Matcher:
    return COMPILERS[kind].matcher(Constraint.check(**constraint))


def ids_in(mask: np.ndarray) -> list[int]:
    assert mask.dtype == np.uint32
    bits = np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def walk(matcher: Matcher, rng: np.random.Generator, end_id: int, n_tokens: int) -> list[int]:
    """Samples from random logits under the masks; the end-of-text token gets likelier with time."""
    ids = []
    while not matcher.finished and len(ids) < n_tokens:
        allowed = ids_in(matcher.mask())
        logits = rng.normal(size=len(allowed)) * 2
        logits[[i == end_id for i in allowed]] += 6 * len(ids) / n_tokens
        ids.append(allowed[int(np.argmax(logits))])
        matcher.accept(ids[-1])
    return ids


def close(matcher: Matcher, kind: str, n_tokens: int = 400) -> list[int]:
    """The way out from wherever a walk has got: the end if allowed, else what closes something, else a short text."""
    closing = [b'"', b"}", b"]", b")", b"0", b":", b",", b"e"]

    def rank(token_id: int):
        text = BYTES[kind].get(token_id, b"")
        if token_id == END[kind]:
            return (-1, 0, 0)
        return (closing.index(text) if text in closing else 100, len(text), token_id)

    ids = []
    while not matcher.finished:
        assert len(ids) < n_tokens, "a walk that only closes things does not end"
        ids.append(min(ids_in(matcher.mask()), key=rank))
        matcher.accept(ids[-1])
    return ids


def finished_text(kind: str, seed: int, n_tokens: int = 60, **constraint) -> str:
    """The text of a random walk that is then closed, checked against the tokenizer's own decoding."""
    matcher = start(kind, **constraint)
    ids = walk(matcher, np.random.default_rng(seed), END[kind], n_tokens)
    ids += close(matcher, kind)
    assert matcher.finished
    assert matcher.may_end
    if ids[-1] == END[kind]:
        ids.pop()
    text = b"".join(BYTES[kind][i] for i in ids).decode()
    decoded = TOKENIZERS[kind].decode(ids)
    assert decoded == (text.removeprefix(" ") if kind == "byte_fallback" else text)
    return text


# --- the bytes of tokens -----------------------------------------------------------------------------------------


@kinds
@given(data=st.data())
def test_bytes_of_tokens_make_the_text_that_the_tokenizer_decodes(kind, data):
    if kind == "byte_fallback":  # its decoder replaces each byte of an incomplete character, so: whole characters
        ids = TOKENIZERS[kind].encode("b" + data.draw(st.text(alphabet="ab the日é😀Paris\n", max_size=20)))
    else:
        ids = data.draw(st.lists(st.sampled_from(sorted(BYTES[kind])), max_size=30))
    text = b"".join(BYTES[kind][i] for i in ids).decode(errors="replace")
    assert TOKENIZERS[kind].decode(ids) == text


@kinds
def test_special_tokens_have_no_bytes(kind):
    specials = {KINDS[kind].token_to_id(name) for name in SPECIALS} & TOKENIZERS[kind].special_ids
    assert specials
    assert not specials & BYTES[kind].keys()


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.CTC()])
def test_tokenizers_whose_tokens_stand_for_no_fixed_text_are_refused(decoder):
    tokenizer = letters()
    tokenizer.decoder = decoder
    with pytest.raises(UnsupportedError, match="decoder"):
        Compiler(TextTokenizer(tokenizer), 1000, 3)


# --- completed outputs parse -------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "日本", 3, None]}, "minItems": 1, "maxItems": 3},
        "note": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["v"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
DATE = {"type": "string", "format": "date"}
SCHEMAS = [PERSON, TREE, {"type": "array", "items": {"type": "number"}, "maxItems": 3}, DATE]


@kinds
@settings(max_examples=12, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), schema=st.sampled_from(SCHEMAS))
def test_outputs_satisfy_the_schema(kind, seed, schema):
    value = json.loads(finished_text(kind, seed, json_schema=schema))
    jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())


@kinds
@settings(max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_outputs_are_json_with_little_space(kind, seed):
    text = finished_text(kind, seed, json_schema=True)
    json.loads(text)
    outside_strings = re.sub(r'"(\\.|[^"\\])*"', '""', text)
    assert max(map(len, re.findall(r"\s+", outside_strings)), default=0) <= 42


REGEXES = [
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"^(yes|no|maybe)$",
    r"[日本é]{1,5}[.!]?",
    r"(a|ab)(c|bcd)(d*)",
    r"[^a-z\n]{3,10}",
    r"\d+(\.\d+)?",
    r"a/b \"c\" \\",
    r"(?i)abc?",
    r"(?s).{2,5}\s[a-z]+",
]


@kinds
@settings(max_examples=15, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), pattern=st.sampled_from(REGEXES))
def test_outputs_match_the_regex(kind, seed, pattern):
    assert re.fullmatch(pattern, finished_text(kind, seed, n_tokens=25, regex=pattern))


@kinds
@settings(max_examples=15, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    choices=st.lists(st.text(alphabet='ab日é\\"/\n|{x', min_size=1, max_size=6), min_size=1, max_size=6),
)
def test_outputs_are_one_of_the_choices(kind, seed, choices):
    assert finished_text(kind, seed, choices=choices) in choices


LARK = """
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /0|[1-9][0-9]{0,5}/
"""
GBNF = """
# the same for llama.cpp
root    ::= sum
sum     ::= product (("+" | "-") product)*
product ::= atom ([*/] atom)*
atom    ::= number | "(" sum ")"
number  ::= "0" | [1-9] [0-9]{0,5}
"""


@kinds
@pytest.mark.parametrize("grammar", [LARK, GBNF], ids=["lark", "gbnf"])
@settings(max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_outputs_are_arithmetic(kind, grammar, seed):
    tree = ast.parse(finished_text(kind, seed, grammar=grammar), mode="eval")
    allowed = ast.Expression | ast.BinOp | ast.Constant | ast.operator
    assert all(isinstance(node, allowed) for node in ast.walk(tree))


def test_gbnf_with_unicode_escapes():
    text = finished_text("byte_level", 1, grammar='root ::= "\\u00e9" [\\u65e5] "\\x41" "\\U0001F600" "z"')
    assert text == "é日A😀z"


@kinds
@settings(max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_gbnf_rules_may_overlap(kind, seed):
    """As in llama.cpp's arithmetic.gbnf: white space that may swallow the line break which must follow."""
    grammar = 'root ::= (Word-1 ws "\\n")+ # "lines"\nWord-1 ::= [a-c]+ | "ab" .\nws ::= [ \\n]*'
    text = finished_text(kind, seed, n_tokens=25, grammar=grammar)
    assert re.fullmatch(r"(?s)(([a-c]+|ab.)[ \n]*\n)+", text)


@pytest.mark.parametrize("outer", "*+?")
@pytest.mark.parametrize("inner", "*+?")
def test_gbnf_repeats_what_is_repeated(inner, outer):
    grammar = f'# of ** and ++\nroot ::= "?+" ("ab"{inner}){outer} [?+]+'
    expected = re.compile(f"[?][+](?:(?:ab){inner}){outer}[?+]+")
    for count in range(4):
        for end in ("", "+", "?+"):
            text = "?+" + count * "ab" + end
            assert is_accepted(text, grammar=grammar) == (expected.fullmatch(text) is not None), text


def is_accepted(text: str, **description: str) -> bool:
    matcher = start("byte_level", **description)
    for byte in text.encode():
        token_id = next(i for i, part in BYTES["byte_level"].items() if part == bytes([byte]))
        if token_id not in ids_in(matcher.mask()):
            return False
        matcher.accept(token_id)
    return matcher.may_end


# --- masks against languages written out -------------------------------------------------------------------------


@st.composite
def languages(draw: st.DrawFn, depth: int = 3) -> tuple[str, set[str]]:
    """A regex and all the texts that match it, put together from the same parts."""
    kind = draw(st.sampled_from(["text", "text", "join", "or", "repeat"] if depth else ["text"]))
    if kind == "text":
        text = draw(st.text(alphabet="ab日é.", min_size=1, max_size=3))
        return re.escape(text), {text}
    if kind == "repeat":
        regex, texts = draw(languages(depth - 1))
        low, high = sorted(draw(st.tuples(st.integers(0, 2), st.integers(1, 2))))
        powers = [{""}, texts, {a + b for a in texts for b in texts}]
        return f"({regex}){{{low},{high}}}", set().union(*powers[low : high + 1])
    (regex, texts), (regex2, texts2) = draw(languages(depth - 1)), draw(languages(depth - 1))
    if kind == "or":
        return f"({regex}|{regex2})", texts | texts2
    return regex + regex2, {a + b for a in texts for b in texts2}


def check_against_language(kind: str, compiler: Compiler, constraint: Constraint, words: set[bytes], rng) -> None:
    """At every step of a walk: a token is allowed iff a word of the language goes on with it."""
    end_id = compiler.eos_id
    matcher, text = compiler.matcher(constraint), b""
    while True:
        expected = {i for i, part in BYTES[kind].items() if any(w.startswith(text + part) for w in words)}
        if end_id is not None and text in words:
            expected.add(end_id)
        assert matcher.may_end == (text in words)
        if matcher.finished:
            assert text in words
            assert end_id is None or expected == {end_id}
            return
        if not expected:  # the vocabulary lacks a character
            with pytest.raises(FixminError, match="no token of the vocabulary"):
                matcher.mask()
            return
        check_forced(kind, matcher, words, text)
        allowed = ids_in(matcher.mask())
        assert set(allowed) == expected
        token_id = int(rng.choice(allowed))
        matcher.accept(token_id)
        if token_id == end_id:
            assert matcher.finished
            return
        text += BYTES[kind][token_id]


def check_forced(kind: str, matcher: Matcher, words: set[bytes], text: bytes) -> None:
    """All that forced() promises comes next in every word."""
    forced = b"".join(BYTES[kind][i] for i in matcher.forced())
    assert all(word.startswith(text + forced) for word in words if word.startswith(text))


@kinds
@pytest.mark.parametrize("compilers", [COMPILERS, ENDLESS], ids=["end", "no_end"])
@settings(max_examples=25, derandomize=True)
@given(language=languages(), seed=st.integers(0, 2**32 - 1))
def test_masks_of_regexes_equal_brute_force(kind, compilers, language, seed):
    regex, texts = language
    constraint = Constraint.check(regex=regex)
    words = {text.encode() for text in texts}
    if words == {b""}:
        return
    check_against_language(kind, compilers[kind], constraint, words, np.random.default_rng(seed))


@kinds
@pytest.mark.parametrize("compilers", [COMPILERS, ENDLESS], ids=["end", "no_end"])
@settings(max_examples=25, derandomize=True)
@given(
    choices=st.lists(st.text(alphabet="ab日éth\n ", min_size=1, max_size=6), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_masks_of_choices_equal_brute_force(kind, compilers, choices, seed):
    constraint = Constraint.check(choices=choices)
    words = {choice.encode() for choice in choices}
    check_against_language(kind, compilers[kind], constraint, words, np.random.default_rng(seed))


word_lists = st.lists(st.text(alphabet='ab日"/\\\n', min_size=1, max_size=3), min_size=1, max_size=4)


@kinds
@settings(max_examples=25, derandomize=True)
@given(first=word_lists, second=word_lists, seed=st.integers(0, 2**32 - 1))
def test_masks_of_gbnf_equal_brute_force(kind, first, second, seed):
    rules = [f"{name} ::= {' | '.join(map(json.dumps, words))}" for name, words in (("a", first), ("b", second))]
    constraint = Constraint.check(grammar="\n".join(["root ::= a b a?", *rules]))
    words = {f"{a}{b}{c}".encode() for a in first for b in second for c in ["", *first]}
    check_against_language(kind, COMPILERS[kind], constraint, words, np.random.default_rng(seed))


@kinds
@settings(max_examples=25, derandomize=True)
@given(values=st.lists(st.text(alphabet="ab日é😀", max_size=4), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_masks_of_a_json_enumeration_equal_brute_force(kind, values, seed):
    constraint = Constraint.check(json_schema={"enum": values})
    words = {json.dumps(value, ensure_ascii=False).encode() for value in values}
    check_against_language(kind, COMPILERS[kind], constraint, words, np.random.default_rng(seed))


def test_a_character_may_be_split_over_tokens():
    half = next(i for i, part in BYTES["byte_level"].items() if part == b"a\xe6")
    matcher = start("byte_level", regex="a(日|月)")
    for part in (b"a\xe6", b"\x97", b"\xa5"):
        token_id = half if part == b"a\xe6" else next(i for i, p in BYTES["byte_level"].items() if p == part)
        assert token_id in ids_in(matcher.mask())
        matcher.accept(token_id)
    assert matcher.finished


@kinds
def test_ids_that_only_the_model_has_and_special_tokens_are_never_allowed(kind):
    everything = start(kind, regex=r"[\s\S]+")
    known = {i for i, part in BYTES[kind].items()}
    allowed = set(ids_in(everything.mask()))
    assert allowed <= known
    assert len(allowed) > 0.4 * len(known)  # the rest begins within a character
    everything.accept(next(i for i, part in BYTES[kind].items() if part == b"a"))
    assert END[kind] in ids_in(everything.mask())
    assert set(ids_in(everything.mask())) <= known | {END[kind]}


def test_a_grammar_may_name_a_special_token():
    matcher = start("byte_level", grammar='start: "a" <s> "b"')
    text = []
    while not matcher.finished:
        text.append(ids_in(matcher.mask())[0])
        matcher.accept(text[-1])
    assert TOKENIZERS["byte_level"].decode(text) == "a<s>b"


# --- state -------------------------------------------------------------------------------------------------------


@kinds
@settings(max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), constraint=st.sampled_from([{"json_schema": PERSON}, {"grammar": LARK}]))
def test_clones_and_rollback_give_the_same_masks(kind, seed, constraint):
    rng = np.random.default_rng(seed)
    matcher = start(kind, **constraint)
    masks, ids = [], []
    while not matcher.finished and len(ids) < 30:
        clone = matcher.clone()
        masks.append(matcher.mask())
        assert np.array_equal(clone.mask(), masks[-1])
        allowed = ids_in(masks[-1])
        other = int(rng.choice(allowed))  # a clone that goes another way changes nothing here
        clone.accept(other)
        if rng.random() < 0.3:
            matcher.forced()
        ids.append(int(rng.choice(allowed)))
        matcher.accept(ids[-1])
    back = int(rng.integers(0, len(ids) + 1))
    matcher.rollback(back)
    for token_id, mask in zip(ids[len(ids) - back :], masks[len(ids) - back :], strict=True):
        assert np.array_equal(matcher.mask(), mask)
        matcher.accept(token_id)


@kinds
@settings(max_examples=10, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_forced_tokens_lead_to_the_same_outputs(kind, seed):
    """Appending what is forced, instead of sampling it, still gives a value that fits; keys come in few tokens."""
    rng, matcher, ids = np.random.default_rng(seed), start(kind, json_schema=PERSON), []
    while not matcher.finished and len(ids) < 60:
        forced = matcher.forced()
        for token_id in forced:
            assert token_id in ids_in(matcher.mask())
            matcher.accept(token_id)
        if not forced:
            ids += walk(matcher, rng, END[kind], 1)
        ids += forced
    ids += close(matcher, kind)
    text = b"".join(BYTES[kind].get(i, b"") for i in ids).decode()
    jsonschema.validate(json.loads(text), PERSON)


def test_forced_text_is_cut_as_the_tokenizer_cuts_it():
    tokenizer = TOKENIZERS["demo"]
    text = "Question: What is the capital of France?"
    matcher = start("demo", choices=[text + " A", text + " B"])
    ids = matcher.forced()
    assert ids == tokenizer.encode(text + " A")[: len(ids)]
    assert len(tokenizer.decode(ids)) > len(text) - 12


@pytest.mark.parametrize("compilers", [COMPILERS, ENDLESS], ids=["end", "no_end"])
def test_masks_of_many_equal_masks_of_one(compilers):
    compiler, rng = compilers["demo"], np.random.default_rng(5)
    described = [{"json_schema": PERSON}, {"regex": "[a-z ]+!"}, {"grammar": LARK}, {"choices": ["yes", "no"]}] * 4
    matchers = [compiler.matcher(Constraint.check(**constraint)) for constraint in described]
    for i, matcher in enumerate(matchers):
        walk(matcher, rng, -1, i)
    expected = np.stack([matcher.clone().mask() for matcher in matchers])
    out = np.full((len(matchers), compiler.n_words), 7, np.uint32)
    assert compiler.fill_masks(matchers, out) == [None] * len(matchers)
    assert np.array_equal(out, expected)


def test_one_that_cannot_go_on_does_not_disturb_the_others():
    compiler = COMPILERS["letters"]
    good, lost, done = (start("letters", regex=regex) for regex in ("ab", "a(ü)b", "a"))
    a = KINDS["letters"].token_to_id("a")
    for matcher in (lost, done):
        matcher.accept(a)
    out = np.empty((3, compiler.n_words), np.uint32)
    errors = compiler.fill_masks([good, lost, done], out)
    assert errors[0] is None
    assert errors[2] is None
    assert "no token of the vocabulary" in str(errors[1])
    assert not out[1].any()
    assert ids_in(out[2]) == [END["letters"]]
    assert not lost.finished
    for act in (lost.mask, lambda: lost.accept(a), lambda: lost.rollback(1)):
        with pytest.raises(FixminError, match="no token of the vocabulary"):
            act()


def test_fill_masks_checks_where_it_writes():
    compiler, matcher = COMPILERS["demo"], start("demo", regex="a")
    for wrong in (
        np.empty((2, compiler.n_words), np.uint32),
        np.empty((1, compiler.n_words + 1), np.uint32),
        np.empty((1, compiler.n_words), np.int64),
        np.empty((1, 2 * compiler.n_words), np.uint32)[:, ::2],
    ):
        with pytest.raises(ArgumentError, match=r"out must be a C-contiguous uint32 array of shape \(1, "):
            compiler.fill_masks([matcher], wrong)
    assert compiler.fill_masks([], np.empty((0, compiler.n_words), np.uint32)) == []


def test_after_the_end_nothing_follows():
    matcher = start("demo", regex="a+")
    a, end = KINDS["demo"].token_to_id("a"), END["demo"]
    matcher.accept(a)
    assert matcher.may_end
    assert not matcher.finished
    matcher.accept(end)
    assert matcher.finished
    assert not matcher.mask().any()
    assert matcher.forced() == []
    matcher.rollback(1)
    assert not matcher.finished
    matcher.accept(a)
    matcher.accept(end)
    with pytest.raises(FixminError, match="cannot follow the end"):
        matcher.accept(a)


@pytest.mark.parametrize("wrong", ["b", "</s>", "<unk>"])
def test_a_token_that_does_not_fit_is_refused(wrong):
    matcher = start("demo", regex="a+c")
    with pytest.raises(FixminError, match="regex"):
        matcher.accept(KINDS["demo"].token_to_id(wrong))


@pytest.mark.parametrize("wrong", [-1, SIZE["demo"], 2**40])
def test_an_id_out_of_range_is_refused_and_changes_nothing(wrong):
    matcher = start("demo", regex="a+c")
    with pytest.raises(ArgumentError, match="token_id"):
        matcher.accept(wrong)
    matcher.accept(KINDS["demo"].token_to_id("a"))


def test_without_an_end_the_first_complete_text_finishes():
    a = KINDS["demo"].token_to_id("a")
    matcher = ENDLESS["demo"].matcher(Constraint.check(regex="a{2,5}"))
    for finished in (False, False, True):
        assert matcher.finished == finished
        matcher.accept(a)
    assert ids_in(ENDLESS["demo"].matcher(Constraint.check(regex="a{2,5}")).mask())


# --- threads, processes ------------------------------------------------------------------------------------------


def test_threads_get_what_they_would_get_alone():
    compiler = Compiler(TOKENIZERS["demo"], SIZE["demo"], END["demo"], n_threads=2, cache_size=2)
    described = [{"json_schema": PERSON}, {"json_schema": TREE}, {"grammar": LARK}, {"regex": "[a-f]{20}"}]

    def run(i: int) -> list[int]:
        matcher = compiler.matcher(Constraint.check(**described[i % 4]))
        return walk(matcher, np.random.default_rng(i), END["demo"], 30)

    alone = [run(i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(16))) == alone


def _masks_in_child(connection) -> None:
    compiler = COMPILERS["demo"]
    matchers = [start("demo", regex="a+"), start("demo", json_schema=PERSON)]
    out = np.empty((2, compiler.n_words), np.uint32)
    compiler.fill_masks(matchers, out)
    connection.send(out)


def test_threads_of_fill_masks_survive_a_fork():
    here, there = multiprocessing.get_context("fork").Pipe()
    _masks_in_child(there)
    expected = here.recv()
    child = multiprocessing.get_context("fork").Process(target=_masks_in_child, args=(there,), daemon=True)
    child.start()
    assert here.poll(60), "the child process hangs"
    assert np.array_equal(here.recv(), expected)
    child.join()


def _mask_in_child(connection, compiler, constraint):
    n_cached = len(compiler._cache)
    connection.send((n_cached, compiler.matcher(constraint).mask()))


def test_what_is_locked_at_a_fork_holds_up_no_child():
    """Neither a lock of this module nor the lexer that the matchers of a compiled constraint share."""
    compiler = Compiler(TOKENIZERS["demo"], SIZE["demo"], END["demo"], n_threads=2)
    constraint = Constraint.check(regex="[a-z]{2,9}")
    expected = compiler.matcher(constraint).mask()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_mask_in_child, args=(there, compiler, constraint), daemon=True)
    with compiler._lock, constrain._stack_lock:  # by another thread, say
        child.start()
    assert here.poll(60), "the child process hangs"
    n_cached, mask = here.recv()
    assert n_cached == 0, "compiled anew, and with it the lexer"
    assert np.array_equal(mask, expected)
    child.join()


def test_other_threads_run_while_a_grammar_compiles_and_masks():
    """The GIL is not held for long: this thread counts meanwhile."""
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for i in range(3):
            start("demo", regex=f"({i}|[a-z]{{1,400}}x[0-9]{{1,400}}){{1,40}}").mask()
    finally:
        stop.set()
        thread.join()
    assert counted[0] > 100


def test_compiled_constraints_are_kept_and_the_oldest_dropped():
    compiler = Compiler(TOKENIZERS["demo"], SIZE["demo"], END["demo"], cache_size=2)
    for regex in ("a", "b", "a", "c"):
        compiler.matcher(Constraint.check(regex=regex))
    assert [constraint.text for constraint in compiler._cache] == ["a", "c"]


def accept_all(matcher: Matcher, ids: list[int]) -> None:
    for token_id in ids:
        matcher.accept(token_id)


def test_one_that_fills_the_lexer_does_not_stop_the_others():
    """The lexer's states are shared by all that use a constraint, and limited."""
    compiler, a = COMPILERS["demo"], KINDS["demo"].token_to_id("a")
    constraint = Constraint.check(regex="[a-z]{1,60000}")
    small, other, greedy = (compiler.matcher(constraint) for _ in range(3))
    for matcher in (small, other):
        accept_all(matcher, [a] * 5)
    accept_all(greedy, [a] * 49_900)
    with pytest.raises(FixminError, match="too many states"):
        accept_all(greedy, [a] * 200)
    expected = compiler.matcher(Constraint.check(regex="[a-z]{1,50000}")).mask()
    expected[END["demo"] // 32] |= np.uint32(1 << END["demo"] % 32)
    assert np.array_equal(small.mask(), expected)
    other.accept(a)
    for matcher in (small, other):
        matcher.rollback(4)
        assert np.array_equal(matcher.mask(), expected)


# --- what is refused ---------------------------------------------------------------------------------------------


class NotAModel:
    """A class, but not one of pydantic's."""


WRONG = [
    ({"regex": "a", "choices": ["a"]}, ArgumentError, "only one of regex and choices"),
    ({"regex": ""}, ArgumentError, "regex is empty"),
    ({"regex": 3}, ArgumentTypeError, "regex must be a str, got int"),
    ({"regex": "^$"}, ArgumentError, "no text but the empty one"),
    ({"regex": "\ud800"}, ArgumentError, r"lone surrogate '\\ud800' at character 0"),
    ({"grammar": "  \n"}, ArgumentError, "grammar is empty"),
    ({"grammar": b"start: A"}, ArgumentTypeError, "grammar must be a str, got bytes"),
    ({"grammar": 'root ::= "a'}, ArgumentError, "grammar is not GBNF.*line 1"),
    ({"grammar": "root ::= missing"}, ArgumentError, "'missing' not found"),
    ({"grammar": 'other ::= "a"'}, ArgumentError, "root"),
    ({"choices": []}, ArgumentError, "choices is empty"),
    ({"choices": "yes"}, ArgumentTypeError, "choices must be a list of str, got str"),
    ({"choices": ["a", 3]}, ArgumentTypeError, r"choices\[1\] must be a str, got int"),
    ({"choices": ["a", ""]}, ArgumentError, r"choices\[1\] must not be empty"),
    ({"json_schema": "{'a': 1}"}, ArgumentError, "json_schema is not JSON: .*line 1 column 2"),
    ({"json_schema": False}, ArgumentError, "json_schema=False"),
    ({"json_schema": 3}, ArgumentTypeError, "json_schema must be a dict.*got int"),
    ({"json_schema": NotAModel}, ArgumentTypeError, "json_schema must be a dict.*got type"),
    ({"json_schema": {"const": {1, 2}}}, ArgumentError, "cannot be written as JSON"),
    ({"json_schema": {"const": float("nan")}}, ArgumentError, "cannot be written as JSON"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_bad_descriptions_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        Constraint.check(**arguments)


UNUSABLE = [
    ({"regex": "a("}, "(?s)regex cannot be used: .*unclosed group"),
    ({"regex": "(?=a)b"}, "(?s)regex cannot be used: .*look-around"),
    ({"regex": r"(a)\1"}, "(?s)regex cannot be used: .*backreferences"),
    ({"regex": "(a?){0}"}, "regex allows no output but the empty text"),
    ({"grammar": "start: A\nB: /b/"}, "grammar cannot be used: .*A"),
    ({"grammar": 'start: "a'}, "grammar cannot be used"),
    ({"grammar": 'start: "a" other\n\nother: start )'}, "grammar cannot be used: .*3"),
    ({"grammar": "start: start"}, "grammar (cannot be used|allows no output)"),
    ({"grammar": "start: A\nA: A"}, "grammar cannot be used"),
    ({"json_schema": {"type": "strange"}}, "json_schema cannot be used: .*strange"),
    ({"json_schema": {"type": "string", "pattern": "("}}, "json_schema cannot be used"),
    ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema cannot be used: .*nowhere"),
    ({"json_schema": {"not": {}}}, "json_schema cannot be used"),
    ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 4}}, "json_schema"),
    ({"json_schema": {"type": "object", "x-guidance": 3}}, "json_schema"),
]


@pytest.mark.parametrize(("arguments", "message"), UNUSABLE)
def test_constraints_that_cannot_be_compiled_are_refused_by_name(arguments, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        start("demo", **arguments)
    assert "no_forcing" not in str(caught.value), "no user wrote this"
    assert "<state>" not in str(caught.value)


def test_a_choice_that_the_tokens_cannot_spell_is_refused():
    with pytest.raises(ArgumentError, match=r"choices\[1\] 'aü' cannot be written .* none for 'ü'"):
        start("letters", choices=["a", "aü"])
    start("byte_level", choices=["a", "aü"])


HOSTILE = """
import json, sys
from tokenizers import Tokenizer
from fixmin_cpp.constrain import Compiler, Constraint
from fixmin_cpp.errors import FixminError
from fixmin_cpp.tokenizer import TextTokenizer

tokenizer = Tokenizer.from_file(sys.argv[1])
compiler = Compiler(TextTokenizer(tokenizer), 4096, 2, compile_timeout=2)
deep = {}
for _ in range(400):
    deep = {"type": "array", "items": deep}
a = tokenizer.token_to_id("a")
for arguments in [
    {"regex": "(" * 100000},
    {"regex": "(" * 100000 + "a" + ")" * 100000},
    {"regex": "[a-z]{1,1000000}"},
    {"regex": "a{1000000000}"},
    {"regex": "(((a{1000}){1000}){1000}){1000}"},
    {"regex": "(a|b)*a(a|b){30}c"},
    {"regex": "(a|aa)+" * 50},
    {"grammar": "start: " + "(" * 100000 + '"a"' + ")" * 100000},
    {"grammar": "root ::= " + "(" * 100000 + '"a"' + ")" * 100000},
    {"grammar": 'start: x\\nx: x x | y\\ny: y x | x | "a" | "ab"'},
    {"grammar": 'start: "a" start "b" | "a"'},
    {"grammar": 'start: "a" start | "a"'},
    {"grammar": 'start: "a"{1000000}'},
    {"json_schema": "[" * 100000},
    {"json_schema": deep},
    {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
    {"json_schema": {"type": "string", "minLength": 10**9}},
    {"json_schema": {"allOf": [{"pattern": f"[a-z]{{1,{i}}}"} for i in range(1, 200)]}},
    {"json_schema": {"type": "integer", "const": -(2**63)}},
    {"grammar": "start: a0\\n" + "".join(f"a{i:x}: a{i + 1:x}\\n" for i in range(21000)) + "a5208: 'a'"},
    {"grammar": "start: A0\\n" + "".join(f'A{i}: "a" A{i + 1}\\n' for i in range(12000)) + "A12000: 'a'"},
    {"json_schema": {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(7000)}}},
    {"json_schema": {"$ref": "#/$defs/0", "$defs": {
        str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} if i < 4500 else {} for i in range(4501)}}},
    {"grammar": "start: A\\nA: " + " & ".join(f"/[a-z]*[a-z]{{1,{i}}}x.*/" for i in range(1, 200))},
]:
    try:
        matcher = compiler.matcher(Constraint.check(**arguments))
        for _ in range(300):
            mask = matcher.mask()
            if matcher.finished or not mask[a // 32] >> (a % 32) & 1:
                break
            matcher.accept(a)
        print("ran")
    except FixminError as error:
        assert len(str(error)) < 2000, error
        print("refused", str(error)[:80].replace("\\n", " "))
"""


@pytest.mark.slow
def test_hostile_descriptions_are_refused_or_run_in_bounded_time():
    result = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(DEMO)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(re.findall("^(ran|refused)", result.stdout, re.MULTILINE)) == HOSTILE.count('\n    {"')
    assert result.stdout.splitlines()[-1] == "refused grammar is too complex: not compiled within 2 s"


ENDING = """
import ctypes, os, sys
os.setpriority = lambda *arguments: None  # on a busy machine they would get nothing done meanwhile
libc = ctypes.CDLL(None)
sleep = ctypes.cast(libc.sleep, ctypes.c_void_p)
libc.__cxa_atexit(sleep, ctypes.c_void_p(10), None)  # when the interpreter is no more, but the process is
import threading
from tokenizers import Tokenizer
from fixmin_cpp.constrain import Compiler, Constraint
from fixmin_cpp.errors import ArgumentError
from fixmin_cpp.tokenizer import TextTokenizer

compiler = Compiler(TextTokenizer(Tokenizer.from_file(sys.argv[1])), 4096, 2, compile_timeout=0.01)
def refused(letter):
    grammar = "start: A\\nA: " + " & ".join(f"/[a-z]*[a-z]{{1,{i}}}{letter}.*/" for i in range(1, 20))
    try:
        compiler.matcher(Constraint.check(grammar=grammar))
    except ArgumentError as error:
        sys.stdout.write(f"{error}\\n")  # at once: others write too
callers = [threading.Thread(target=refused, args=(letter,)) for letter in sys.argv[2]]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
sys.exit(int(sys.argv[3]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are parked on Linux only")
def test_the_interpreter_may_end_while_grammars_compile():
    """They would be compiled a second or two later, while the process still sleeps."""
    cases = [("k", 0), ("k", 3), ("klmn", 0)]  # a grammar for each letter, the exit code
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENDING, str(DEMO), letters, str(code)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for letters, code in cases
    ]
    ends = [(process.communicate(timeout=120), process.returncode) for process in processes]
    refused = "grammar is too complex: not compiled within 0.01 s\n"
    assert ends == [((refused * len(letters), ""), code) for letters, code in cases]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are parked on Linux only")
def test_a_thread_outside_the_library_is_not_parked():
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait)
    thread.start()
    assert park_thread(thread.native_id, llguidance.LLMatcher) is False
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    while not park_thread(thread.native_id, llguidance.LLMatcher):  # the system may take a moment longer to end it
        pass


class Stuck:
    """In place of llguidance: compiles constraints that say so only when it is let go."""

    def __init__(self, real) -> None:
        self._real = real
        self.go_on = threading.Event()

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def LLMatcher(self, tokenizer, source, **options):
        if "stuck" in source:
            assert self.go_on.wait(60)
        return self._real.LLMatcher(tokenizer, source, **options)


def test_few_compile_at_a_time_and_others_are_told_so():
    compiler = Compiler(TOKENIZERS["demo"], SIZE["demo"], END["demo"], compile_timeout=0.2)
    known = compiler.matcher(Constraint.check(regex="known"))
    compiler._llguidance = stuck = Stuck(compiler._llguidance)

    def compile_(i: int) -> str:
        with pytest.raises(FixminError) as caught:
            compiler.matcher(Constraint.check(regex=f"stuck{i}"))
        return f"{type(caught.value).__name__}: {caught.value}"

    with ThreadPoolExecutor(10) as pool:
        messages = sorted(pool.map(compile_, range(10)))
    assert messages[0] == "ArgumentError: regex is too complex: not compiled within 0.2 s"
    assert len(set(messages)) == 2
    assert messages[-1] == "BusyError: regex was not compiled: 4 others that take long are; try again later"
    assert [message[:4] for message in messages] == ["Argu"] * 4 + ["Busy"] * 6
    assert ids_in(known.mask()) == ids_in(compiler.matcher(Constraint.check(regex="known")).mask())  # needs no place
    stuck.go_on.set()
    for _ in range(100):
        try:
            compiler.matcher(Constraint.check(regex="free"))
            return
        except BusyError:
            continue
    raise AssertionError("places are not given back")


def test_what_failed_to_compile_gives_its_place_back():
    compiler = Compiler(TOKENIZERS["demo"], SIZE["demo"], END["demo"])
    for i in range(6):
        with pytest.raises(ArgumentError, match="unclosed group"):
            compiler.matcher(Constraint.check(regex=f"a{i}("))
    compiler.matcher(Constraint.check(regex="a"))


@pytest.mark.parametrize("argument", ["json_schema", "regex", "grammar", "choices"])
def test_descriptions_have_a_longest_length(argument):
    long = "a" * 300_000
    given = {"json_schema": {"const": long}, "choices": [long[:150_000], long[:150_001]]}.get(argument, long)
    with pytest.raises(ArgumentError, match=rf"{argument} has 3000\d\d characters, but at most 262144 are compiled"):
        Constraint.check(**{argument: given})


@pytest.mark.parametrize(
    "grammar",
    ['root ::= "' + "a" * 40_000 + '"', "root ::= r1\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(400))],
)
def test_large_gbnf_is_refused_before_it_is_translated(grammar):
    with pytest.raises(ArgumentError, match=r"grammar has .* are translated: write it in Lark"):
        Constraint.check(grammar=grammar)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"json_schema": {"const": "ü"}}, "json_schema has \"ü\" at #/const, which cannot be written .* none for 'ü'"),
        ({"json_schema": {"items": {"enum": ["a", {"b": ["ü"]}]}}}, "at #/items/enum, which cannot be written"),
        ({"json_schema": {"properties": {"aü": True}}}, 'json_schema has "aü" at #/properties'),
    ],
)
def test_a_literal_that_the_tokens_cannot_spell_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        start("letters", **arguments)
    start("byte_level", **arguments)


@pytest.mark.parametrize(
    "constraint",
    [{"regex": "a(ü)b"}, {"grammar": 'start: "a" "ü"'}, {"json_schema": {"pattern": "^aü$", "type": "string"}}],
)
def test_where_the_tokens_cannot_go_on_the_constraint_is_at_fault(constraint):
    matcher = start("letters", **constraint)
    with pytest.raises(ArgumentError, match="leaves no way to go on"):
        walk(matcher, np.random.default_rng(0), END["letters"], 50)


SPELLED = [
    {"choices": ["a</s>b"]},
    {"regex": "a</s>b"},
    {"grammar": 'start: "a</s>b"'},
    {"json_schema": {"const": "</s>"}},
]


@pytest.mark.parametrize("constraint", SPELLED)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "demo"])
def test_the_name_of_a_special_token_is_written_in_letters(kind, constraint):
    text = finished_text(kind, 0, **constraint)
    assert text in ("a</s>b", '"</s>"')
    ids = TOKENIZERS[kind].encode(text, parse_special=False)
    forced = start(kind, **constraint).forced()
    assert forced == ids[: len(forced)]
    assert not set(forced) & TOKENIZERS[kind].special_ids


def test_many_choices_are_checked_letter_by_letter():
    choices = [f"number {i}" for i in range(5000)]
    matcher = start("demo", choices=choices)
    assert "".join(TOKENIZERS["demo"].decode(matcher.forced())).startswith("number")
    with pytest.raises(ArgumentError, match=r"choices\[5000\] .* cannot be written .* none for 'ü'"):
        start("letters", choices=[*choices, "x" * 100 + "ü"])


def test_white_space_is_a_regex():
    for pattern in (" ", "\t", "\n+"):
        assert Constraint.check(regex=pattern).text == pattern
    with pytest.raises(ArgumentError, match="regex is empty"):
        Constraint.check(regex="")


def test_equal_constraints_from_different_spellings_share_a_key():
    assert Constraint.check(json_schema='{"type": "null"}') == Constraint.check(json_schema={"type": "null"})
    assert Constraint.check(regex="^ab$") == Constraint.check(regex="ab")
    assert Constraint.check(regex=r"ab\$").text == r"ab\$"
    assert Constraint.check() is None


def test_pydantic_models_are_schemas():
    pydantic = pytest.importorskip("pydantic")

    class City(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=5)
        capital: bool

    for seed in range(5):
        assert City.model_validate_json(finished_text("demo", seed, json_schema=City))
