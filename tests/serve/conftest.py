"""Real servers: `fixmin serve` as a process of its own, on a free port."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))  # its toy models

from toy_models import byte_level, concatenating, write_model

import fixmin_cpp

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@dataclass
class Server:
    """A process that serves a model, and how to reach it."""

    url: str
    model: Path
    process: subprocess.Popen[bytes]
    log: Path

    def post(self, path: str, body: Any, **options: Any) -> Any:
        """An answer, whatever its status."""
        return httpx.post(self.url + path, json=body, timeout=120, **options)

    def get(self, path: str, **options: Any) -> Any:
        """Likewise."""
        return httpx.get(self.url + path, timeout=120, **options)

    def metric(self, name: str) -> float:
        """A sample of /metrics without labels."""
        found = re.search(rf"^{name} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def idle(self, seconds: float = 30.0) -> bool:
        """Waits until nothing runs or waits."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.metric("llamacpp:requests_processing") + self.metric("fixmin:sequences_admitted") == 0:
                return True
            time.sleep(0.02)
        return False


Start = Callable[..., contextlib.AbstractContextManager[Server]]


@contextlib.contextmanager
def serving(model: Path, log: Path, *arguments: str, ready: bool = True, port: int = 0, **env: str) -> Iterator[Server]:
    """Starts a server and, at the end, asks it to stop."""
    command = [
        sys.executable,
        "-c",
        "from fixmin_cpp.cli import main; main()",
        "serve",
        str(model),
        "--port",
        str(port),
    ]
    with open(log, "wb") as file:
        process = subprocess.Popen([*command, *arguments], stderr=file, env={**os.environ, **env})
    try:
        yield _wait(Server("", model, process, log), ready)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()


def _wait(server: Server, ready: bool) -> Server:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = re.search(r"listening on (http://\S+)", server.log.read_text())
        if found:
            server.url = found[1]
            with contextlib.suppress(httpx.TransportError):
                if server.get("/health").status_code == 200 or not ready:
                    return server
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.02)
    raise AssertionError(f"the server is not ready: {server.log.read_text()}")


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
