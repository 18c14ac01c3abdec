"""Requests that are malformed, huge, slow or hostile, and clients that vanish: the right 4xx, and it goes on."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Server, Start, httpx, serving, until

from fixmin_cpp import ArgumentError, Model

serve = pytest.importorskip("fixmin_cpp.serve")
schemas = pytest.importorskip("fixmin_cpp.serve.schemas")
limits = pytest.importorskip("fixmin_cpp.serve.limits")

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def strict(served_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that loses patience soon."""
    limits = ("--read-timeout", "1", "--write-timeout", "1", "--max-body-bytes", "100000")
    with serving(served_path, tmp_path_factory.mktemp("log") / "log", *limits) as server:
        yield server


def works(server: Server) -> bool:
    """Whether an ordinary request is answered."""
    answer = server.post("/v1/completions", {"prompt": "the", "max_tokens": 4, "temperature": 0})
    return answer.status_code == 200 and len(answer.json()["choices"]) == 1


@contextlib.contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        yield raw


def answer_to(server: Server, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that comes back until the server closes the connection."""
    with connected(server) as raw:
        received = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for part in parts:
                raw.sendall(part)
                time.sleep(pause)
        with contextlib.suppress(ConnectionResetError):
            while data := raw.recv(65536):
                received += data
        return received


# --- malformed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "a", "max_tokens": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "\\ud800", "max_tokens": 2}',
        b'{"prompt": "a", "\\udfff": 2}',
        b'{"prompt": "a", "stop": ["\\ud800", ""]}',
        b'{"prompt": "\xff"}',
        b'{"prompt": [99999999999999999999999]}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "seed": 99999999999999999999999}',
        b"[" * 50_000,
        b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"prompt": "a", "json_schema": {"$ref": "http://example.com/x"}}',
        b'{"prompt": "a", "json_schema": {"$ref": "file:///etc/passwd"}}',
        b'{"prompt": "a", "grammar": "start: start start"}',
    ],
)
def test_malformed_bodies_are_400(server: Server, body: bytes) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert works(server)


def test_regex_that_would_be_large_written_out(server: Server) -> None:
    answer = server.post("/v1/completions", {"prompt": "a", "regex": "(a{1000}){1000}", "max_tokens": 5})
    assert answer.json()["choices"][0]["text"] == "aaaaa"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"content": "\ud800"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/codes", {}),
        ("/codes", {"text": "a", "tokens": [1]}),
        ("/codes", {"tokens": [10**9]}),
        ("/v1/embeddings", {"input": []}),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}),
        ("/v1/embeddings", {"input": ["a", ""]}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": {"a": 1}}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ 1 }}"}),
    ],
)
def test_malformed_requests_elsewhere(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(
        server.url + path, content=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_what_is_no_http(strict: Server) -> None:
    assert answer_to(strict, b"\x16\x03\x01\x02\x00\x01\x00").startswith(b"HTTP/1.1 4")
    assert b'"invalid_request_error"' in answer_to(strict, b"no\r\n\r\n")
    assert answer_to(strict, b"GET / HTTP/1.1\r\n" + b"a: " + b"b" * 200_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 4")
    assert works(strict)


# --- huge and slow ---------------------------------------------------------------------------------------------------


def test_large_bodies_are_413(strict: Server) -> None:
    answer = strict.post("/v1/completions", {"prompt": "a" * 200_000})
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"

    def endless() -> Iterator[bytes]:
        for _ in range(50):
            yield b"a" * 10_000

    as_json = {"Content-Type": "application/json"}
    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # it need not read on
        assert (
            httpx.post(f"{strict.url}/v1/completions", content=endless(), headers=as_json, timeout=30).status_code
            == 413
        )
    lies = HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n"
    assert answer_to(strict, lies).startswith(b"HTTP/1.1 4")
    assert works(strict)


@pytest.mark.parametrize(
    "request_",
    [
        b"Content-Length: 10000000\r\n\r\n",
        b"Connection: close\r\nContent-Length: 10000000\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 70,
        b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 70,
    ],
)
def test_too_large_bodies_are_not_waited_for(served_path: Path, start: Start, request_: bytes) -> None:
    """Whose end never comes."""
    with start(served_path, "--read-timeout", "1000") as server:
        head, _, body = answer_to(server, HEAD + request_).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in head.lower()
        assert "larger than 4194304 bytes" in json.loads(body)["error"]["message"]
        assert works(server)
        until(lambda: " path=/v1/completions status=413 " in server.log.read_text())


def test_who_is_still_sending_sees_why_it_is_refused(server: Server) -> None:
    """The connection is not reset under what it sends."""
    for head, sent, status in (
        (HEAD + b"Content-Length: 20000000\r\n\r\n", b" " * 20_000_000, 413),
        (b"GET / HTTP/1.1\r\nX: ", b"a" * 5_000_000, 431),
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n" * 200_000, 431),
        (b"no HTTP\r\n\r\n", b" " * 5_000_000, 400),
    ):
        with connected(server) as raw:
            raw.sendall(head)
            raw.sendall(sent)
            received = b""
            while data := raw.recv(65536):
                received += data
        assert received.startswith(b"HTTP/1.1 %d " % status)
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert works(server)


def test_two_lengths_are_refused(server: Server) -> None:
    """What a proxy may take for another request is no request here."""
    body = b'{"prompt":"the","max_tokens":1}'
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    next_one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for names in (
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: %d\r\n\r\n",
    ):
        received = answer_to(server, HEAD + names % len(body) + chunked + next_one)
        assert received.startswith(b"HTTP/1.1 400 ")
        assert received.count(b"HTTP/1.1") == 1
        assert b"Transfer-Encoding" in received


def test_slow_requests_are_ended(strict: Server) -> None:
    begin = time.monotonic()
    assert answer_to(strict, *[bytes([byte]) for byte in HEAD], pause=0.05).startswith(b"HTTP/1.1 408")
    slow_body = HEAD + b"Content-Length: 1000\r\n\r\n"
    for parts in ((slow_body, b'{"prompt"'), ()):
        head, _, body = answer_to(strict, *parts).partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0] == b"HTTP/1.1 408 Request Timeout"
        assert {b"connection: close", b"content-length: %d" % len(body)} < set(lines)
        assert "not arrived within 1 s" in json.loads(body)["error"]["message"]
    with connected(strict) as raw:  # not the first one of its connection
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he")
        received = b""
        while data := raw.recv(65536):
            received += data
    assert re.findall(rb"HTTP/1.1 (\d+) ", received) == [b"200", b"408"]
    assert time.monotonic() - begin < 30
    assert works(strict)


def test_many_idle_connections_do_no_harm(strict: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connected(strict))
        assert works(strict)


@pytest.mark.slow
def test_reader_that_takes_nothing_is_cut_off(long_path: Path, start: Start) -> None:
    with start(long_path, "--write-timeout", "1") as server:
        body = json.dumps(
            {"prompt": "the", "max_tokens": 90_000, "stream": True, "logprobs": 20, "ignore_eos": True}
        ).encode()
        with connected(server) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
            assert server.idle(60)
        assert server.metric("llamacpp:tokens_predicted_total") < 90_000
        assert works(server)


def test_connection_that_is_dropped_while_it_waits(long_path: Path, start: Start) -> None:
    """One runs, one waits in the queue, both vanish without a word."""
    body = json.dumps({"prompt": "the", "max_tokens": 90_000, "ignore_eos": True}).encode()
    with start(long_path, "--parallel", "1") as server:
        with connected(server) as first, connected(server) as second:
            for raw in (first, second):
                raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            deadline = time.monotonic() + 30
            while server.metric("fixmin:sequences_admitted") < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert server.metric("llamacpp:requests_deferred") == 1
        assert server.idle()
        assert works(server)


# --- work before limits ----------------------------------------------------------------------------------------------

BODIES = schemas.BODIES
PARTS = (b"1.5,", b"{},", b"[],", b"[1],", b'"",', b'"zz",')
REQUIRED = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "input": "a", "tokens": [1]}


def hostile_bodies(path: str) -> Iterator[tuple[str, bytes]]:
    """Every field of an endpoint, with more than anybody needs."""
    fields = BODIES[path].model_fields
    own = {name: value for name, value in REQUIRED.items() if name in fields and name != "tokens"}
    for i, name in enumerate(fields):
        head = json.dumps({k: v for k, v in own.items() if k != name})[:-1].encode()
        head += (b"," if len(head) > 1 else b"") + json.dumps(name).encode() + b":"
        part = PARTS[i % len(PARTS)]
        yield (
            name,
            (
                head + b"[" + part * (190_000 if i % 2 else 1_000_000 // len(part)) + part[:-1] + b"]}",
                head + b"{" + b",".join(b'"%d":1' % k for k in range(100_000)) + b"}}",
                head + b'"' + b"ab " * 1_000_000 + b'"}',
            )[i // 2 % 3],
        )


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
def test_no_field_takes_all_of_the_server(server: Server, path: str) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    before = memory(server)
    for name, body in hostile_bodies(path):
        answer = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=60)
        assert answer.status_code in (200, 400), (name, answer.status_code, answer.text[:200])
        assert len(answer.content) < 10_000, name
    assert memory(server) - before < 200, "MB"
    assert works(server)


WORST = [
    ("/tokenize", {"content": "ab " * 43_000, "with_pieces": True}, 200),
    ("/tokenize", {"content": "\U0001f600" * 200_000}, 400),
    ("/codes", {"tokens": [7] * 65_000}, 200),
    ("/codes", {"tokens": [7] * 190_000}, 400),
    ("/detokenize", {"tokens": [7] * 190_000}, 200),
    ("/v1/embeddings", {"input": ["the"] * 2000}, 200),
    ("/v1/completions", {"prompt": ["the " * 30] * 500, "echo": True, "logprobs": 20, "max_tokens": 200}, 400),
    ("/v1/completions", {"prompt": "a", "n": 128, "logprobs": 20, "max_tokens": 100, "ignore_eos": True}, 200),
    ("/v1/completions", {"prompt": "a", "n": 128, "max_tokens": 100, "ignore_eos": True, "stream": True}, 200),
    ("/v1/completions", {"prompt": "a", "regex": "(ab|cd)?" * 32_000}, 400),
    ("/v1/completions", {"prompt": "a", "grammar": "start: " + " | ".join(f'"a{i}"' for i in range(5000))}, 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": {str(i): 1 for i in range(190_000)}}, 400),
    ("/v1/completions", {"prompt": [10**90] * 30_000}, 400),
    ("/v1/completions", {"prompt": [10**2000] * 1000}, 400),
    ("/v1/completions", {"prompt": '"\\' * 900_000}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab " * 600}] * 2048}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", **{str(i): 1 for i in range(190_000)}}]}, 400),
]


def test_what_stands_in_texts_counts_too(server: Server) -> None:
    """UTF-16 has bytes that look like quotes, a schema may come as JSON text, many generations have lists each."""
    hidden = ('{"prompt":["\u2241",' + "{}," * 600_000 + '"\u2241"]}').encode("utf-16-le")
    headers = {"Content-Type": "application/json"}
    for body in (hidden, '{"prompt": "a", "max_tokens": 1}'.encode("utf-16")):
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, timeout=60)
        assert answer.status_code == 400
        assert "the body is not JSON" in answer.json()["error"]["message"]
    text = '{"enum": [' + "1," * 20_000 + "1]}"
    for fields, name in (
        ({"json_schema": text}, "json_schema"),
        ({"n": 128, "banned_ids": [5] * 60_000}, "banned_ids"),
        ({"n": 128, "bad_ids": [5] * 60_000}, "bad_ids"),
        ({"prompt": ["a"] * 500, "dry_sequence_breakers": [[5] * 1000] * 60}, "dry_sequence_breakers"),
        ({"dry_multiplier": 1, "dry_sequence_breakers": ["a" * 65]}, "dry_sequence_breakers"),
    ):
        answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, **fields})
        assert answer.status_code == 400, fields
        assert answer.json()["error"]["param"] == name
    assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "banned_ids": [5] * 60_000}).is_success


def test_breakers_are_counted_as_they_are_met(model: Model) -> None:
    """A letter is met by every token that holds it, and each generation keeps all of them: that took gigabytes."""
    given = {"dry_multiplier": 1.0, "dry_sequence_breakers": ["a"] * 64}
    limits.check_generations(model, given, 1)
    with pytest.raises(ArgumentError, match="dry_sequence_breakers are met by more than 131072 sequences"):
        limits.check_generations(model, given, 10_000)
    limits.check_generations(model, {**given, "dry_multiplier": 0.0}, 10_000)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"choices": ["\ue123" * 100_000]}),
        ("/v1/completions", {"json_schema": {"$ref": "#/" + "x" * 100_000}}),
        ("/v1/completions", {"json_schema": {"const": "\ue123" * 100_000}}),
        ("/v1/completions", {"stream_options": {"x" * 100_000: 1}}),
    ],
)
def test_messages_are_short(server: Server, path: str, fields: dict[str, Any]) -> None:
    answer = server.post(path, {"prompt": "a", **fields})
    assert answer.status_code == 400
    assert len(answer.content) < 20_000  # an escape for each of 2,000 characters


@pytest.mark.slow
def test_what_waits_for_the_engine_holds_up_nobody(long_path: Path, start: Start) -> None:
    """Embeddings are computed behind what runs; meanwhile texts are tokenised, and nothing is stuck."""
    with start(long_path, "--parallel", "1") as server, contextlib.ExitStack() as stack:
        endless = {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True, "stream": True}
        stack.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=endless, timeout=60))
        body = json.dumps({"input": "the"}).encode()
        head = HEAD.replace(b"/v1/completions", b"/v1/embeddings")
        for _ in range(6):
            raw = stack.enter_context(connected(server))
            raw.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + 30
        while server.metric("fixmin:sequences_admitted") < 7 and time.monotonic() < deadline:
            time.sleep(0.02)
        begin = time.monotonic()
        while time.monotonic() - begin < 6:
            assert server.get("/health").status_code == 200
            assert server.post("/tokenize", {"content": "the"}).status_code == 200
            time.sleep(0.5)
        stack.close()
        assert server.idle()
        assert server.post("/v1/embeddings", {"input": "the"}).status_code == 200


def test_no_request_holds_up_the_others(server: Server) -> None:
    """The worst wait for /health and the memory, with room for a busy machine: unloaded 100 ms and 64 MB."""
    before, waits, ended = memory(server), [0.0], threading.Event()

    def poll() -> None:
        with httpx.Client(timeout=60) as client:
            while not ended.wait(0.02):
                begin = time.monotonic()
                assert client.get(f"{server.url}/health").status_code == 200
                waits.append(time.monotonic() - begin)

    polling = threading.Thread(target=poll)
    polling.start()
    try:
        for path, body, status in WORST:
            answer = server.post(path, body)
            assert answer.status_code == status, (path, str(body)[:60], answer.text[:200])
    finally:
        ended.set()
        polling.join()
    assert len(waits) > 10
    assert max(waits) < 1.5
    assert memory(server) - before < 200, "MB"


def memory(server: Server) -> float:
    """The most that the process had in memory, MB."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.parametrize(
    "headers",
    [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json", "Content-Encoding": "gzip"}],
)
def test_bodies_that_are_not_said_to_be_json_are_415(server: Server, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt":"a"}', headers=headers)
    assert answer.status_code == 415
    assert "Content-" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("[::1]", 200), ("LocalHost.", 200), ("evil.example", 421), ("localhost.evil.example", 421)],
)
def test_foreign_names_are_not_served(server: Server, host: str, status: int) -> None:
    assert server.get("/v1/models", headers={"Host": host}).status_code == status


def test_old_http_needs_no_name(server: Server) -> None:
    assert answer_to(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert answer_to(server, b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n").startswith(b"HTTP/1.1 421")


def test_empty_keys_do_not_open_a_server(served_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIXMIN_API_KEY", "")
    assert "FIXMIN_API_KEY is empty" in _serve(served_path).stderr
    monkeypatch.delenv("FIXMIN_API_KEY")
    monkeypatch.setenv("FIXMIN_API_KEY_FILE", " ")
    assert "FIXMIN_API_KEY_FILE is empty" in _serve(served_path).stderr
    monkeypatch.delenv("FIXMIN_API_KEY_FILE")
    (tmp_path / "keys").write_text("\n")
    assert "no API key" in _serve(served_path, "--api-key-file", str(tmp_path / "keys")).stderr


def test_keys_from_a_file(served_path: Path, start: Start, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\ntwo\n")
    with start(served_path, "--api-key-file", str(tmp_path / "keys")) as server:
        assert server.get("/v1/models").status_code == 401
        assert server.get("/v1/models", headers={"Authorization": "Bearer two"}).status_code == 200
        assert "2 are known" in server.log.read_text()


def test_paths_and_methods_that_mean_the_same(server: Server) -> None:
    for path in ("/", "/health", "/v1/health", "/v1/models", "/v1/models/toy", "/props", "/metrics", "/docs"):
        answer = httpx.head(server.url + path)
        assert answer.status_code == 200, path
        assert answer.content == b""
        assert server.get(f"{path}/").status_code == 200, path
    asked = {"prompt": "the", "max_tokens": 1}
    assert server.post("/v1/completions/", asked).status_code == 200
    assert httpx.head(f"{server.url}/v1/completions").status_code == 405
    assert server.get("/health", params={"a": "b"}).status_code == 200
    assert httpx.request("GET", f"{server.url}/health", content=b"a body").status_code == 200
    address = server.url.removeprefix("http://").encode()
    for host, status in ((address, b"200"), (b"evil.example", b"421")):
        line = b"GET http://%s/v1/models HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (host, address)
        assert answer_to(server, line).startswith(b"HTTP/1.1 " + status)


def test_an_empty_line_between_requests(server: Server) -> None:
    body = b'{"prompt":"the","max_tokens":1}'
    asked = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert answer_to(server, b"\r\n" + asked, b"\r\n" + last, pause=1.0).count(b"HTTP/1.1 200 OK") == 2
    assert answer_to(server, b"\r\n", asked, b"\r\n", last, pause=1.0).count(b"HTTP/1.1 200 OK") == 2
    in_one = answer_to(server, asked + b"\r\n", last, pause=1.0)
    assert (in_one.count(b"HTTP/1.1 "), in_one.count(b"HTTP/1.1 200 OK")) == (2, 2)


def test_a_client_that_goes_while_it_asks_is_no_error(served_path: Path, start: Start) -> None:
    with start(served_path) as server:
        for part in (b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"):
            with connected(server) as raw:
                raw.sendall(HEAD + part)
                time.sleep(0.2)
        assert works(server)
        assert "Traceback" not in server.log.read_text()


def test_a_body_that_is_too_large_is_answered_before_it_ends(server: Server) -> None:
    """And the connection can be used again: clients that are cut off while they send see no answer."""
    body = b'{"prompt":"' + b"a" * (6 << 20) + b'"}'
    for kind, close in (("application/json", False), ("application/json", True), ("text/plain", True)):
        headers = {"Content-Type": kind, **({"Connection": "close"} if close else {})}
        with httpx.Client(timeout=60, headers=headers) as client:
            for _ in range(3):
                answer = client.post(f"{server.url}/v1/completions", content=body)
                assert answer.status_code == 413
    lines = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connected(server) as raw:
        raw.sendall(lines + body)  # without a reset
        assert raw.recv(12) == b"HTTP/1.1 413"


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_full_queue_is_429(long_path: Path, start: Start) -> None:
    endless = {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True, "stream": True}
    with start(long_path, "--parallel", "1", "--max-queue", "1") as server, contextlib.ExitStack() as stack:
        url = f"{server.url}/v1/completions"
        for _ in range(2):
            running = stack.enter_context(httpx.stream("POST", url, json=endless, timeout=60))
            assert running.status_code == 200
        for stream in (True, False):
            refused = server.post("/v1/completions", {"prompt": "the", "stream": stream})
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
        stack.close()
        assert server.idle()
        assert server.post("/v1/completions", {"prompt": "the", "n": 3}).status_code == 400  # never
        assert works(server)


def test_timeout_ends_a_generation(long_path: Path, start: Start) -> None:
    with start(long_path, "--timeout", "1") as server:
        answer = server.post("/v1/completions", {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True}).json()
        assert answer["choices"][0]["finish_reason"] == "timeout"
        assert 0 < answer["usage"]["completion_tokens"] < 90_000


def test_keys(served_path: Path, start: Start) -> None:
    with start(served_path, "--api-key", "first", FIXMIN_HOST="127.0.0.1") as server:
        for header in (None, "Bearer second", "Bearer", "first", "Basic first", "Bearer first2", "Bearer \xe9"):
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            for path in ("/v1/models", "/props", "/metrics", "/openapi.json"):
                answer = server.get(path, headers=headers)
                assert answer.status_code == 401, (header, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert server.post("/v1/completions", {"prompt": "a"}, headers=headers).status_code == 401
        assert server.get("/health").status_code == 200
        assert server.get("/v1/models", headers={"Authorization": "Bearer first"}).status_code == 200


def test_the_description_with_keys(served_path: Path, start: Start) -> None:
    """The page needs nothing from elsewhere, and no key; what it shows does."""
    with start(served_path, "--api-key", "k") as server:
        page = server.get("/docs")
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "://" not in page.text
        assert server.get("/openapi.json").status_code == 401
        described = server.get("/openapi.json", headers={"Authorization": "Bearer k"}).json()
    assert described["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path in BODIES:
        operation = described["paths"][path]["post"]
        assert operation["security"] == [{"HTTPBearer": []}]
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
        assert operation["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "allowed_ids": [5], "banned_ids": [5]}, "banned_ids"),
        ("/v1/completions", {"prompt": "a", "allowed_ids": [5], "regex": "[^a-z]+", "max_tokens": 3}, "allowed_ids"),
        ("/v1/completions", {"prompt": "a", "frequency_penalty": -3e38, "min_tokens": 9}, "frequency_penalty"),
        ("/v1/completions", {"prompt": "a", "regex": "a", "choices": ["a"]}, "regex"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 3, "max_completion_tokens": -7}, "max_completion_tokens"),
        ("/v1/embeddings", {"input": ["ok", ""]}, "input"),
        ("/v1/embeddings", {"input": [[1], [10**6]]}, "input"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ],
)
def test_errors_name_the_field(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"content": "the abc", "with_pieces": True}),
        ("/tokenize", {"prompt": ""}),
        ("/codes", {"text": "the abc"}),
        ("/detokenize", {"tokens": [1, 2]}),
        ("/v1/embeddings", {"input": ["the", "abc"]}),
        ("/v1/embeddings", {"input": "the", "encoding_format": "base64"}),
        ("/v1/completions", {"prompt": "the", "logprobs": 2, "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": REQUIRED["messages"], "logprobs": True, "max_tokens": 2}),
    ],
)
def test_answers_are_as_described(server: Server, path: str, body: dict[str, Any]) -> None:
    answers = pytest.importorskip("fixmin_cpp.serve.answers")
    described = server.get("/openapi.json").json()["paths"][path]["post"]["responses"]["200"]
    name = described["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    getattr(answers, name).model_validate(server.post(path, body).json())


def test_keys_from_the_environment(served_path: Path, start: Start) -> None:
    with start(served_path, FIXMIN_API_KEY="one two", FIXMIN_MODEL_NAME="named") as server:
        assert server.get("/v1/models").status_code == 401
        answer = server.get("/v1/models", headers={"Authorization": "Bearer two"})
        assert answer.json()["data"][0]["id"] == "named"


def test_cors_only_when_asked_for(server: Server, served_path: Path, start: Start) -> None:
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.get("/v1/models", headers=asking).headers
    with start(served_path, "--cors-origin", "https://a.example", "--api-key", "k") as open_server:
        preflight = httpx.options(f"{open_server.url}/v1/completions", headers=asking)
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        own_id = preflight.headers["x-request-id"]
        until(lambda: f"request_id={own_id} method=OPTIONS" in open_server.log.read_text())
        other = httpx.options(f"{open_server.url}/v1/completions", headers={**asking, "Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


# --- beginning and end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_shutdown_lets_streams_finish(long_path: Path, start: Start, number: signal.Signals) -> None:
    """Also when the terminal is closed."""
    with start(long_path, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)") as server:
        body = {"prompt": "the", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(number)
            events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            server.get("/health")


def test_what_has_not_begun_is_told_of_the_shutdown(long_path: Path, start: Start) -> None:
    """Generations that wait for their turn find the model closed: that is no error of the server's."""
    body = json.dumps({"prompt": "the", "n": 128, "max_tokens": 90_000, "ignore_eos": True}).encode()
    with start(long_path, "--shutdown-timeout", "1") as server, contextlib.ExitStack() as stack:
        asking = [stack.enter_context(connected(server)) for _ in range(3)]
        for raw in asking:
            raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + 60
        while server.metric("fixmin:sequences_admitted") < 384 and time.monotonic() < deadline:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert [raw.recv(12) for raw in asking] == [b"HTTP/1.1 503"] * 3
        assert server.process.wait(30) == 0


def test_shutdown_does_not_wait_for_ever(long_path: Path, start: Start) -> None:
    with start(long_path, "--shutdown-timeout", "1") as server:
        body = {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True}
        asking = threading.Thread(target=_ask, args=(server, body))
        asking.start()
        deadline = time.monotonic() + 30
        while server.metric("llamacpp:requests_processing") == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        asking.join(30)
        assert not asking.is_alive()


def _ask(server: Server, body: dict[str, Any]) -> None:
    with contextlib.suppress(httpx.HTTPError):
        server.post("/v1/completions", body)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF" + b"\0" * 100)
    for path, part in ((wrong, "wrong.gguf"), (tmp_path / "absent.gguf", "absent.gguf")):
        ran = _serve(path)
        assert ran.returncode == 1
        assert part in ran.stderr
        assert "Traceback" not in ran.stderr


def test_an_address_that_is_taken(server: Server, served_path: Path) -> None:
    ran = _serve(served_path, "--port", server.url.rpartition(":")[2])
    assert ran.returncode == 1
    assert "cannot listen on 127.0.0.1" in ran.stderr


def _serve(path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from fixmin_cpp.cli import main; main()", "serve", str(path), "--port", "0"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"max_queue": -1},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"api_keys": ("",)},
        {"api_keys": ("\u00e9",)},
        {"n_parallel": 0},
        {"model": None},
        {"model": ""},
        {"model": "a\0b"},
        {"host": "a\0b"},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong)).replace("api_keys", "API key|api_keys")):
        serve.ServeSettings(**{"model": "x.gguf", **wrong})


def test_settings_do_not_show_keys() -> None:
    shown = repr(serve.ServeSettings(model="x.gguf", api_keys=("secret",), max_n=7))
    assert "secret" not in shown
    assert "max_n=7" in shown
    assert "api_keys=1 of them" in shown


def test_template_is_checked() -> None:
    with pytest.raises(ArgumentError, match="chat_template"):
        serve.create_app(serve.ServeSettings(model="x.gguf", chat_template="{% if %}"))
