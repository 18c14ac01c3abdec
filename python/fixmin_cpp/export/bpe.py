"""A tokenizer as llama.cpp's byte-level BPE, and what llama.cpp makes of a text with it.

llama.cpp has two kinds of BPE in all programs built on it: of bytes ("gpt2"), and SentencePiece's, which takes U+2581
for a space. A BPE over characters is expressed as one over bytes whose first merges assemble every character: a merge
needs no token, so parts of characters may be merged too.

llama.cpp always splits a text before it merges. Of its ways "superbpe" splits least: runs of digits from the rest,
and those in threes from their end.
"""

import heapq
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gguf import TokenType

from ..errors import UnsupportedError

_UNUSED, _NORMAL, _CONTROL, _DEFINED, _UNKNOWN = (
    int(TokenType[kind]) for kind in ("UNUSED", "NORMAL", "CONTROL", "USER_DEFINED", "UNKNOWN")
)
#: Texts at whose tokens llama.cpp ends, whatever a file says of them (src/llama-vocab.cpp, special_eog_ids).
ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    }
)
_NO_COUNTERPART = "for which llama.cpp has no counterpart (--no-tokenizer exports the model without it)"
# First byte of every character from U+10000 to U+3FFFF, among them nearly all emoji.
_FOUR_BYTES = 0xF0


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()


def as_letters(text: str) -> str:
    """The letters of the bytes of a text."""
    return "".join(BYTE_LETTERS[byte] for byte in text.encode())


@dataclass(frozen=True, eq=False)
class LlamaTokenizer:
    """What a file says under tokenizer.ggml.*.

    pre: how llama.cpp splits a text, "gpt-2" or "superbpe". tokens, types: text and TokenType of every id. merges:
    pairs, the first goes first.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]

    def encode(self, text: str) -> list[int]:
        """Ids as llama_tokenize gives them with parse_special, written anew from its src/llama-vocab.cpp."""
        ids = []
        for part in self._split_specials(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            for word in self._words(part):
                if word not in self._seen:
                    self._seen[word] = self._word(word)
                ids.extend(self._seen[word])
        return ids

    @cached_property
    def _seen(self) -> dict[str, list[int]]:
        """Ids of words that have come up: all of them, since a certificate's texts are few."""
        return {}

    @property
    def unused(self) -> int | None:
        """An id that stands for no text, if there is one."""
        return next((i for i, kind in enumerate(self.types) if kind == _UNUSED), None)

    # Ids of a text, and of two equal texts the last: llama.cpp's map is filled in order.
    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.tokens)}

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        ranks: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(self.merges):
            ranks.setdefault(pair, rank)
        return ranks

    @cached_property
    def _specials(self) -> list[tuple[str, int]]:
        kinds = (_CONTROL, _DEFINED, _UNKNOWN)
        found = [(t, i) for i, t in enumerate(self.tokens) if self.types[i] in kinds or t in ENDS]
        return sorted(found, key=lambda entry: len(entry[0].encode()), reverse=True)

    def _split_specials(self, text: str) -> list[str | int]:
        """Texts, and ids of the special tokens between them: the longest are looked for first in the whole text."""
        parts: list[str | int] = [text]
        for name, i in self._specials:
            if name and name in text:
                parts = [new for part in parts for new in (_cut(part, name, i) if isinstance(part, str) else [part])]
        return [part for part in parts if part != ""]

    def _words(self, text: str) -> Iterator[str]:
        """The text split, as letters of its bytes."""
        if self.pre == "gpt-2":
            from tokenizers.pre_tokenizers import ByteLevel

            for word, _ in ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str(text):
                yield word
            return
        for is_number, run in itertools.groupby(text, _is_number):
            part = "".join(run)
            for word in re.split(r"(?=(?:[0-9]{3})+(?![0-9]))", part) if is_number else (part,):
                if word:
                    yield as_letters(word)

    def _word(self, word: str) -> list[int]:
        ids: list[int] = []
        for symbol in self._merged(word):
            if (known := self._ids.get(symbol)) is not None:
                ids.append(known)
            else:  # byte by byte of what the letters are in UTF-8: of these only ASCII can be a token
                singles = (self._ids.get(chr(byte)) for byte in symbol.encode() if byte < 0x80)
                ids.extend(i for i in singles if i is not None)
        return ids

    def _merged(self, word: str) -> list[str]:
        """Symbols after all merges: always the one of lowest rank, of several the first."""
        symbols: list[str] = list(word)
        before, after = list(range(-1, len(word) - 1)), [*range(1, len(word)), -1]
        queue: list[tuple[int, int, str, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                pair = symbols[left], symbols[right]
                if (rank := self._ranks.get(pair)) is not None:
                    heapq.heappush(queue, (rank, left, *pair))

        for i in range(len(word) - 1):
            offer(i, i + 1)
        while queue:
            _, left, a, b = heapq.heappop(queue)
            right = after[left]
            if symbols[left] != a or right < 0 or symbols[right] != b:
                continue  # one of them has been merged already
            symbols[left], symbols[right] = a + b, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [symbol for symbol in symbols if symbol]


def from_tokenizer_json(data: Mapping[str, Any], vocab_size: int) -> LlamaTokenizer:
    """A parsed tokenizer.json -> what llama.cpp is told, with a token for each of vocab_size ids.

    Raises UnsupportedError, which names what llama.cpp has no counterpart for.
    """
    model = data["model"]
    by_bytes, pre = _splitting(data.get("pre_tokenizer"))
    _refuse(data, model)
    texts: dict[int, str] = {}
    types: dict[int, int] = {}
    encode = str if by_bytes else as_letters
    for text, i in model["vocab"].items():
        texts[i], types[i] = encode(text), _NORMAL
    for added in data.get("added_tokens") or []:
        texts[added["id"]], types[added["id"]] = added["content"], _CONTROL if added["special"] else _DEFINED
    if not by_bytes and isinstance(model.get("unk_token"), str) and not model.get("fuse_unk"):
        # A character without a token stays in bytes, and llama.cpp drops bytes that are no tokens. Let the unknown
        # token be the byte with which most such characters begin: then each of them gives one unknown token. (Its own
        # name in a text is no token any more.)
        unknown = model["vocab"][model["unk_token"]]
        texts[unknown], types[unknown] = BYTE_LETTERS[_FOUR_BYTES], _UNUSED
    _check(texts, vocab_size)
    taken = set(texts.values())
    for i in range(vocab_size):
        if i not in texts:
            texts[i], types[i] = _free_name(i, taken), _UNUSED
    merges = [] if by_bytes else list(_assembling(text for text in model["vocab"] if len(text) == 1))
    merges += [(encode(a), encode(b)) for a, b in map(_pair, model["merges"])]
    ids = range(vocab_size)
    return LlamaTokenizer(pre, [texts[i] for i in ids], [types[i] for i in ids], merges)


def _splitting(pre: Any) -> tuple[bool, str]:
    """Whether the BPE is one of bytes, and the name of llama.cpp's way to split."""
    if pre is None:
        return False, "superbpe"
    if pre["type"] != "ByteLevel" or pre.get("add_prefix_space"):
        detail = " that puts a space first" if pre["type"] == "ByteLevel" else ""
        raise UnsupportedError(f"the tokenizer splits text by {pre['type']}{detail}, {_NO_COUNTERPART}")
    return True, "gpt-2" if pre.get("use_regex", True) else "superbpe"


def _refuse(data: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    if model["type"] != "BPE":
        raise UnsupportedError(f"the tokenizer is a {model['type']}, {_NO_COUNTERPART}")
    if data.get("normalizer"):
        raise UnsupportedError(f"the tokenizer normalises text ({data['normalizer']['type']}), {_NO_COUNTERPART}")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges", "dropout"):
        if model.get(option):
            raise UnsupportedError(f"the tokenizer has {option}, {_NO_COUNTERPART}")


def _check(texts: Mapping[int, str], vocab_size: int) -> None:
    if beyond := [i for i in texts if not 0 <= i < vocab_size]:
        raise UnsupportedError(f"the tokenizer has the id {beyond[0]}, the model {vocab_size} tokens")
    seen: dict[str, int] = {}
    for i, text in texts.items():
        if seen.setdefault(text, i) != i:
            raise UnsupportedError(f"tokens {seen[text]} and {i} would both be {text!a} in llama.cpp")


def _free_name(i: int, taken: set[str]) -> str:
    name = f"[PAD{i}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _assembling(characters: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Merges that build each character of several bytes from the left: (b1, b2), (b1b2, b3), ...

    From the left, since what begins with a first byte is never part of another character.
    """
    seen = set()
    for character in characters:
        letters = as_letters(character)
        for n in range(1, len(letters)):
            pair = letters[:n], letters[n]
            if pair not in seen:
                seen.add(pair)
                yield pair


def _cut(text: str, name: str, i: int) -> Iterator[str | int]:
    for n, part in enumerate(text.split(name)):
        if n:
            yield i
        yield part


def _is_number(character: str) -> bool:
    """Category N of Unicode."""
    return unicodedata.category(character)[0] == "N"
