"""The tokenizer that a GGUF file carries: the whole tokenizer.json under `tokenizer.huggingface.json`."""

import contextlib
import json
import os
import re
import secrets
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import _core
from .arguments import as_unicode
from .errors import ArgumentError, FixminError, GGUFError, UnsupportedError, naming, raised_by_signal_handler
from .recognise import refuse_wrong_model
from .tokenizer_growth import growth, steps

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["EOS_IDS_KEY", "TextTokenizer", "as_piece", "decoding", "end_of_text_ids", "read_tokenizer"]

_JSON_KEY = "tokenizer.huggingface.json"
_EOS_KEY = "tokenizer.ggml.eos_token_id"
EOS_IDS_KEY = "fixmin.eos_token_ids"  # all of them, where there are several
_BOS_KEY = "tokenizer.ggml.bos_token_id"
_MAX_SEQUENCES = 64  # strings whose sequences of tokens are kept
_ORDINARY_GROWTH = 256  # bytes that no known tokenizer makes of one
_NO_WORDS: dict[str, Any] = {"vocab": {}, "merges": []}
_MOST_GROWN = 1 << 26  # bytes that one which grows faster may make of a text; tokenizers takes 16 times as much


class TextTokenizer:
    """Text to ids and back. Safe to use from several threads: the tokenizer inside is never modified.

    Args:
        tokenizer: of the tokenizers library.
        bos_id, eos_id: what begins and ends texts. They are control tokens even if the tokenizer does not say so.
    """

    def __init__(self, tokenizer: "Tokenizer", *, bos_id: int | None = None, eos_id: int | None = None) -> None:
        # A tokenizer.json may carry truncation and padding from training; a prompt must not be cut in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.backend = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_tokens = {i: added[i].content for i in sorted(self.special_ids)}  # their names
        self.bos_token, self.eos_token = ("" if i is None else tokenizer.id_to_token(i) or "" for i in (bos_id, eos_id))
        # What a text may name to get a token that is not text. Only added tokens are found so, and in some models words
        # of the vocabulary.
        ends = {i for i in (bos_id, eos_id) if i in added}
        self.control_tokens: dict[str, int] = {
            name: i for i in sorted(self.special_ids | ends) if (name := tokenizer.id_to_token(i))
        }
        self._single_words = {token.content for token in added.values() if token.single_word}
        self._growth = growth(_stated(tokenizer.normalizer)) * growth(_stated(tokenizer.pre_tokenizer))
        if (after := growth(_stated(tokenizer.decoder))) > _ORDINARY_GROWTH:
            raise GGUFError(f"its decoder may make {after:,} bytes of one")
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
            tokenizer = Tokenizer.from_str(text)
            ids = (metadata.get(key) for key in (_BOS_KEY, _EOS_KEY))
            bos_id, eos_id = (i if isinstance(i, int) and 0 <= i < 2**32 else None for i in ids)
            made = cls(tokenizer, bos_id=bos_id, eos_id=eos_id)
            made.decode([0])
            with contextlib.suppress(ArgumentError):  # a vocabulary of whole words may have no "a"
                made.encode("a")
            return made
        except BaseException as error:  # tokenizers raises plain Exception
            if not _is_of_tokenizers(error):
                raise
            raise GGUFError(f"{_JSON_KEY} is not a tokenizer that this version of tokenizers reads: {error}") from error

    def copy(self) -> "Tokenizer":
        """The tokenizer as it is used here, to do with what one likes."""
        return self.backend.from_str(self.backend.to_str())

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True, name: str = "text"
    ) -> list[int]:
        """Token ids of `text`. By default nothing is put before or after it, as on the published model cards.

        parse_special: whether the name of a special token in the text, such as "</s>", stands for that token. False:
        it is text like any other. Tokens that a tokenizer has beside its vocabulary but does not call special always
        are found. name: of `text` in errors.

        Raises:
            ArgumentError: the tokenizer cannot read this text. GGUFError: any text, since it panics.
        """
        as_unicode(name, text)
        return self._encode(self.backend if parse_special else self._plain, text, add_special_tokens, name)

    def encode_template(self, text: str, letters: Mapping[int, str]) -> list[int]:
        """Token ids of what a template has made, with its special tokens read as such.

        Args:
            text: as the template gave it.
            letters: code points that stand in it for other letters, which make no special token's name.
        """
        as_unicode("messages", text)
        if self._names is not None:
            text = self._names.sub(lambda match: self._secret_names[match[0]], text)
        return self._encode(self._plain, text.translate(letters), False, "messages")

    def _encode(self, backend: "Tokenizer", text: str, add_special_tokens: bool, name: str) -> list[int]:
        try:
            if self._growth > _ORDINARY_GROWTH:
                self._refuse_growth(text, name)
            return backend.encode(text, add_special_tokens=add_special_tokens).ids
        except FixminError:
            raise
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            if isinstance(error, Exception):
                raise ArgumentError(f"{name}: the model's tokenizer cannot read it: {error}") from error
            raise GGUFError(f"the model's tokenizer fails: {error}") from error

    def _refuse_growth(self, text: str, name: str) -> None:
        """ArgumentError for a text of which too much would be made. Normalizes it step by step, as far as is safe."""
        n_before = n = len(text.encode())
        most = max(_MOST_GROWN, _ORDINARY_GROWTH * n)
        for step in steps(_stated(self.backend.normalizer)):
            n *= growth(step)
            if n > most:
                break
            alone = {"version": "1.0", "normalizer": step, "added_tokens": [], "model": {"type": "BPE", **_NO_WORDS}}
            text = self.backend.from_str(json.dumps(alone)).normalizer.normalize_str(text)
            n = len(text.encode())
        if n * growth(_stated(self.backend.pre_tokenizer)) > most:
            raise ArgumentError(f"{name}: the model's tokenizer may make {n:,} bytes of its {n_before:,}")

    @cached_property
    def _secret_names(self) -> dict[str, str]:
        """Of control tokens, by name: what no text holds."""
        return {name: f"{secrets.token_hex(16)}{i:08x}" for i, name in enumerate(self.control_tokens)}

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        """Finds control tokens' names as the tokenizer itself does: the leftmost, and of several there the longest."""
        names = sorted(self.control_tokens, key=len, reverse=True)
        word = {name: r"(?<!\w)%s(?!\w)" if name in self._single_words else "%s" for name in names}
        return re.compile("|".join(word[name] % re.escape(name) for name in names)) if names else None

    @cached_property
    def _plain(self) -> "Tokenizer":
        """The same tokenizer, but for text that names no control token: they have secret names in it.

        tokenizers' own encode_special_tokens leaves a name to the model, and one that knows it as a word finds it.
        """
        from tokenizers import Tokenizer

        new = self._secret_names
        data = json.loads(self.backend.to_str())
        for token in data["added_tokens"]:
            token["content"] = new.get(token["content"], token["content"])
        model = data["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {new.get(token, token): i for token, i in model["vocab"].items()}
        else:
            model["vocab"] = [[new.get(token, token), score] for token, score in model["vocab"]]
        if "unk_token" in model:
            model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
            model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & new.keys()]
        return Tokenizer.from_str(json.dumps(data))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; ids that the tokenizer does not know have none. GGUFError: the tokenizer fails."""
        with decoding():
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def token_texts(self) -> list[str]:
        """Text of every id by itself, [V]."""
        with decoding():
            return [self.backend.decode([i], skip_special_tokens=False) for i in range(self.backend.get_vocab_size())]

    @cached_property
    def spelling(self) -> "list[_Step] | None":
        """What the decoder does to a token by itself; None if what a token stands for depends on its neighbours."""
        return _decoder_steps(json.loads(self.backend.to_str())["decoder"])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, also those of a part of a character; a special token's are its name.

        Exact for byte-level, byte-fallback and plain tokenizers: the bytes of a text's tokens make the text, but for
        the space that some decoders drop at its beginning. Otherwise those of the token's own text. b"" for an id that
        the tokenizer does not know.
        """
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.spelling is None:
            return self.decode([token_id]).encode()
        return _spelled(token, self.spelling)

    def token_piece(self, token_id: int) -> str | bytes:
        """What a token adds to a text; its bytes where these are not whole characters."""
        return as_piece(self.token_bytes(token_id))

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


def _stated(part: Any) -> Any:
    """A part of a tokenizer as tokenizer.json has it. As it is pickled: the whole would take a tenth of a second."""
    return None if part is None else json.loads(part.__getstate__())


def _is_of_tokenizers(error: BaseException) -> bool:
    """Exception is the only type of its errors, and of its panics (in Rust) only the name is known."""
    of_its_type = isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"
    return of_its_type and not raised_by_signal_handler(error)


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """What tokenizers raises while it makes text of ids becomes a GGUFError: no ids are wrong for it."""
    try:
        yield
    except FixminError:
        raise
    except BaseException as error:
        if not _is_of_tokenizers(error):
            raise
        raise GGUFError(f"the model's tokenizer fails: {error}") from error


def as_piece(data: bytes) -> str | bytes:
    """Bytes as text where they are whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def read_tokenizer(path: str | os.PathLike[str]) -> tuple[dict[str, Any], TextTokenizer]:
    """Metadata and tokenizer of a GGUF file of any architecture. UnsupportedError: it has none; GGUFError, OSError."""
    with naming(path):
        refuse_wrong_model(path)
        metadata = _core.GgufFile(os.fspath(path)).metadata
        tokenizer = TextTokenizer.from_metadata(metadata)
    if tokenizer is None:
        raise UnsupportedError(f"{os.fspath(path)} holds no tokenizer (key {_JSON_KEY})")
    return metadata, tokenizer


_Step: TypeAlias = tuple[str, str, str]  # what to do, and its two operands


def _decoder_steps(decoder: Any, fused: bool = False) -> list[_Step] | None:
    """The steps of a tokenizer.json's decoder that change what a token stands for; None if others do too."""
    if decoder is None:
        return None  # tokenizers then puts spaces between tokens
    kind = decoder["type"]
    if kind == "Sequence":
        steps: list[_Step] = []
        for part in decoder["decoders"]:
            found = _decoder_steps(part, fused)
            if found is None:
                return None
            steps += found
            fused = fused or part["type"] == "Fuse"
        return steps
    if fused and kind in ("Strip", "Fuse"):  # of the whole text: drops a space that starts or ends it
        return []
    if kind == "Replace" and "String" in decoder["pattern"] and (not fused or len(decoder["pattern"]["String"]) == 1):
        return [("replace", decoder["pattern"]["String"], decoder["content"])]
    if kind == "Metaspace":
        return [("replace", decoder["replacement"], " ")]
    if kind in ("ByteLevel", "ByteFallback"):
        return [(kind, "", "")]
    return [] if kind == "Fuse" else None


def _spelled(token: str, steps: Sequence[_Step]) -> bytes:
    for kind, old, new in steps:
        if kind == "replace":
            token = token.replace(old, new)
        elif kind == "ByteFallback" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        elif kind == "ByteLevel" and all(letter in _BYTE_OF_LETTER for letter in token):
            return bytes(_BYTE_OF_LETTER[letter] for letter in token)
    return token.encode()


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_of_letter()


def end_of_text_ids(metadata: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text according to the file, GGUF's own key first; () if it names none.

    GGUFError if one is no token id.
    """
    found: dict[int, None] = {}
    for key in (_EOS_KEY, EOS_IDS_KEY):
        value = metadata.get(key)
        if value is None:
            continue
        if key == EOS_IDS_KEY and not isinstance(value, Sequence | np.ndarray):
            raise GGUFError(f"{key} must be an array, got {value!r}")
        for token_id in [value] if key == _EOS_KEY else list(value):
            is_integer = isinstance(token_id, int | np.integer) and not isinstance(token_id, bool)
            if not is_integer or not 0 <= token_id < vocab_size:
                raise GGUFError(f"{key} is {token_id!r}, which is no token id of a vocabulary of {vocab_size}")
            found[int(token_id)] = None
    return tuple(found)
