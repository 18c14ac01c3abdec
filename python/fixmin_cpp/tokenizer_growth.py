"""How many bytes a tokenizer.json may make of one byte of text.

A file of a few hundred bytes can ask for replacements of replacements that fill any memory, and tokenizers (Rust) ends
the process without memory. What this module says is an upper bound, not what a given text gives.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["growth", "steps"]


def growth(part: Any) -> int:
    """Bytes that a normalizer, pre_tokenizer or decoder of a tokenizer.json makes of a byte, at most.

    A byte that one step of a sequence has put there grows in a later one only if that looks for its letter. So this is
    the largest product along steps that can follow each other so.
    """
    most: list[tuple[int, set[str] | None]] = []  # for each step so far: up to it, and the letters that it puts there
    for step in steps(part):
        sought, put = _letters(step)
        before = [n for n, letters in most if sought is None or letters is None or sought & letters]
        most.append((_of_step(step) * max(before, default=1), put))
    return max((n for n, _ in most), default=1)


def steps(part: Any) -> Iterator[Any]:
    """The parts that are no sequences, one after the other."""
    if isinstance(part, Mapping) and part.get("type") == "Sequence":
        for name in ("normalizers", "pretokenizers", "decoders"):
            for each in part.get(name) or ():
                yield from steps(each)
    elif part is not None:
        yield part


def _letters(step: Any) -> tuple[set[str] | None, set[str] | None]:
    """What a step looks for and what it puts in its place; None: it may be any letter."""
    pattern = step.get("pattern") if isinstance(step, Mapping) and step.get("type") == "Replace" else None
    if not isinstance(pattern, Mapping):
        return None, None
    text, content = pattern.get("String"), step.get("content")
    return set(text) if isinstance(text, str) else None, set(content) if isinstance(content, str) else None


def _of_step(part: Any) -> int:
    """1 for what it does not know: those of Unicode's forms and of case grow by small factors, and only once."""
    if not isinstance(part, Mapping):
        return 1
    kind = part.get("type")
    if kind == "Replace":
        return _of_replacement(part.get("pattern"), part.get("content"))
    if kind in ("Prepend", "Metaspace"):
        added = part.get("prepend") if kind == "Prepend" else part.get("replacement")
        return 1 + _length(added)
    if kind == "ByteLevel":
        return 2
    if kind == "Precompiled":
        return _of_characters(part.get("precompiled_charsmap"))
    return 1


def _length(text: Any) -> int:
    return len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0


def _of_replacement(pattern: Any, content: Any) -> int:
    new = _length(content)
    if not isinstance(pattern, Mapping):
        return 1 + new
    if pattern.get("String"):
        return max(1, -(-new // _length(pattern["String"])))
    try:
        everywhere = re.search(pattern["Regex"], "") is not None
    except (KeyError, TypeError, re.error, RecursionError, OverflowError):
        everywhere = True  # Oniguruma knows more than re; an empty String is found everywhere too
    return 1 + 2 * new if everywhere else max(1, new)  # before a letter and behind the last


def _of_characters(table: Any) -> int:
    """SentencePiece's table: the size of a trie, the trie, then what characters become, with a zero behind each."""
    try:
        data = base64.b64decode(table)
    except (TypeError, ValueError, binascii.Error):
        return 1  # tokenizers refuses it too
    return max(1, *map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")))
