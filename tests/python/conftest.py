"""Tiny GGUF files with tokenizers, and models loaded from them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_factory import make_model
from toy_models import byte_level, concatenating, write_model

import fixmin_cpp


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
