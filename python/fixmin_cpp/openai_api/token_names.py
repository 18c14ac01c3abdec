"""What answers call single tokens: names that no two tokens share, and the bytes that a token adds to a text."""

import weakref

from ..constrain import token_bytes
from ..errors import UnsupportedError
from ..model import Model
from ..tokenizer import TextTokenizer, as_piece

__all__ = ["TokenNames"]

_known: "weakref.WeakKeyDictionary[Model, TokenNames]" = weakref.WeakKeyDictionary()


class TokenNames:
    """Names and bytes of all tokens of a model.

    A token is called by its text where that is whole characters, a space that begins it included, else
    `bytes:\\xe6\\x97` (OpenAI's form), and `token_id:7` (vLLM's) if a token with a lower id is called the same, or it
    has no text. A name depends on the vocabulary only, and so can be a key.
    """

    def __init__(self, tokenizer: TextTokenizer | None, vocab_size: int) -> None:
        self._bytes = {} if tokenizer is None else _all_bytes(tokenizer)
        self._names: list[str] = []
        taken = {""}
        for token_id in range(vocab_size):
            name = _name(self._bytes.get(token_id, b""))
            if name in taken:
                name = f"token_id:{token_id}"
            taken.add(name)
            self._names.append(name)

    @classmethod
    def of(cls, model: Model) -> "TokenNames":
        """Those of `model`, made at the first call: some tenths of a second for a large vocabulary."""
        names = _known.get(model)
        if names is None:
            names = _known[model] = cls(model.text_tokenizer, model.info["vocab_size"])
        return names

    def name(self, token_id: int) -> str:
        """The name."""
        return self._names[token_id]

    def bytes(self, token_id: int) -> list[int] | None:
        """Bytes of its text; None if it has none."""
        found = self._bytes.get(token_id)
        return list(found) if found else None


def _name(data: bytes) -> str:
    piece = as_piece(data)
    return piece if isinstance(piece, str) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _all_bytes(tokenizer: TextTokenizer) -> dict[int, bytes]:
    """By id. Special tokens are spelled out."""
    special = {i: token.content.encode() for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
    try:
        return {**special, **token_bytes(tokenizer)}
    except UnsupportedError:  # tokens stand for different text at different places
        return {**dict(enumerate(text.encode() for text in tokenizer.token_texts)), **special}
