"""Any bytes as the body of any of the server's addresses: an answer, or a refusal in OpenAI's form that says what is
wrong.

    python tests/fuzz/requests_fuzz.py FOLDER... [libFuzzer's options]

The application runs in this process, with a real model of some hundred weights. The first byte of an input chooses the
address, the rest is the body.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "python")]

ADDRESSES = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/codes")


class Server:
    """The application, and a loop that it runs in."""

    def __init__(self, folder: Path) -> None:
        import logging

        from toy_models import concatenating, write_model

        from fixmin_cpp.serve import ServeSettings, create_app

        logging.disable(logging.WARNING)  # of what is refused
        model = write_model(folder / "toy.gguf", concatenating(), context_length=64)
        settings = ServeSettings(model=model, n_threads=1, timeout=20, max_n=8)
        self.app = create_app(settings, load_first=True)
        self.loop = asyncio.new_event_loop()
        self.lifespan = self.app.router.lifespan_context(self.app)
        self.loop.run_until_complete(self.lifespan.__aenter__())

    def close(self) -> None:
        self.loop.run_until_complete(self.lifespan.__aexit__(None, None, None))
        self.loop.close()

    def post(self, address: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of an answer."""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": address,
            "raw_path": address.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8080),
        }
        sent: list[dict[str, Any]] = []
        received = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(received, None)) is None:
                await asyncio.sleep(3600)  # the client waits for its answer
            return message or {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        self.loop.run_until_complete(self.app(scope, receive, send))
        (start,) = (message for message in sent if message["type"] == "http.response.start")
        data = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
        return start["status"], data


def events(data: bytes) -> Iterator[Any]:
    """The objects of a stream."""
    for event in data.decode().split("\n\n"):
        if event.startswith("data: ") and event != "data: [DONE]":
            yield json.loads(event.removeprefix("data: "))


def check(status: int, answer: bytes) -> None:
    """What every answer keeps."""
    if status == 200:
        if answer.startswith(b"data: "):
            assert answer.endswith(b"data: [DONE]\n\n"), answer[-200:]
            parts = list(events(answer))
            assert parts, answer
            assert all("choices" in part for part in parts), answer
        else:
            assert isinstance(json.loads(answer), dict)
        return
    assert 400 <= status < 500, (status, answer)
    error = json.loads(answer)["error"]
    assert error["message"], error
    assert isinstance(error["type"], str), error


class Fuzzer:
    """Inputs, one after the other, against one server."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fixmin-fuzz-")
        self.server = Server(Path(self.folder.name))

    def __call__(self, data: bytes) -> None:
        address = ADDRESSES[data[0] % len(ADDRESSES)] if data else ADDRESSES[0]
        check(*self.server.post(address, data[1:]))

    def close(self) -> None:
        self.server.close()
        self.folder.cleanup()


if __name__ == "__main__":
    from instrumented import fuzz

    fuzz(Fuzzer, "fixmin_cpp.serve.app")
