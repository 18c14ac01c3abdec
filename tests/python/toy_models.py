"""Small tokenizers of the kinds that checkpoints carry, made here so that tests need no files, and models with them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from gguf_factory import make_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]


def byte_level() -> Tokenizer:
    """Ids 0-255 are single bytes, then a few merges, some of which end inside a character; then the specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    sent = {b: c for c, b in _byte_of_letter().items()}
    merges = []
    for pair in [b"th", b"he", b" t", "é".encode(), "日".encode()[:2], b"a\xe6", b"\n\n", b"ab", b"Qu"]:
        left, right = sent[pair[0]], sent[pair[1]]
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *"QWPLU .,:?!\n", "é", "日", "本", "\N{REPLACEMENT CHARACTER}", "😀"]
MERGES = [("t", "h"), ("th", "e"), ("a", "b"), ("ab", "c"), ("日", "本"), ("\n", "\n"), (" ", "t"), ("P", "a")]


def concatenating(letters: Sequence[str] = LETTERS, merges: Sequence[tuple[str, str]] = MERGES) -> Tokenizer:
    """Like the published checkpoints': characters and n-grams, not bytes; decoding is plain concatenation.

    No normaliser, no pre-tokeniser, no byte fallback; U+FFFD is an ordinary token, as ids below 0xD800 are chr(id).
    """
    vocab = {letter: i for i, letter in enumerate(letters)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    for special in SPECIALS:
        vocab[special] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([])
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama-like: a word starts with U+2581, unknown characters are bytes, the space that starts a text is dropped."""
    words = ["<unk>", *SPECIALS[:3], "\u2581", "\u2581the", "\u2581a", "b", "cat", "Paris"]
    vocab = {word: i for i, word in enumerate(words)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIALS[:3])
    return tokenizer


def whole_words() -> Tokenizer:
    """Of a kind whose model itself knows special tokens' names."""
    words = [*SPECIALS, "a", "b", "<", ">", "s", "/"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def pieces() -> Tokenizer:
    """Like T5's: scores for pieces, special tokens among them."""
    scored = [(name, 0.0) for name in SPECIALS] + [(letter, -2.0) for letter in "\u2581ab</s>kpadunt"]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=3))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIALS[:3])
    return tokenizer


def write_model(
    path: Path,
    tokenizer: Tokenizer,
    eos_id: int | None = None,
    more: Callable[[GGUFWriter], None] = lambda writer: None,
    **arguments: Any,
) -> Path:
    """A small random model with this tokenizer; eos_id None: the id of "</s>". `more` adds other keys."""
    end = tokenizer.token_to_id("</s>") if eos_id is None else eos_id

    def add_eos(writer: GGUFWriter) -> None:
        writer.add_uint32("tokenizer.ggml.eos_token_id", end)
        more(writer)

    return make_model(
        path, vocab_size=tokenizer.get_vocab_size(), tokenizer_json=tokenizer.to_str(), edit=add_eos, **arguments
    )


def _byte_of_letter() -> dict[str, int]:
    """Inverse of GPT-2's mapping of bytes to printable letters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
