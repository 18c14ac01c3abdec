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

httpx = pytest.importorskip("httpx")


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

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics of the one model; other labels as given."""
        total, found = 0.0, False
        for line in re.findall(rf"^{name}(?:{{.*}})? .+$", self.get("/metrics").text, re.MULTILINE):
            if all(f'{key}="{value}"' in line for key, value in labels.items()):
                total, found = total + float(line.rpartition(" ")[2]), True
        assert found, name
        return total

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
def serving(
    model: Path, log: Path, *arguments: str, ready: bool = True, port: int = 0, before: str = "", **env: str
) -> Iterator[Server]:
    """Starts a server and, at the end, asks it to stop. `before`: Python that its process runs first."""
    command = [
        sys.executable,
        "-c",
        before + "\nfrom fixmin_cpp.cli import main; main()",
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
