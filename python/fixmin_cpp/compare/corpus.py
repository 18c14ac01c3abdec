"""Held-out text from the data sets that the published models were trained on the likes of, streamed with `datasets`."""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FixminError
from ..tokenizer import end_of_text_ids, read_tokenizer
from .store import Store, fingerprint, write_text

__all__ = ["SOURCES", "Mixture", "Source", "mixed_text"]


@dataclass(frozen=True)
class Source:
    """A data set and where its documents are."""

    path: str  # of the hub, or a format such as "json"
    config: str | None
    column: str = "text"
    data_files: str | None = None


#: What --dataset may name. Neither pages nor stories have a held-out part of their own.
SOURCES = {
    "fineweb-edu": Source("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "cosmopedia": Source("HuggingFaceTB/cosmopedia", "web_samples_v2"),
}
_BUFFER = 1000  # documents among which the next is drawn, after the order of the files has been drawn


@dataclass(frozen=True)
class Mixture:
    """Documents of several data sets in turn, until there are n_tokens. The same fields give the same text.

    That holds for as long as the data sets stay what they are: they are named without a revision.
    """

    names: tuple[str, ...]  # of SOURCES
    n_tokens: int  # at least, by the first model's tokenizer
    seed: int = 0  # of the order of files and documents
    skip: int = 0  # documents of each data set

    @classmethod
    def parse(cls, names: str, n_tokens: int, seed: int = 0, skip: int = 0) -> "Mixture":
        """Of names joined by +. ArgumentError: an unknown name, or n_tokens below 1, seed or skip below 0."""
        split = tuple(names.split("+"))
        for name in split:
            if name not in SOURCES:
                raise ArgumentError(f"no data set {name!r} is known: {' and '.join(SOURCES)} are, joined by +")
        if n_tokens < 1 or seed < 0 or skip < 0:
            raise ArgumentError(f"n_tokens must be at least 1, seed and skip 0: got {n_tokens}, {seed}, {skip}")
        return cls(split, n_tokens, seed, skip)


def mixed_text(mixture: Mixture, model: Path, folder: Path, tell: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """The text of a mixture, which stays in folder/heldout.txt, and what it was made of.

    Args:
        model: a GGUF file, whose tokenizer counts the tokens and whose end-of-text token stands between documents (an
            empty line, if the file names none).

    Raises:
        FixminError: a data set cannot be reached, or ends before there are enough tokens.
    """
    metadata, tokenizer = read_tokenizer(model)
    end = end_of_text_ids(metadata, tokenizer.copy().get_vocab_size())
    separator = tokenizer.decode(end[:1]) if end else "\n\n"
    store = Store(folder)
    sources = {name: asdict(SOURCES[name]) for name in mixture.names}
    key = {"mixture": asdict(mixture), "sources": sources, "separator": separator}
    key["tokenizer"] = fingerprint(tokenizer.copy().to_str())
    saved = store.load("corpus", key)
    if saved is None:
        documents: list[str] = []
        n_tokens, counts = 0, dict.fromkeys(mixture.names, 0)
        streams = {name: _documents(name, mixture) for name in mixture.names}
        while n_tokens < mixture.n_tokens:
            for name, stream in streams.items():
                text = next(stream, None)
                if text is None:
                    raise FixminError(
                        f"{name} ended after {counts[name]} documents: n_tokens must be at most {n_tokens}"
                    )
                documents.append(text)
                counts[name] += 1
                n_tokens += len(tokenizer.encode(text, parse_special=False)) + 1
            tell(f"streaming {' and '.join(mixture.names)}: {n_tokens:,} of {mixture.n_tokens:,} tokens")
        saved = {"text": separator.join(documents), "documents": counts}
        store.save("corpus", key, saved)
    write_text(folder / "heldout.txt", saved["text"])
    return saved["text"], {**asdict(mixture), "documents": saved["documents"], "sources": sources}


def _documents(name: str, mixture: Mixture) -> Iterator[str]:
    """Documents of a data set that are not empty, as they come."""
    import datasets

    source = SOURCES[name]
    try:
        stream = datasets.load_dataset(
            source.path, source.config, data_files=source.data_files, split="train", streaming=True
        )
        for document in stream.shuffle(seed=mixture.seed, buffer_size=_BUFFER).skip(mixture.skip):
            text = str(document[source.column]).strip()
            if text:
                yield text
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # of no network: each library its own
        why = re.sub(r"\s+", " ", str(error))[:200]
        raise FixminError(
            f"the data set {source.path} cannot be read ({type(error).__name__}: {why}); without a network give --text"
        ) from error
