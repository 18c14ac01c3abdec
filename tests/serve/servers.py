"""Real servers: `fixmin serve` as a process of its own, on a free port."""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    uds: str | None = None  # a Unix socket, where the URL is that of nobody

    def client(self) -> Any:
        """An httpx.Client that reaches it."""
        return httpx.Client(base_url=self.url, timeout=120, transport=httpx.HTTPTransport(uds=self.uds))

    def post(self, path: str, body: Any, **options: Any) -> Any:
        """An answer, whatever its status."""
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> Any:
        """Likewise."""
        with self.client() as client:
            return client.get(path, **options)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics of the one model, or the sum of those with these labels: 0 if there are none yet."""
        lines = re.findall(rf"^{name}(?:{{.*}})? .+$", self.get("/metrics").text, re.MULTILINE)
        assert lines, name
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(pair in line for pair in wanted))

    def idle(self, seconds: float = 30.0) -> bool:
        """Waits until nothing runs or waits."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.metric("llamacpp:requests_processing") + self.metric("fixmin:sequences_admitted") == 0:
                return True
            time.sleep(0.02)
        return False


def until(true: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits for something that must come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


Start = Callable[..., contextlib.AbstractContextManager[Server]]


@contextlib.contextmanager
def serving(
    model: Path, log: Path, *arguments: str, ready: bool = True, port: int | None = 0, before: str = "", **env: str
) -> Iterator[Server]:
    """Starts a server and, at the end, asks it to stop. `before`: Python that its process runs first. No `port`: the
    arguments say where it listens."""
    command = [
        sys.executable,
        "-c",
        before + "\nfrom fixmin_cpp.cli import main; main()",
        "serve",
        str(model),
        *([] if port is None else ["--port", str(port)]),
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
        found = re.search(r"listening on (?:(http://[^\s\"]+)|unix:([^\s\"]+))", server.log.read_text())
        if found:
            server.url, server.uds = found[1] or "http://localhost", found[2]
            with contextlib.suppress(httpx.TransportError):
                if server.get("/health").status_code == 200 or not ready:
                    return server
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.02)
    raise AssertionError(f"the server is not ready: {server.log.read_text()}")


@contextlib.contextmanager
def proxy(server: Server, prefix: str, strips: bool) -> Iterator[str]:
    """A reverse proxy that shows a server at `prefix`, and gives it paths without or with that. Its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path != prefix and not self.path.startswith(f"{prefix}/"):
                return self.send_error(404, "not below the prefix")
            path = (self.path.removeprefix(prefix) or "/") if strips else self.path
            length = int(self.headers.get("content-length", 0))
            behind = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")
            }
            behind.request(self.command, path, self.rfile.read(length), headers)
            answer = behind.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "date", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            behind.close()

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}{prefix}"
        finally:
            running.shutdown()
            thread.join()
