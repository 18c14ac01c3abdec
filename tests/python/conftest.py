"""Tiny GGUF files with tokenizers, and models loaded from them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf import GGUFWriter
from gguf_factory import make_model
from tokenizers import Tokenizer
from toy_tokenizers import byte_level, concatenating

import fixmin_cpp


def _with_eos(token_id: int) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_uint32("tokenizer.ggml.eos_token_id", token_id)


def write_model(path: Path, tokenizer: Tokenizer, eos_id: int | None = None, **arguments: object) -> Path:
    """A small random model with this tokenizer; eos_id None: the id of "</s>"."""
    eos_id = tokenizer.token_to_id("</s>") if eos_id is None else eos_id
    return make_model(
        path,
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer_json=tokenizer.to_str(),
        edit=_with_eos(eos_id),
        **arguments,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def model_path(folder: Path) -> Path:
    """Byte-level tokenizer: almost every generated token ends within a character."""
    return write_model(folder / "byte_level.gguf", byte_level())


@pytest.fixture(scope="session")
def long_model_path(folder: Path) -> Path:
    """A context so long that filling it takes minutes: for what must end sooner."""
    return write_model(folder / "long.gguf", byte_level(), context_length=100_000, embedding_length=128, block_count=4)


@pytest.fixture(scope="session")
def bare_model_path(folder: Path) -> Path:
    """No tokenizer and no end-of-text id."""
    return make_model(folder / "bare.gguf")


@pytest.fixture(scope="session")
def model(model_path: Path) -> Iterator[fixmin_cpp.Model]:
    with fixmin_cpp.Model(model_path) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def letters_model(folder: Path) -> Iterator[fixmin_cpp.Model]:
    """Tokenizer of the published checkpoints' kind: letters and n-grams, decoded by concatenation."""
    with fixmin_cpp.Model(write_model(folder / "letters.gguf", concatenating())) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def bare_model(bare_model_path: Path) -> Iterator[fixmin_cpp.Model]:
    with fixmin_cpp.Model(bare_model_path) as loaded:
        yield loaded
