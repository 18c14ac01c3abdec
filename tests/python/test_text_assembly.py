"""Incremental decoding and stop strings against the oracle: decode everything, cut at the first stop string."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_models import byte_fallback, byte_level, concatenating

from fixmin_cpp import ArgumentError
from fixmin_cpp.text import IncrementalDecoder, StopStrings, TextAssembler
from fixmin_cpp.tokenizer import TextTokenizer

KINDS = {
    "byte_level": TextTokenizer(byte_level()),
    "concatenating": TextTokenizer(concatenating()),
    "byte_fallback": TextTokenizer(byte_fallback()),
}

# Two letters, so that stop strings overlap and contain each other; texts are made of them and of their beginnings.
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


@st.composite
def texts_and_stops(draw: st.DrawFn) -> tuple[str, list[str]]:
    stops = draw(stop_lists)
    parts = ["a", "b", "\n", *stops, *(stop[:-1] for stop in stops)]
    return "".join(draw(st.lists(st.sampled_from(parts), max_size=8))), stops


def cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(s) for s in stops if s in text), default=len(text))]


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, also ones that no text encodes to, and one that the tokenizer does not know."""
    return st.lists(st.integers(0, KINDS[kind].backend.get_vocab_size()), max_size=30)


def run(assembler: TextAssembler, ids: Sequence[int]) -> list[tuple[int, str]]:
    """Like the engine: pushes tokens until the assembler wants no more."""
    pairs = []
    for token_id in ids:
        pairs += assembler.push(token_id)
        if assembler.stopped:
            break
    return pairs + assembler.finish()


# --- stop strings ------------------------------------------------------------------------------------------------


@given(case=texts_and_stops(), data=st.data())
def test_stop_strings_equal_the_oracle_at_every_split(case, data):
    text, stops = case
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    check_split(text, stops, borders)
    check_split(text, stops, range(len(text)))


def check_split(text: str, stops: Sequence[str], borders: Sequence[int]) -> None:
    finder, released = StopStrings(stops), ""
    for start, end in zip([0, *borders], [*borders, len(text)], strict=True):
        released += finder.feed(text[start:end])
        assert cut(text, stops).startswith(released), "text that belongs to a stop string leaked"
    assert released + finder.finish() == cut(text, stops)
    assert finder.matched == any(s in text for s in stops)


@pytest.mark.parametrize("text", ["abb", "xabbx", "abx", "xab", "aabb", "ab"])
def test_the_leftmost_stop_string_counts_even_if_another_is_complete_first(text):
    for i in range(len(text) + 1):
        check_split(text, ["abb", "b"], [i])
    check_split(text, ["abb", "b"], range(len(text)))


@given(case=texts_and_stops())
def test_only_what_may_become_a_stop_string_is_held_back(case):
    text, stops = case
    finder, released = StopStrings(stops), ""
    for i, letter in enumerate(text):
        released += finder.feed(letter)
        if finder.matched:
            return
        seen = text[: i + 1]
        undecided = [k for k in range(len(seen) + 1) if any(s.startswith(seen[k:]) for s in stops)]
        assert released == seen[: min(undecided, default=len(seen))]


def test_stop_strings_longer_than_the_text_cost_nothing():
    finder = StopStrings(["x" * 1000])
    assert finder.feed("abc") == "abc"
    assert finder.feed("xx") == ""
    assert finder.feed("y") == "xxy"


def test_many_stop_strings_equal_the_oracle():
    """More than could be looked for one by one; some begin with others, and some are a part of others."""
    stops = [f"{a}{b}{c}" for a in "abcdefgh" for b in range(400) for c in ("", "x", "xyz")] + ["b7", "1a", "z" * 5000]
    for text in ("abcdefgh", "a39b", "go to c399xy and d", "h401", "zz" * 100, "y1a0", "b399xyz", "g", "xyzb"):
        for size in (1, 2, 5):
            finder = StopStrings(stops)
            released = "".join(finder.feed(text[i : i + size]) for i in range(0, len(text), size)) + finder.finish()
            assert released == cut(text, stops)
            assert finder.matched == (released != text)


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


# --- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "concatenating"])
@given(data=st.data())
def test_decoding_step_by_step_equals_decoding_at_once(kind, data):
    tokenizer, ids = KINDS[kind], data.draw(ids_of(kind))
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.step(i) for i in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids, skip_special_tokens=True)
    assert not decoder.pending
    assert decoder.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(alphabet="ab the日本é😀Paris\n", max_size=20))
def test_text_survives_encoding_and_step_by_step_decoding(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    decoder = IncrementalDecoder(tokenizer)
    assert "".join([*map(decoder.step, ids), decoder.finish()]) == tokenizer.decode(ids, skip_special_tokens=True)


@given(prompt=st.text(alphabet="ab é日", max_size=6), answer=st.text(alphabet="ab é日", max_size=6))
@pytest.mark.parametrize("kind", KINDS)
def test_continuation_is_what_the_prompt_lacks(kind, prompt, answer):
    tokenizer = KINDS[kind]
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(answer)
    whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
    decoder = IncrementalDecoder(tokenizer, prompt_ids)
    text = "".join([*map(decoder.step, ids), decoder.finish()])
    assert tokenizer.decode(prompt_ids, skip_special_tokens=True) + text == whole


def test_a_continuation_keeps_the_space_that_a_text_loses():
    tokenizer = KINDS["byte_fallback"]
    the = tokenizer.backend.token_to_id("\u2581the")
    decoder = IncrementalDecoder(tokenizer, [the])
    assert tokenizer.decode([the]) == "the"
    assert decoder.step(the) == " the"


def test_a_prompt_that_ends_within_a_character_does_not_come_back():
    tokenizer = KINDS["byte_level"]
    first, last = tokenizer.encode("xé")[0], tokenizer.encode("€")[0]
    decoder = IncrementalDecoder(tokenizer, [first, last])
    assert decoder.step(tokenizer.encode("b")[0]) == "b"


@given(ids=ids_of("byte_fallback"))
def test_a_decoder_that_takes_text_back_does_not_end_the_run(ids):
    decoder = IncrementalDecoder(KINDS["byte_fallback"])
    text = "".join([*map(decoder.step, ids), decoder.finish()])
    # Bytes that are no UTF-8 change how their neighbours decode; everything else must be there, in order.
    words = KINDS["byte_fallback"].backend
    certain = [words.id_to_token(i) for i in ids if words.id_to_token(i) in ("b", "cat", "Paris")]
    position = 0
    for word in certain:
        position = text.index(word, position) + len(word)


def test_byte_fallback_goes_on_where_decodestream_raises():
    tokenizer = KINDS["byte_fallback"]
    byte = lambda b: tokenizer.backend.token_to_id(f"<0x{b:02X}>")  # noqa: E731
    cat = tokenizer.backend.token_to_id("cat")
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.step(i) for i in [byte(0x41), byte(0xE6), cat, cat]]  # 0xE6 makes the decoder take "A" back
    assert "".join(pieces) + decoder.finish() == "A\N{REPLACEMENT CHARACTER}catcat"


def test_special_tokens_have_no_text_and_hold_nothing_back():
    tokenizer = KINDS["concatenating"]
    end = tokenizer.backend.token_to_id("</s>")
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.step(end) == ""
    assert not decoder.pending


# --- both together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "concatenating"])
@given(data=st.data())
def test_assembled_text_equals_the_oracle(kind, data):
    tokenizer, ids = KINDS[kind], data.draw(ids_of(kind))
    full = tokenizer.decode(ids, skip_special_tokens=True)
    parts = st.builds(lambda i, n: full[i : i + n], st.integers(0, len(full)), st.integers(1, 4)).filter(bool)
    stops = data.draw(st.lists(parts, max_size=2)) if full else []
    assembler = TextAssembler(IncrementalDecoder(tokenizer), StopStrings(stops))
    pairs = run(assembler, ids)
    assert "".join(text for _, text in pairs) == cut(full, stops)
    assert [i for i, _ in pairs] == ids[: len(pairs)]
    assert assembler.stopped == bool(stops)
    if not stops:
        assert len(pairs) == len(ids)


@pytest.mark.parametrize("kind", ["byte_level", "concatenating"])
@given(data=st.data())
def test_text_so_far_is_whole_whenever_a_pair_comes_out(kind, data):
    """A run may end anywhere: what was given out plus finish() is then the decoding of the tokens so far."""
    tokenizer, ids = KINDS[kind], data.draw(ids_of(kind))
    end = data.draw(st.integers(0, len(ids)))
    assembler = TextAssembler(IncrementalDecoder(tokenizer), StopStrings(["\n\n", "the end"]))
    pairs = run(assembler, ids[:end])
    full = tokenizer.decode(ids[: len(pairs)], skip_special_tokens=True)
    assert "".join(text for _, text in pairs) == cut(full, ["\n\n", "the end"])


def test_character_over_three_tokens_and_stop_string_over_two():
    tokenizer = KINDS["byte_level"]
    ids = tokenizer.encode("a€b日本\nQuc")
    assert len(ids) > len("a€b日本\nQuc")
    assembler = TextAssembler(IncrementalDecoder(tokenizer), StopStrings(["\nQ"]))
    texts = []
    for token_id in ids:
        texts += [text for _, text in assembler.push(token_id)]
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
        if assembler.stopped:
            break
    assert "".join(texts) == "a€b日本"
    assert len(texts) == len(ids) - 1  # "Qu" is one token and completes the stop string; "c" is not asked for


def test_without_a_tokenizer_tokens_pass_through():
    assembler = TextAssembler(None)
    assert run(assembler, [5, 6]) == [(5, ""), (6, "")]


# --- special tokens in stop strings ------------------------------------------------------------------------------

NAMED = {900: "<end>", 901: "<e", 902: "b"}


@given(
    parts=st.lists(st.sampled_from(["a", "b", "<", "end>", "<end>", "e", 900, 901, 902]), max_size=8),
    stops=st.lists(st.sampled_from(["<end>", "a<end>", "<end>a", "<e", "nd>", "ab", "b<end><e"]), max_size=3),
)
def test_a_stop_string_is_met_by_the_special_token_that_it_names(parts, stops):
    """The oracle: a text and stop strings in which each token is one letter, and stop strings as they are."""
    finder, released = StopStrings(stops, NAMED), ""
    for part in parts:
        released += finder.feed(part) if isinstance(part, str) else finder.feed_special(part)
    released += finder.finish()
    named = {i: name for i, name in NAMED.items() if any(name in stop for stop in stops)}
    sign = {i: chr(0x100000 + i) for i in named}
    full = "".join(part if isinstance(part, str) else sign.get(part, "") for part in parts)
    wanted = set(stops)
    for stop in stops:
        for i in sorted(named, key=lambda i: -len(named[i])):
            stop = stop.replace(named[i], sign[i])
        wanted.add(stop)
    expected = cut(full, sorted(wanted))
    assert released == "".join(letter for letter in expected if letter not in sign.values())
    assert finder.matched == any(stop in full for stop in wanted)


@st.composite
def ids_and_stops(draw: st.DrawFn, kind: str) -> tuple[list[int], list[str]]:
    """Ids among which special tokens are frequent, and stop strings made of their text and of special tokens' names."""
    tokenizer = KINDS[kind]
    names = list(tokenizer.special_tokens.values())
    ids = draw(st.lists(st.one_of(ids_of(kind), st.lists(st.sampled_from([*tokenizer.special_tokens]))), max_size=5))
    flat = [i for part in ids for i in part]
    full = tokenizer.decode(flat, skip_special_tokens=False)
    cuts = st.builds(lambda i, n: full[i : i + n], st.integers(0, len(full)), st.integers(1, 8)).filter(bool)
    return flat, draw(st.lists(st.one_of(st.sampled_from(names), cuts) if full else st.sampled_from(names), max_size=3))


def searched(tokenizer: TextTokenizer, ids: list[int], signs: dict[int, str]) -> str:
    """Text of ids with a sign for each special token that counts; text is put together between two of those only."""
    parts: list[str] = []
    run: list[int] = []
    for i in ids:
        if i in signs:
            parts += [tokenizer.decode(run, skip_special_tokens=True), signs[i]]
            run = []
        else:
            run.append(i)
    return "".join(parts) + tokenizer.decode(run, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte_level", "concatenating"])
@given(data=st.data(), least=st.integers(0, 12))
def test_no_stop_string_is_looked_for_in_the_first_tokens(kind, data, least):
    """The oracle: the text of the first tokens, but for a character that is still incomplete and that more tokens may
    complete; then the rest, cut."""
    tokenizer = KINDS[kind]
    ids, stops = data.draw(ids_and_stops(kind))
    signs = {
        i: chr(0x100000 + i) for i, name in tokenizer.special_tokens.items() if any(name in stop for stop in stops)
    }
    first = [i for i in ids[:least] if i not in tokenizer.special_ids]
    text = [tokenizer.decode(first[:n], skip_special_tokens=True) for n in range(len(first) + 1)]
    ended = len(ids) <= least
    n = max(n for n, one in enumerate(text) if ended or not one.endswith("\N{REPLACEMENT CHARACTER}"))
    wanted = set(stops)
    for stop in stops:
        for i in sorted(signs, key=lambda i: -len(tokenizer.special_tokens[i])):
            stop = stop.replace(tokenizer.special_tokens[i], signs[i])
        wanted.add(stop)
    rest = searched(tokenizer, first[n:] + ids[least:], signs)
    expected = text[n] + "".join(letter for letter in cut(rest, sorted(wanted)) if letter not in signs.values())
    assembler = TextAssembler(IncrementalDecoder(tokenizer), StopStrings(stops, tokenizer.special_tokens), least)
    pairs = run(assembler, ids)
    assert "".join(part for _, part in pairs) == expected
    assert assembler.stopped == any(stop in rest for stop in wanted)
    assert [i for i, _ in pairs] == ids[: len(pairs)]


def test_special_tokens_that_a_stop_string_names_can_be_told_apart():
    names = {i: f"<s{i}>" for i in range(2049)}
    stops = StopStrings(["".join(list(names.values())[:2048]), "A<s0>"], names)
    assert stops.feed("A") == ""
    assert stops.feed_special(2047) == "A"
    with pytest.raises(ArgumentError, match="names 2049 special tokens, but at most 2048"):
        StopStrings(["".join(names.values())], names)


def test_half_a_character_before_a_special_token_that_ends_the_text_is_not_lost():
    tokenizer = KINDS["byte_level"]
    pad, half, b = tokenizer.backend.token_to_id("<pad>"), tokenizer.encode("€")[0], tokenizer.encode("b")[0]
    for stops in ["<pad>"], ["\N{REPLACEMENT CHARACTER}<pad>"], ["b<pad>"]:
        assembler = TextAssembler(IncrementalDecoder(tokenizer), StopStrings(stops, tokenizer.special_tokens))
        text = "".join(part for _, part in run(assembler, [b, half, pad, b]))
        assert text == {"<": "b\N{REPLACEMENT CHARACTER}", "b": "b\N{REPLACEMENT CHARACTER}b"}.get(stops[0][0], "b")


def test_a_special_token_ends_a_text_that_names_it_in_a_stop_string():
    tokenizer = KINDS["byte_level"]
    pad, a, th = (tokenizer.backend.token_to_id(name) for name in ("<pad>", "a", "th"))
    for stops, text in (["<pad>"], "a"), (["a<pad>"], ""), (["<pad>th"], "a"), (["pad"], "atha"), (["a<pad>t"], ""):
        assembler = TextAssembler(IncrementalDecoder(tokenizer), StopStrings(stops, tokenizer.special_tokens))
        pairs = run(assembler, [a, pad, th, a])
        assert "".join(part for _, part in pairs) == text
        assert assembler.stopped == (text != "atha")
    spelled = tokenizer.encode("a<pad>a", parse_special=False)
    assembler = TextAssembler(IncrementalDecoder(tokenizer), StopStrings(["<pad>"], tokenizer.special_tokens))
    assert "".join(part for _, part in run(assembler, spelled)) == "a"
