"""Models, and servers that serve them."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))  # its toy models

from servers import Server, Start, serving
from toy_models import byte_level, concatenating, write_model

import fixmin_cpp

pytest.importorskip("fastapi")

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture(scope="session")
def served_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters and n-grams, as the published checkpoints have them: every token is text."""
    return write_model(tmp_path_factory.mktemp("served") / "letters.gguf", concatenating(), context_length=256)


@pytest.fixture(scope="session")
def bytes_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most tokens end within a character."""
    return write_model(tmp_path_factory.mktemp("served") / "bytes.gguf", byte_level(), context_length=256)


@pytest.fixture(scope="session")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context so long that filling it takes minutes."""
    folder = tmp_path_factory.mktemp("served")
    return write_model(
        folder / "long.gguf", concatenating(), context_length=100_000, embedding_length=128, block_count=4
    )


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a server with options of its own: `with start(model, "--max-queue", "1") as server`."""

    def begin(model: Path, *arguments: str, **options: Any) -> contextlib.AbstractContextManager[Server]:
        return serving(model, tmp_path / "log", *arguments, **options)

    return begin


@pytest.fixture(scope="session")
def server(served_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that only ask."""
    with serving(served_path, tmp_path_factory.mktemp("log") / "log", "--model-name", "toy") as started:
        yield started


@pytest.fixture(scope="session")
def model(served_path: Path) -> Iterator[fixmin_cpp.Model]:
    """The same model in this process: what the server must answer."""
    with fixmin_cpp.Model(served_path) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def demo_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped affine checkpoint, converted."""
    pytest.importorskip("torch")
    from fixmin_cpp.convert.convert import convert

    path = tmp_path_factory.mktemp("demo") / "affine.gguf"
    convert(DEMO / "affine", path, "q8_0", trust_remote_code=True)
    return path


@pytest.fixture(scope="session")
def demo_server(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Answers with words."""
    with serving(demo_path, tmp_path_factory.mktemp("log") / "log") as started:
        yield started


@pytest.fixture(scope="session")
def long_server(long_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Is not done before it is stopped."""
    with serving(long_path, tmp_path_factory.mktemp("log") / "log") as started:
        yield started
