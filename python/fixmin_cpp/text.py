"""Text from tokens as they arrive: incremental decoding and stop strings, right at every split point.

A token may end in the middle of a character, a stop string may begin in one token and end three tokens later. The
classes here release text only once it can no longer change, and lose none: with `full` the decoding of all tokens,

    released text == full[: min(full.find(s) for s in stops if s in full)]      (`full` itself without a match)

however the text is cut into tokens (tests/python/test_text.py states this as a property).
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .tokenizer import TextTokenizer

__all__ = ["IncrementalDecoder", "StopStrings", "TextAssembler"]


class IncrementalDecoder:
    """Decodes token ids one by one through `tokenizers.decoders.DecodeStream`.

    What DecodeStream lacks is added here: the text still held back at the end, and decoders that revise text they have
    already given (byte fallback replaces the letter before an invalid byte too: DecodeStream raises, this goes on).

    Args:
        tokenizer: shared between runs.
        context: ids that precede the generated ones. Some decoders drop the space that starts a text; a continuation
            must keep it. Ignored if the context itself ends within a character.
    """

    def __init__(self, tokenizer: TextTokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int]  # everything the stream has seen
        self._n_returned: int  # characters of decode(_ids) that the caller has
        self._n_pending: int  # ids at the end of _ids whose text is not returned
        context = [i for i in context if i not in tokenizer.special_ids]
        self._restart([] if self._decode(context).endswith("\N{REPLACEMENT CHARACTER}") else context)

    @property
    def pending(self) -> bool:
        """Whether some of the tokens may have text that has not been returned yet."""
        return self._n_pending > 0

    def step(self, token_id: int) -> str:
        """Returns the text that became certain with this token; special tokens have none."""
        if token_id in self._tokenizer.special_ids:
            return ""
        self._ids.append(token_id)
        self._n_pending += 1
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception as error:  # DecodeStream raises no narrower type
            if "Invalid prefix" not in str(error):
                raise
            unsaid = self._ids[-self._n_pending :]
            self._restart([])
            self._ids, self._n_pending = unsaid, len(unsaid)
            text = self._stream.step(self._tokenizer.backend, unsaid)
        if text is None:
            return ""
        self._n_pending = 0
        self._n_returned += len(text)
        return text

    def finish(self) -> str:
        """Returns the text still held back; an incomplete character becomes U+FFFD, as in decoding all at once."""
        if not self._n_pending:
            return ""
        self._n_pending = 0
        return self._decode(self._ids)[self._n_returned :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _restart(self, context: list[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(ids=context, skip_special_tokens=True)
        self._ids = list(context)
        self._n_returned = len(self._decode(context))
        self._n_pending = 0


class StopStrings:
    """Cuts a text that arrives in pieces before the leftmost occurrence of any stop string.

    The longest end of the text that could still become a stop string is held back.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        if "" in self._stops:
            raise ValueError("a stop string must not be empty")
        self._sorted = sorted(self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched = False

    @property
    def pending(self) -> bool:
        """Whether text is held back."""
        return bool(self._held)

    def feed(self, text: str) -> str:
        """Adds text; returns what is certain to lie before any stop string. After a match nothing is returned."""
        if self.matched or not text:
            return ""
        text = self._held + text
        match, start = self._find(text), self._possible_start(text)
        if match >= 0 and match <= start:
            self.matched, self._held = True, ""
            return text[:match]
        # A complete match behind a start that is still undecided waits: the leftmost one counts.
        self._held = text[start:]
        return text[:start]

    def finish(self) -> str:
        """The text has ended: returns what was held back, cut if it holds a complete stop string after all."""
        text, self._held = self._held, ""
        match = self._find(text)
        if match >= 0:
            self.matched = True
            return text[:match]
        return text

    def _find(self, text: str) -> int:
        """Index of the leftmost complete stop string, or -1."""
        return min((i for i in map(text.find, self._stops) if i >= 0), default=-1)

    def _possible_start(self, text: str) -> int:
        """Index where the longest end of `text` that begins a stop string starts; len(text) if there is none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            at = bisect_left(self._sorted, tail)  # those that begin with it follow
            if at < len(self._sorted) and self._sorted[at].startswith(tail):
                return start
        return len(text)


@dataclass
class TextAssembler:
    """Token ids in, (token id, text) pairs out: one pair per token, in order, text released as soon as it is certain.

    A pair waits while any of the text up to its token is held back, so that the texts of all pairs concatenate to the
    whole result even if the run ends there. Without a decoder (a file without a tokenizer) every text is empty.
    """

    decoder: IncrementalDecoder | None
    stops: StopStrings = field(default_factory=StopStrings)
    _waiting: list[int] = field(default_factory=list)
    _text: str = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been met: no further token is wanted."""
        return self.stops.matched

    def push(self, token_id: int) -> list[tuple[int, str]]:
        """Adds a token; returns the pairs that are complete."""
        self._waiting.append(token_id)
        if self.decoder is None:
            return self._release()
        self._text += self.stops.feed(self.decoder.step(token_id))
        if not self.stopped and (self.decoder.pending or self.stops.pending):
            return []
        return self._release()

    def finish(self) -> list[tuple[int, str]]:
        """No more tokens: returns the pairs that were waiting, with all the text that is left."""
        if self.decoder is not None:
            self._text += self.stops.feed(self.decoder.finish())
            self._text += self.stops.finish()
        return self._release()

    def _release(self) -> list[tuple[int, str]]:
        """Gives the collected text to the last waiting token: the one that made it certain."""
        ids, text = self._waiting, self._text
        self._waiting, self._text = [], ""
        if not ids:
            return []
        return [(i, "") for i in ids[:-1]] + [(ids[-1], text)]
