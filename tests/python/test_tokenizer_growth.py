"""Tokenizers that would fill the memory, or make the library panic: errors."""

import json

import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from toy_models import byte_level

from fixmin_cpp.errors import ArgumentError, GGUFError
from fixmin_cpp.tokenizer import TextTokenizer
from fixmin_cpp.tokenizer_growth import growth

KEY = "tokenizer.huggingface.json"
TEXTS = ["a", " ", "aa", "a b  c", "ﬁ İ é\u0301", "日本 a", "\n\n"]


def replace(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: dict[str, object]) -> dict[str, object]:
    return {"type": "Sequence", "normalizers": list(parts)}


BOMB = sequence(*[replace({"String": "a"}, "a" * 50)] * 5)


def changed(**parts: object) -> dict[str, object]:
    """Metadata with the tests' tokenizer, some parts of it replaced."""
    return {KEY: json.dumps(json.loads(byte_level().to_str()) | parts)}


@pytest.mark.parametrize(
    ("normalizer", "bound"),
    [
        (None, 1),
        ({"type": "NFKC"}, 1),
        (replace({"String": " "}, "▁"), 3),
        (replace({"String": "aa"}, "xyz"), 2),
        (replace({"String": "日"}, "x"), 1),
        (replace({"Regex": "[a ]"}, "xyz"), 3),
        (replace({"Regex": "x*"}, "xyz"), 7),
        (replace({"Regex": r"\p{L}"}, "-"), 3),
        ({"type": "Prepend", "prepend": "▁"}, 4),
        (sequence({"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁"), {"type": "ByteLevel"}), 24),
        (BOMB, 50**5),
    ],
)
def test_no_normalizer_makes_more_than_the_bound(normalizer, bound):
    assert growth(normalizer) == bound
    if normalizer is None or normalizer is BOMB or normalizer["type"] == "NFKC":  # whose letters grow a little
        return
    tokenizer = byte_level()
    tokenizer.normalizer = Tokenizer.from_str(
        json.dumps(json.loads(tokenizer.to_str()) | {"normalizer": normalizer})
    ).normalizer
    for text in TEXTS:
        made = tokenizer.normalizer.normalize_str(text)
        assert len(made.encode()) <= bound * len(text.encode()), text


def test_byte_levels_that_follow_each_other_grow_what_is_not_ascii():
    parts = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}] * 6
    assert growth({"type": "Sequence", "pretokenizers": parts}) == 64
    made = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(False, False)] * 6).pre_tokenize_str("é" * 20)
    assert 20 * 2 * 16 < len("".join(piece for piece, _ in made).encode()) <= 64 * 20 * 2


def test_the_table_of_sentencepiece_says_what_its_characters_become():
    import base64

    table = base64.b64encode((8).to_bytes(4, "little") + bytes(8) + b"ab\0" + b"x" * 900 + b"\0c\0").decode()
    assert growth({"type": "Precompiled", "precompiled_charsmap": table}) == 900
    for wrong in (None, 5, "%", "AAAA"):
        assert growth({"type": "Precompiled", "precompiled_charsmap": wrong}) == 1


def test_a_text_that_would_fill_the_memory_is_refused():
    tokenizer = TextTokenizer.from_metadata(changed(normalizer=BOMB))
    with pytest.raises(ArgumentError, match="prompt: the model's tokenizer may make 312,500,000 bytes of its 1"):
        tokenizer.encode("a", name="prompt")
    assert tokenizer.encode("") == []


def test_replacements_that_do_not_follow_each_other_are_no_bomb():
    """As of punctuation, of entities, of names for what an expression finds."""
    signs = [replace({"String": sign}, f" {sign} ") for sign in ".,;:!?()[]"]
    entities = [replace({"String": sign}, f"&{name};") for sign, name in zip("&<>", ("amp", "lt", "gt"), strict=True)]
    names = [replace({"Regex": rf"{name}\\S+"}, f"<{name}>") for name in ("http", "user", "mail", "number", "word")]
    assert (growth(sequence(*signs)), growth(sequence(*entities))) == (3, 5)
    for parts in (signs, entities, names):
        tokenizer = TextTokenizer.from_metadata(changed(normalizer=sequence(*parts)))
        text = "a cat (sat) < on. " * 20_000
        assert tokenizer.encode(text) == tokenizer.backend.encode(text, add_special_tokens=False).ids
    decoder = {"type": "Sequence", "decoders": [replace({"String": chr(i)}, " " * 2**i) for i in range(1, 6)]}
    assert growth(decoder) == 32


def test_a_bomb_may_follow_what_is_none():
    names = [replace({"Regex": rf"{name}\\S+"}, f"<{name}>") for name in ("http", "user", "mail", "number", "word")]
    tokenizer = TextTokenizer.from_metadata(changed(normalizer=sequence(*names, BOMB)))
    assert tokenizer.encode("b") == tokenizer.backend.encode("b", add_special_tokens=False).ids
    with pytest.raises(ArgumentError, match="tokenizer may make"):
        tokenizer.encode("aa")


def test_a_long_text_is_no_bomb():
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert len(TextTokenizer(tokenizer).encode("a " * 300_000)) > 300_000


def test_a_decoder_that_would_fill_the_memory_is_refused():
    decoder = {"type": "Sequence", "decoders": [replace({"String": "a"}, "a" * 50)] * 5}
    with pytest.raises(GGUFError, match=f"{KEY} is not a tokenizer .* may make 312,500,000 bytes of one"):
        TextTokenizer.from_metadata(changed(decoder=decoder))


def decode_all(tokenizer: TextTokenizer) -> None:
    for i in range(tokenizer.backend.get_vocab_size()):
        tokenizer.decode([i])


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": replace({"String": ""}, "aa")},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"decoder": {"type": "Strip", "content": "a", "start": 10, "stop": 10}},
    ],
    ids=str,
)
def test_a_panic_is_an_error(parts):
    """Of loading; a decoder's may come with the first token whose text it cannot make."""
    with pytest.raises(GGUFError, match="tokenizer"):
        decode_all(TextTokenizer.from_metadata(changed(**parts)))


def test_words_that_a_vocabulary_lacks_are_errors_of_the_text():
    words = {"type": "WordLevel", "unk_token": "none", "vocab": {"cat": 0, "sat": 1}}
    tokenizer = TextTokenizer.from_metadata(changed(model=words, pre_tokenizer={"type": "Whitespace"}, normalizer=None))
    assert tokenizer.encode("cat sat cat") == [0, 1, 0]
    with pytest.raises(ArgumentError, match=r"prompt: the model's tokenizer cannot read it: .*UNK"):
        tokenizer.encode("cat dog", name="prompt")
    with pytest.raises(ArgumentError, match="messages: the model's tokenizer cannot read it"):
        tokenizer.encode_template("dog", {})
