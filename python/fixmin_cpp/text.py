"""Text from tokens as they arrive: incremental decoding and stop strings, right at every split point.

A token may end in the middle of a character, a stop string may begin in one token and end three tokens later. The
classes here release text only once it can no longer change, and lose none: with `full` the decoding of all tokens,

    released text == full[: min(full.find(s) for s in stops if s in full)]      (`full` itself without a match)

however the text is cut into tokens (tests/python/test_text_assembly.py states this as a property).

A special token has no text that is released. A stop string that holds its name is met by it all the same, as by the
letters of the name, but never by a part of it.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from .errors import ArgumentError
from .tokenizer import TextTokenizer, decoding

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
        with decoding():
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

    def flush(self) -> str:
        """As finish(), but more may follow: a character is then not put together across this place."""
        whole = self._ids[: len(self._ids) - self._n_pending]
        text = self.finish()
        if text:
            self._restart(whole)
        return text

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

    Args:
        stops: the stop strings.
        names: of special tokens, by id.
    """

    def __init__(self, stops: Iterable[str] = (), names: Mapping[int, str] | None = None) -> None:
        stops, self._signs = _with_signs(tuple(dict.fromkeys(stops)), tuple((names or {}).items()))
        self._no_signs = str.maketrans(dict.fromkeys(self._signs.values(), ""))
        self._stops, self._longest = _sorted_stops(stops)
        self._first = frozenset(stop[0] for stop in self._stops)
        self._held = ""
        self.matched = False

    @property
    def pending(self) -> bool:
        """Whether text is held back."""
        return bool(self._held)

    def names(self, token_id: int) -> bool:
        """Whether a stop string holds the name of this special token."""
        return token_id in self._signs

    def feed_special(self, token_id: int) -> str:
        """Adds a special token; returns as feed() does."""
        return self.feed(self._signs.get(token_id, ""))

    def feed(self, text: str) -> str:
        """Adds text; returns what is certain to lie before any stop string. After a match nothing is returned."""
        if self.matched or not text:
            return ""
        text = self._held + text
        match, start = self._find(text), self._possible_start(text)
        if match >= 0 and match <= start:
            self.matched, self._held = True, ""
            return self._released(text[:match])
        # A complete match behind a start that is still undecided waits: the leftmost one counts.
        self._held = text[start:]
        return self._released(text[:start])

    def finish(self) -> str:
        """The text has ended: returns what was held back, cut if it holds a complete stop string after all."""
        text, self._held = self._held, ""
        match = self._find(text)
        if match >= 0:
            self.matched = True
            text = text[:match]
        return self._released(text)

    def _released(self, text: str) -> str:
        return text.translate(self._no_signs) if self._signs else text

    # A step costs a look at each character, however many strings there are: of those that are sorted and do not begin
    # with one another only the neighbours of a text can begin it, or be begun by it.

    def _find(self, text: str) -> int:
        """Index of the leftmost complete stop string, or -1."""
        for start in range(len(text)):
            if text[start] in self._first:
                before = bisect_right(self._stops, text[start : start + self._longest]) - 1
                if before >= 0 and text.startswith(self._stops[before], start):
                    return start
        return -1

    def _possible_start(self, text: str) -> int:
        """Index where the longest end of `text` that begins a stop string starts; len(text) if there is none."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first:
                end = text[start:]
                after = bisect_left(self._stops, end)
                if after < len(self._stops) and self._stops[after].startswith(end):
                    return start
        return len(text)


_MAX_SIGNS = 0x800  # so many lone surrogates there are


@lru_cache(maxsize=4)  # the runs of one call have the same ones
def _with_signs(stops: tuple[str, ...], names: tuple[tuple[int, str], ...]) -> tuple[tuple[str, ...], dict[int, str]]:
    """`stops`, also as they are met by special tokens, and the signs of those by their ids.

    A sign is a lone surrogate, which no text holds: it stands for a special token that a stop string names.
    """
    together = "\0".join(stops)
    named = {i: name for i, name in names if name and name in together}
    if not named:
        return stops, {}
    if len(named) > _MAX_SIGNS:
        raise ArgumentError(f"stop names {len(named)} special tokens, but at most {_MAX_SIGNS} can be told apart")
    signs = {token_id: chr(0xD800 + n) for n, token_id in enumerate(named)}
    by_name = {name: signs[i] for i, name in named.items()}
    spelled = re.compile("|".join(map(re.escape, sorted(by_name, key=len, reverse=True))))
    return stops + tuple(spelled.sub(lambda match: by_name[match[0]], stop) for stop in stops), signs


@lru_cache(maxsize=4)
def _sorted_stops(stops: tuple[str, ...]) -> tuple[list[str], int]:
    """Rising, and the length of the longest. One that begins with another is left out: that one ends a text there."""
    kept: list[str] = []
    for stop in sorted(set(stops)):
        if not stop:
            raise ValueError("a stop string must not be empty")
        if not kept or not stop.startswith(kept[-1]):
            kept.append(stop)
    return kept, max(map(len, kept), default=0)


@dataclass
class TextAssembler:
    """Token ids in, (token id, text) pairs out: one pair per token, in order, text released as soon as it is certain.

    A pair waits while any of the text up to its token is held back, so that the texts of all pairs concatenate to the
    whole result even if the run ends there. Without a decoder (a file without a tokenizer) every text is empty.

    Args:
        min_tokens: in the text of so many tokens no stop string is looked for.
    """

    decoder: IncrementalDecoder | None
    stops: StopStrings = field(default_factory=StopStrings)
    min_tokens: int = 0
    _n_tokens: int = 0
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
        self._n_tokens += 1
        text = self.decoder.step(token_id)
        if self._n_tokens > self.min_tokens:
            if self.stops.names(token_id):
                text = self.decoder.flush()  # what is held back stands before the token
            self._text += self.stops.feed(text) + self.stops.feed_special(token_id)
        else:
            self._text += text
        if not self.stopped and (self.decoder.pending or self.stops.pending):
            return []
        return self._release()

    def finish(self) -> list[tuple[int, str]]:
        """No more tokens: returns the pairs that were waiting, with all the text that is left."""
        if self.decoder is not None:
            text = self.decoder.finish()
            self._text += (self.stops.feed(text) if self._n_tokens > self.min_tokens else text) + self.stops.finish()
        return self._release()

    def _release(self) -> list[tuple[int, str]]:
        """Gives the collected text to the last waiting token: the one that made it certain."""
        ids, text = self._waiting, self._text
        self._waiting, self._text = [], ""
        if not ids:
            return []
        return [(i, "") for i in ids[:-1]] + [(ids[-1], text)]
