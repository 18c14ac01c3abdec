"""Ids and text against the package `tokenizers` itself: a tokenizer.json read by it alone, texts of all scripts, and
tokens that arrive one by one with a border at every place."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from toy_models import SPECIALS, byte_fallback, byte_level, concatenating, pieces, whole_words, write_model

import fixmin_cpp
from fixmin_cpp.text import IncrementalDecoder, TextAssembler
from fixmin_cpp.tokenizer import TextTokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
#: Tokenizers that are no part of this repository, one a folder.
OTHERS = Path(os.environ.get("FIXMIN_TOKENIZERS", ROOT.parent / "shared" / "tokenizers"))

TOYS = {made.__name__: made for made in (byte_level, concatenating, byte_fallback, whole_words, pieces)}
_named = {file.read_text(): "demo" for file in DEMO.glob("*/tokenizer.json")}  # one for all three, as of now
_named |= {file.read_text(): file.parent.name for file in sorted(OTHERS.glob("*/tokenizer.json"))}
FILES = {name: text for text, name in _named.items()}
assert "demo" in FILES
KINDS = [*TOYS, *FILES]
if not OTHERS.is_dir():
    missing = pytest.mark.skip(reason=f"no tokenizers at {OTHERS} (FIXMIN_TOKENIZERS)")
    KINDS.append(pytest.param("others", marks=missing))
kinds = pytest.mark.parametrize("kind", KINDS)
#: In these a byte of a text is a token where nothing else is: what stands before half a character is certain.
EXACT = ("byte_level", "concatenating", "whole_words", "pieces", *FILES)
LOST = "\N{REPLACEMENT CHARACTER}"


@cache
def source(kind: str) -> str:
    """The tokenizer.json."""
    return TOYS[kind]().to_str() if kind in TOYS else FILES[kind]


@cache
def peer(kind: str) -> Tokenizer:
    """What reads it without this project."""
    return Tokenizer.from_str(source(kind))


@cache
def ours(kind: str) -> TextTokenizer:
    """As from a model's file."""
    return TextTokenizer(Tokenizer.from_str(source(kind)))


# --- texts --------------------------------------------------------------------------------------------------------

WORDS = [
    "the",
    "cat",
    "Paris",
    "Qu",
    "Question:",
    "Straße",
    "Ελλάδα",
    "привет",
    "հայերեն",
    "שלום",
    "مرحبا",
    "हिन्दी",
    "বাংলা",
    "தமிழ்",
    "ไทย",
    "ລາວ",
    "ខ្មែរ",
    "မြန်မာ",
    "ქართული",
    "አማርኛ",
    "日本語",
    "ひらがな",
    "カタカナ",
    "한국어",
    "中文",
    "𠀀𠮷",
    "ᏣᎳᎩ",
    "ᓄᓇ",
    "𐌰𐌱",
    "𝔉𝔯",
    "①½Ⅷ",
    "ﬁ",
    "ǅ",
    "İı",
    "😀",
    "👩\u200d👩\u200d👧",
    "🇩🇪",
    "👍🏽",
    "1️⃣",
    "❤️",
    "Ġthe",
    "Ċ",
    "▁the",
    "<0xE6>",
    "<0x0A>",
    "�",
    "é日",
]
ODD = [
    *(
        "\0",
        "\x07",
        "\x1b[0m",
        "\x7f",
        "\x85",
        "\xa0",
        "\xad",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " ",
        "  ",
        "\u3000",
        "\u2028",
    ),
    *("\u200b", "\u200d", "\u202e", "\ufeff", "\ufffe", "\uffff", "\U0010ffff", "\ue000", "\ud7ff", "\U000e0001"),
    *("e\u0301", "\u0301", "\ufe0f", "\U0001f3fd", "\u0e33", "\u1100\u1161", "\u0378"),  # marks without a letter too
]
NAMES = [*SPECIALS, "</", "s>", "<", "<s", "<<s>>", "<pad></s>", "</s ><unk>"]
texts = st.one_of(
    st.text(max_size=24),
    st.lists(st.one_of(st.sampled_from(WORDS), st.sampled_from(ODD), st.sampled_from(NAMES)), max_size=8).map("".join),
    st.lists(st.sampled_from([*WORDS, *NAMES]), max_size=8).map(" ".join),
)
unnamed = texts.map(lambda text: text.replace("<", "("))  # no name of a special token
many = settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
some = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@kinds
@many
@given(text=texts)
def test_ids_and_text_are_those_of_tokenizers(kind, text):
    ids = peer(kind).encode(text, add_special_tokens=False).ids
    assert ours(kind).encode(text) == ids
    for skip in (False, True):
        assert ours(kind).decode(ids, skip_special_tokens=skip) == peer(kind).decode(ids, skip_special_tokens=skip)


@cache
def encoding_names_as_text(kind: str) -> Tokenizer:
    found = peer(kind).from_str(source(kind))
    found.encode_special_tokens = True
    return found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("whole_words", "pieces")])
@many
@given(text=texts)
def test_names_as_text_are_those_of_tokenizers(kind, text):
    """By its own switch, which does it where the model inside does not know the names as words."""
    expected = encoding_names_as_text(kind).encode(text, add_special_tokens=False).ids
    assert ours(kind).encode(text, parse_special=False) == expected


@pytest.mark.parametrize("kind", TOYS)
@some
@given(text=texts)
def test_what_training_left_in_a_file_does_not_cut_or_fill_a_text(kind, text):
    spoiled = peer(kind).from_str(source(kind))
    spoiled.enable_truncation(3)
    spoiled.enable_padding(length=50, pad_token="<pad>", pad_id=spoiled.token_to_id("<pad>"))
    ends = [(name, spoiled.token_to_id(name)) for name in ("<s>", "</s>")]
    spoiled.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer = TextTokenizer.from_metadata({"tokenizer.huggingface.json": spoiled.to_str()})
    plain = peer(kind).encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == plain
    assert tokenizer.encode(text, add_special_tokens=True) == [ends[0][1], *plain, ends[1][1]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, fixmin_cpp.Model]]:
    """A model with each of the tokenizers, made when it is asked for."""
    folder = tmp_path_factory.mktemp("models")

    class Made(dict[str, fixmin_cpp.Model]):
        def __missing__(self, kind: str) -> fixmin_cpp.Model:
            sizes = {"embedding_length": 32, "feed_forward_length": 32, "block_count": 1, "context_length": 256}
            path = write_model(folder / f"{kind}.gguf", Tokenizer.from_str(source(kind)), **sizes)
            self[kind] = fixmin_cpp.Model(path)
            return self[kind]

    made = Made()
    yield made
    for model in made.values():
        model.close()


@kinds
@some
@given(text=texts, other=texts)
def test_a_model_reads_and_writes_as_tokenizers(kind, models, text, other):
    """Through the file; a list of texts too."""
    model = models[kind]
    ids = [peer(kind).encode(one, add_special_tokens=False).ids for one in (text, other)]
    assert model.encode(text) == ids[0]
    assert model.encode([text, other]) == ids
    assert model.tokenizer.encode(text, add_special_tokens=False).ids == ids[0]
    assert model.decode(ids[0]) == peer(kind).decode(ids[0], skip_special_tokens=False)
    assert model.decode(ids) == peer(kind).decode_batch(ids, skip_special_tokens=False)


# --- tokens one by one --------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What came of tokens pushed one by one: the text after each, and with what was held back at the end."""

    after: list[str]
    whole: str


def told(decoder: IncrementalDecoder, ids: Sequence[int]) -> Told:
    after, text = [], ""
    for token_id in ids:
        text += decoder.step(token_id)
        after.append(text)
    return Told(after, text + decoder.finish())


def check_from(kind: str, ids: Sequence[int], start: int, ends: Sequence[int]) -> None:
    """ids[:start] were the prompt; the tokens behind come one by one, and none do after each of `ends`."""
    decode = lambda ids: peer(kind).decode(ids, skip_special_tokens=True)  # noqa: E731
    prompt = decode(ids[:start])
    half = prompt.endswith(LOST)  # the prompt ends within a character: then the text begins behind it
    begin = start if half else 0
    dropped = 0 if half else len(prompt)
    for end in ends:
        full = decode(ids[begin:end])[dropped:]
        got = told(IncrementalDecoder(ours(kind), ids[:start]), ids[start:end])
        if kind in EXACT:
            assert got.whole == full
        else:
            # Where half a character follows `tokenizers` itself takes whole ones before it back: they must not be lost.
            certain = [""] + [decode(ids[begin:n])[dropped:] for n in range(start, end + 1)]
            certain = [text for text in certain if not text.endswith(LOST)][-1]
            assert got.whole.startswith(certain)
            assert not got.whole[len(certain) :].strip(LOST)
            assert got.whole == full or full.endswith(LOST)
        final = decode(ids[begin:])[dropped:]
        for n, text in enumerate(got.after, start + 1):
            assert final.startswith(text), "text that others decode differently was told"
            so_far = decode(ids[begin:n])[dropped:]
            if not so_far.endswith(LOST):
                assert text == so_far, "text that is certain was held back"


@kinds
@some
@given(text=texts)
def test_every_split_point(kind, text):
    """Each as the end of the prompt, and as the end of the text."""
    ids = peer(kind).encode(text, add_special_tokens=False).ids
    for k in range(len(ids) + 1):
        check_from(kind, ids, k, [len(ids)])
    check_from(kind, ids, 0, range(len(ids)))


@kinds
@some
@given(text=texts.map(lambda text: text[:4]))
def test_every_pair_of_split_points(kind, text):
    ids = peer(kind).encode(text, add_special_tokens=False).ids
    for start in range(len(ids)):
        check_from(kind, ids, start, range(start, len(ids) + 1))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_fallback"])
@some
@given(data=st.data())
def test_every_split_point_of_any_ids(kind, data):
    """Also ids that no text has: halves of characters, special tokens, one that the tokenizer does not know."""
    size = peer(kind).get_vocab_size()
    special = st.sampled_from([peer(kind).token_to_id(name) for name in SPECIALS])
    ids = data.draw(st.lists(st.one_of(st.integers(0, size), special), max_size=12))
    for k in range(len(ids) + 1):
        check_from(kind, ids, k, [len(ids)])
    check_from(kind, ids, 0, range(len(ids)))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "demo"])
@many
@given(text=unnamed)
def test_pieces_are_whole_characters(kind, text):
    """Where every byte is a token: what has come is always the text up to a character, and never half of one."""
    ids = peer(kind).encode(text, add_special_tokens=False).ids
    whole = text.removeprefix(" ") if kind == "byte_fallback" else text  # its decoder drops a space that begins a text
    got = told(IncrementalDecoder(ours(kind)), ids)
    assert got.whole == peer(kind).decode(ids)
    if kind != "byte_fallback":
        assert got.whole == whole
    for text_so_far in got.after:
        assert got.whole.startswith(text_so_far)


@kinds
@some
@given(text=texts)
def test_pairs_hold_every_token_and_all_of_the_text_once(kind, text):
    """As a stream gives them: ids in order, none twice, and their texts joined."""
    ids = peer(kind).encode(text, add_special_tokens=False).ids
    assembler = TextAssembler(IncrementalDecoder(ours(kind)))
    pairs = [pair for token_id in ids for pair in assembler.push(token_id)] + assembler.finish()
    assert [token_id for token_id, _ in pairs] == ids
    assert "".join(part for _, part in pairs) == peer(kind).decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(text=texts.filter(bool), seed=st.integers(0, 2**32))
def test_a_stream_is_what_tokenizers_decode_at_once(kind, models, text, seed):
    """Generated by a random model: most of its tokens are halves of characters or of no text."""
    model = models[kind]
    ids = peer(kind).encode(text, add_special_tokens=False).ids
    if not ids or len(ids) > 200:
        return
    with model.stream(ids, max_new_tokens=24, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed) as stream:
        parts = list(stream)
    new = stream.completion.token_ids
    assert [part.token_id for part in parts] == new
    prompt = peer(kind).decode(ids, skip_special_tokens=True)
    if prompt.endswith(LOST):
        ids, prompt = [], ""
    whole = peer(kind).decode([*ids, *new], skip_special_tokens=True)
    assert "".join(part.text for part in parts) == stream.completion.text == whole[len(prompt) :]


def test_the_others_are_of_the_published_kind():
    """What tests/python/toy_models.py says of its `concatenating`."""
    if "bvv241-2-3" not in FILES:
        pytest.skip(f"no bvv241-2-3 at {OTHERS} (FIXMIN_TOKENIZERS)")
    data = json.loads(source("bvv241-2-3"))
    toy = json.loads(source("concatenating"))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert data[part] == toy[part]
