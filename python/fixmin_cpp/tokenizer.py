"""The tokenizer that a GGUF file carries: the whole tokenizer.json under `tokenizer.huggingface.json`."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, ArgumentTypeError, GGUFError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TextTokenizer", "end_of_text_id"]

_JSON_KEY = "tokenizer.huggingface.json"
_EOS_KEY = "tokenizer.ggml.eos_token_id"
_MAX_SEQUENCES = 64  # strings whose sequences of tokens are kept


class TextTokenizer:
    """Text to ids and back. Safe to use from several threads: the tokenizer inside is never modified."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        # A tokenizer.json may carry truncation and padding from training; a prompt must not be cut in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.backend = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._sequences: dict[str, list[list[int]]] = {}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "TextTokenizer | None":
        """The tokenizer in a file's metadata, or None if it carries none. Raises GGUFError if it cannot be read."""
        text = metadata.get(_JSON_KEY)
        if text is None:
            return None
        if not isinstance(text, str):
            raise GGUFError(f"{_JSON_KEY} must be a string, got {type(text).__name__}")
        from tokenizers import Tokenizer

        try:
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # tokenizers raises plain Exception
            raise GGUFError(f"{_JSON_KEY} is not a tokenizer that this version of tokenizers reads: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`. By default nothing is put before or after it, as on the published model cards."""
        if not isinstance(text, str):
            raise ArgumentTypeError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"text is not valid Unicode: lone surrogate {text[error.start]!a} at character {error.start}"
            ) from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; ids that the tokenizer does not know have none."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def token_texts(self) -> list[str]:
        """Text of every id by itself, [V]."""
        return [self.backend.decode([i], skip_special_tokens=False) for i in range(self.backend.get_vocab_size())]

    def sequences_with(self, text: str) -> list[list[int]]:
        """Sequences of ids in which `text` comes up: single tokens that hold it, and those that begin it in the middle
        or at the end of a token and go on with the tokens of the rest."""
        if text not in self._sequences:
            sequences = [(i, 0, [i]) for i, token in enumerate(self.token_texts) if text in token]
            for n in range(1, len(text)):
                rest = None
                for i in self._ending(text[:n]):
                    if text not in self.token_texts[i]:
                        rest = self.encode(text[n:]) if rest is None else rest
                        sequences.append((i, -n, [i, *rest]))
            if len(self._sequences) >= _MAX_SEQUENCES:
                self._sequences.clear()
            self._sequences[text] = [ids for _, _, ids in sorted(sequences)]
        return self._sequences[text]

    @cached_property
    def _reversed_texts(self) -> list[tuple[str, int]]:
        """Texts of all ids from their ends, sorted: those that end alike lie side by side."""
        return sorted((token[::-1], i) for i, token in enumerate(self.token_texts))

    def _ending(self, text: str) -> list[int]:
        """Ids of the tokens that end with `text`."""
        end, found = text[::-1], []
        for at in range(bisect_left(self._reversed_texts, (end, -1)), len(self._reversed_texts)):
            token, token_id = self._reversed_texts[at]
            if not token.startswith(end):
                break
            found.append(token_id)
        return found


def end_of_text_id(metadata: Mapping[str, Any], vocab_size: int) -> int | None:
    """The id that ends a text according to the file; None if it names none. GGUFError if it is no token id."""
    token_id = metadata.get(_EOS_KEY)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
        raise GGUFError(f"{_EOS_KEY} is {token_id!r}, which is no token id of a vocabulary of {vocab_size}")
    return token_id
