"""Ids and bytes of text, against the tokenizers library's own answers."""

import asyncio
import functools
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from toy_models import SPECIALS, byte_fallback, byte_level, concatenating, pieces, whole_words

from fixmin_cpp import constrain
from fixmin_cpp.errors import ArgumentTypeError, GGUFError
from fixmin_cpp.openai_api.chat import ChatTemplate
from fixmin_cpp.tokenizer import TextTokenizer, decoding

KINDS = {"byte_level": byte_level, "concatenating": concatenating, "byte_fallback": byte_fallback}
TOKENIZERS = {kind: TextTokenizer(make()) for kind, make in KINDS.items()}

kinds = pytest.mark.parametrize("kind", KINDS)
texts = st.text(alphabet="ab the日本é😀Paris\n", max_size=20)


# --- sequences -----------------------------------------------------------------------------------------------------


def scanned(tokenizer: TextTokenizer, text: str) -> list[list[int]]:
    """A look at every token of the vocabulary: does it hold the text, does it end as the text begins?"""
    found = []
    for i in range(tokenizer.backend.get_vocab_size()):
        token = tokenizer.backend.decode([i], skip_special_tokens=False)
        if text in token:
            found.append([i])
            continue
        begun = [n for n in range(len(text) - 1, 0, -1) if token.endswith(text[:n])]
        found += [[i, *tokenizer.backend.encode(text[n:], add_special_tokens=False).ids] for n in begun]
    return found


@kinds
@given(data=st.data())
def test_sequences_with_a_text_are_those_that_a_scan_finds(kind, data):
    tokenizer = TOKENIZERS[kind]
    size = tokenizer.backend.get_vocab_size()
    tokens = st.lists(st.integers(0, size - 1), min_size=1, max_size=3).map(lambda ids: tokenizer.backend.decode(ids))
    start = data.draw(st.integers(0, 3))
    text = data.draw(st.one_of(texts, tokens).map(lambda text: text[start:]).filter(bool))
    assert tokenizer.sequences_with(text) == scanned(tokenizer, text)


# --- bytes -------------------------------------------------------------------------------------------------------


@kinds
@given(text=texts)
def test_bytes_of_tokens_make_the_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    if kind == "concatenating":
        text = tokenizer.decode(ids)  # without what it has no tokens for
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


@pytest.mark.parametrize("letter", ["ü", "日", "😀"])
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_bytes_of_parts_of_a_character_are_the_real_ones(kind, letter):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(letter)
    parts = [tokenizer.token_bytes(i) for i in ids]
    assert len(parts) > 1
    assert b"".join(parts) == letter.encode()


@kinds
def test_bytes_of_special_and_unknown_tokens(kind):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.token_bytes(tokenizer.backend.token_to_id("</s>")) == b"</s>"
    assert tokenizer.token_bytes(tokenizer.backend.get_vocab_size()) == b""


def test_bytes_of_tokens_that_begin_with_a_space():
    tokenizer = TOKENIZERS["byte_fallback"]
    token_id = tokenizer.backend.token_to_id("\u2581the")
    assert tokenizer.token_bytes(token_id) == b" the"
    assert tokenizer.decode([token_id]) == "the"


def added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens(["zap", "a b", "\u2581zip", "日本語"])
    return tokenizer


@kinds
@pytest.mark.parametrize("word", ["zap", "a b", "\u2581zip", "日本語"])
def test_bytes_of_added_tokens_are_what_the_decoder_makes_of_them(kind, word):
    tokenizer = TextTokenizer(added(KINDS[kind]()))
    token_id, b = tokenizer.backend.token_to_id(word), tokenizer.backend.token_to_id("b")
    assert "b" + tokenizer.token_bytes(token_id).decode() + "b" == tokenizer.decode([b, token_id, b])


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ],
)
def test_where_tokens_have_no_fixed_text_the_bytes_are_those_of_the_token_alone(decoder):
    backend = byte_fallback()
    backend.decoder = decoder
    tokenizer = TextTokenizer(backend)
    assert tokenizer.spelling is None
    token_id = backend.token_to_id("\u2581the")
    assert tokenizer.token_bytes(token_id) == backend.decode([token_id]).encode()


# --- names of special tokens in a text -----------------------------------------------------------------------------


def demo() -> Tokenizer:
    return Tokenizer.from_file(str(Path(__file__).parents[2] / "examples" / "demo" / "fixed" / "tokenizer.json"))


ALL = {**TOKENIZERS, **{make.__name__: TextTokenizer(make()) for make in (whole_words, pieces, demo)}}
# What is made of names and of parts of names, to be found in the middle of one another.
tricky = st.lists(st.sampled_from(["</s>", "<s>", "<", "s>", "</", "a", " ", "b", "<pad>", "<unk>"]), max_size=8).map(
    "".join
)


@pytest.mark.parametrize("kind", ALL)
@given(text=tricky)
def test_text_holds_no_control_token_unless_it_may(kind, text):
    tokenizer = ALL[kind]
    ids = tokenizer.encode(text, parse_special=False)
    unknown = tokenizer.backend.token_to_id("<unk>")
    assert not {i for i in ids if i != unknown} & tokenizer.special_ids
    if kind in ("byte_level", "byte_fallback", "demo") or (kind == "pieces" and "<unk>" not in text):
        assert tokenizer.decode(tokenizer.encode("a" + text, parse_special=False)) == "a" + text


@pytest.mark.parametrize("kind", ALL)
@given(text=st.text(alphabet="ab s</>\n\u2581é日", max_size=12))
def test_text_without_a_name_gives_the_same_ids_either_way(kind, text):
    tokenizer = ALL[kind]
    if not any(name in text for name in SPECIALS):
        assert (
            tokenizer.encode(text, parse_special=False) == tokenizer.backend.encode(text, add_special_tokens=False).ids
        )


@pytest.mark.parametrize("kind", ALL)
def test_names_are_read_as_tokens_by_default(kind):
    tokenizer = ALL[kind]
    assert tokenizer.backend.token_to_id("</s>") in tokenizer.encode("a </s> b")


def test_added_tokens_that_are_not_special_are_words_either_way():
    backend = byte_level()
    backend.add_tokens(["<tool>", AddedToken("<b>", single_word=True)])
    tokenizer = TextTokenizer(backend, bos_id=backend.token_to_id("<tool>"))
    word, tool = backend.token_to_id("<b>"), backend.token_to_id("<tool>")
    assert tokenizer.encode("<b>", parse_special=False) == [word]
    assert tool in tokenizer.encode("a<tool>")
    assert tool not in tokenizer.encode("a<tool>", parse_special=False)  # it begins texts: whoever named it could too
    assert tokenizer.bos_token == "<tool>"


def test_a_word_of_the_vocabulary_that_ends_texts_stays_a_word():
    backend = byte_level()
    newline = backend.encode("\n").ids[0]
    tokenizer = TextTokenizer(backend, eos_id=newline)
    assert tokenizer.encode("a\n", parse_special=False) == backend.encode("a\n").ids


def test_ids_that_a_post_processor_adds_are_the_same_either_way():
    from tokenizers.processors import TemplateProcessing

    backend = byte_level()
    ends = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer = TextTokenizer(backend)
    expected = [ends[0][1], *tokenizer.encode("ab<"), ends[1][1]]
    assert tokenizer.encode("ab<", add_special_tokens=True, parse_special=False) == expected


# --- the same of a model -----------------------------------------------------------------------------------------

NAMED = "a</s>b"


def test_every_method_that_takes_text_may_read_names_as_text(model, tmp_path):
    tokens, text = model.encode(NAMED), model.encode(NAMED, parse_special=False)
    assert len(tokens) < len(text)
    assert model.decode(text) == NAMED
    for special, ids in ((True, tokens), (False, text)):
        given = {"parse_special": special}
        assert model.generate(NAMED, max_new_tokens=2, **given).timings.n_prompt == len(ids)
        assert model.generate([NAMED], max_new_tokens=2, **given)[0].timings.n_prompt == len(ids)
        with model.stream(NAMED, max_new_tokens=1, **given) as stream:
            list(stream)
        assert stream.completion.timings.n_prompt == len(ids)
        assert asyncio.run(model.agenerate(NAMED, max_new_tokens=2, **given)).timings.n_prompt == len(ids)
        assert model.score(NAMED, **given).token_ids == ids
        assert model.score([NAMED], **given)[0].token_ids == ids
        assert np.array_equal(model.logits(NAMED, **given), model.logits(ids))
        assert np.array_equal(model.hidden_states(NAMED, 0, **given), model.hidden_states(ids, 0))
        assert np.array_equal(model.codes(NAMED, **given), model.codes(ids))
        assert model.beam_search(NAMED, max_new_tokens=2, **given) == model.beam_search(ids, max_new_tokens=2)
        model.save_state(tmp_path / "state", NAMED, **given)
        assert model.load_state(tmp_path / "state") == ids


@pytest.mark.parametrize("wrong", [0, "no"])
def test_parse_special_is_true_or_false(model, wrong):
    for method in (model.encode, model.generate, model.score, model.logits, model.codes):
        with pytest.raises(ArgumentTypeError, match="parse_special must be True or False"):
            method("ab", parse_special=wrong)


@pytest.mark.parametrize("wrong", [3, None, b"a"])
def test_what_is_no_text_is_refused(wrong):
    with pytest.raises(ArgumentTypeError, match="text must be a str"):
        TOKENIZERS["byte_level"].encode(wrong, parse_special=False)


class Mine(Exception):
    pass


def raises(*_: object) -> None:
    raise Mine("of the handler")


class Raises:
    def method(self, *_: object) -> None:
        raises()

    __call__ = method


HANDLERS = {"function": raises, "method": Raises().method, "object": Raises(), "partial": functools.partial(raises, 1)}


@pytest.mark.parametrize("handler", HANDLERS)
def test_what_a_signal_handler_raises_goes_to_the_caller(handler, monkeypatch):
    """It is no failure of the tokenizer, the template or the grammar that it interrupts."""

    class Interrupted:
        def encode(self, *_: object, **__: object) -> None:
            signal.raise_signal(signal.SIGUSR1)

        generate = encode

    template = ChatTemplate("{{ messages }}")
    template._template = Interrupted()
    monkeypatch.setattr("llguidance.gbnf_to_lark.gbnf_to_lark", Interrupted().encode)
    before = signal.signal(signal.SIGUSR1, HANDLERS[handler])
    try:
        with pytest.raises(Mine):
            TOKENIZERS["byte_level"]._encode(Interrupted(), "a", False, "prompt")
        with pytest.raises(Mine), decoding():
            signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Mine):
            template._render()
        with pytest.raises(Mine):
            constrain._lark_text('root ::= "a"')
        with pytest.raises(GGUFError, match="fails: other"), decoding():
            raise Exception("other")
    finally:
        signal.signal(signal.SIGUSR1, before)
