"""Ids and bytes of text, against the tokenizers library's own answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from toy_models import byte_fallback, byte_level, concatenating

from fixmin_cpp.tokenizer import TextTokenizer

KINDS = {"byte_level": byte_level, "concatenating": concatenating, "byte_fallback": byte_fallback}
TOKENIZERS = {kind: TextTokenizer(make()) for kind, make in KINDS.items()}

kinds = pytest.mark.parametrize("kind", KINDS)
texts = st.text(alphabet="ab the日本é😀Paris\n", max_size=20)


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
