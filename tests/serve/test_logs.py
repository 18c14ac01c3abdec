"""Lines on stderr: what they say of requests, and that clients cannot write them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from servers import Server, Start, httpx, serving, until

SECRET = "thequick"  # in prompts and keys
GENERATION = ("prompt_tokens", "generated_tokens", "queue_s", "first_token_s", "finish_reason")
BODY = {"prompt": "the", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def objects(server: Server) -> list[dict[str, Any]]:
    """Every line of a log must be one."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def requests(server: Server, n: int = 1) -> list[dict[str, Any]]:
    """Those of at least n requests: a line is written when the answer has been sent."""
    found: list[dict[str, Any]] = []

    def enough() -> bool:
        found[:] = [line for line in objects(server) if line["message"] == "request"]
        return len(found) >= n

    until(enough)
    return found


def asked(server: Server, own_id: str) -> dict[str, Any]:
    """The line of a request."""
    found: list[dict[str, Any]] = []

    def there() -> list[dict[str, Any]]:
        found[:] = [line for line in objects(server) if line.get("request_id") == own_id]
        return found

    until(there)
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def logged(served_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(served_path, log, "--log-format", "json", "--api-key", SECRET) as server:
        yield server
    assert SECRET not in log.read_text()
    assert all(
        {"time", "level", "logger", "message"} <= line.keys() for line in map(json.loads, log.read_text().splitlines())
    )


def headers(own_id: str) -> dict[str, str]:
    return {"X-Request-ID": own_id, "Authorization": f"Bearer {SECRET}"}


def test_start_lines(logged: Server) -> None:
    said = [line["message"] for line in objects(logged)]
    assert any(line.startswith("loaded ") for line in said)
    assert f"listening on {logged.url}" in said
    assert "API keys: 1 are known" in said
    assert not any("8000" in line for line in said)  # the port that it has, and no other


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_generations(logged: Server, stream: bool, chat: bool) -> None:
    own_id = f"g-{stream}-{chat}"
    body: dict[str, Any] = {**BODY, "stream": stream}
    path = "/v1/completions"
    if chat:
        path = "/v1/chat/completions"
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": "the"}]
    answer = logged.post(path, body, headers=headers(own_id))
    line = asked(logged, own_id)
    assert (line["method"], line["path"], line["status"], line["level"]) == ("POST", path, 200, "info")
    assert (line["generated_tokens"], line["finish_reason"]) == (6, "length")
    assert 0 <= line["queue_s"] <= line["first_token_s"] <= line["duration_s"] < 60
    if not stream:
        usage = answer.json()["usage"]
        assert line["prompt_tokens"] == usage["prompt_tokens"]
        assert line["generated_tokens"] == usage["completion_tokens"]


def test_a_line_of_a_stream_is_written_at_its_end(long_path: Path, start: Start) -> None:
    with start(long_path, "--log-format", "json", "--parallel", "1") as server:
        body = {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers={"X-Request-ID": "s"}) as answer:
            lines = answer.iter_lines()  # kept: without it the answer would be closed
            next(lines)
            assert not any(line.get("request_id") == "s" for line in objects(server))
            with pytest.raises(httpx.ReadTimeout):  # it waits for the other one, until the client loses patience
                httpx.post(f"{server.url}/v1/completions", json=BODY, headers={"X-Request-ID": "w"}, timeout=1)
            line = asked(server, "w")
            assert [line[name] for name in ("status", *GENERATION)] == [499, 1, 0, None, None, "abort"]
        line = asked(server, "s")
        assert (line["status"], line["finish_reason"], line["prompt_tokens"]) == (499, "abort", 1)
        assert 0 < line["generated_tokens"] < 90_000
        assert 0 < line["first_token_s"] < line["duration_s"]


def test_several_generations_are_taken_together(logged: Server) -> None:
    body = {"prompt": ["the", "abc"], "n": 2, "max_tokens": 4, "seed": 5, "logit_bias": {"2": 3}}
    usage = logged.post("/v1/completions", body, headers=headers("n")).json()["usage"]
    line = asked(logged, "n")
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["generated_tokens"] == usage["completion_tokens"]
    assert set(line["finish_reason"].split(",")) <= {"length", "stop"}


def test_the_end_of_text_token_counts(logged: Server, model: Any) -> None:
    """Where it is all there is, its time is that of the first token."""
    end = model.info["eos_token_id"]
    body = {**BODY, "ignore_eos": False, "logit_bias": {str(end): 1000}}
    assert logged.post("/v1/completions", body, headers=headers("end")).json()["usage"]["completion_tokens"] == 1
    line = asked(logged, "end")
    assert (line["generated_tokens"], line["finish_reason"]) == (1, "stop")
    assert line["first_token_s"] > 0


def test_generations_that_fail(logged: Server, model: Any) -> None:
    """The client of a stream has been told 200 before."""
    counted = logged.get("/metrics", headers=headers("m")).text.count('finished_reason="error"')
    assert counted == 0
    for stream, status in ((True, 200), (False, 400)):
        body = {"prompt": "the", "choices": ["a"], "banned_ids": model.encode("a"), "stream": stream}
        assert logged.post("/v1/completions", body, headers=headers(f"fails-{stream}")).status_code == status
        line = asked(logged, f"fails-{stream}")
        assert [line[name] for name in ("status", "generated_tokens", "finish_reason")] == [status, 0, "error"]
    assert 'request_success_total{finished_reason="error",model_name="letters"} 2.0' in (
        logged.get("/metrics", headers=headers("m2")).text
    )


def test_requests_without_generations(logged: Server) -> None:
    wrong: list[tuple[str, str, Any, int]] = [
        ("bad", "/v1/completions", {"prompt": "the", "max_tokens": -7}, 400),
        ("nowhere", "/nowhere", {}, 404),
        ("tokens", "/tokenize", {"content": "the"}, 200),
        ("embed", "/v1/embeddings", {"input": "the"}, 200),
    ]
    for own_id, path, body, status in wrong:
        assert logged.post(path, body, headers=headers(own_id)).status_code == status
        line = asked(logged, own_id)
        assert line["status"] == status
        assert "finish_reason" not in line
        assert line.get("prompt_tokens") == (1 if own_id == "embed" else None)
    logged.post("/v1/completions", BODY, headers={"X-Request-ID": "key", "Authorization": f"Bearer {SECRET}x"})
    assert asked(logged, "key")["status"] == 401


def test_warnings_about_grammars_are_not_shown(logged: Server) -> None:
    schema = {"x-guidance": {"lenient": True}, "type": "string", "format": SECRET}
    body = {**BODY, "grammar": f"start: %json {json.dumps(schema)}"}
    logged.post("/v1/completions", body, headers=headers("warned"))
    asked(logged, "warned")
    assert SECRET not in logged.log.read_text()


def test_as_text(served_path: Path, start: Start) -> None:
    with start(served_path) as server:
        server.post("/v1/completions", BODY, headers={"X-Request-ID": "mine"})
        until(lambda: "request_id=mine" in server.log.read_text())
    line = next(line for line in server.log.read_text().splitlines() if "request_id=mine" in line)
    number = r"\d+\.\d{4}"
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} INFO request request_id=mine method=POST path=/v1/completions "
        rf"status=200 duration_s={number} prompt_tokens=1 generated_tokens=6 queue_s={number} first_token_s={number} "
        rf"finish_reason=length",
        line,
    )


# What a client can put where a line quotes it.
FORGED = 'x\n2026-01-01 00:00:00,000 INFO request request_id=forged status=200\r\x1b[2J\x00\x85\u2028 y=z"'


@pytest.mark.parametrize("form", ["text", "json"])
def test_clients_cannot_forge_lines(served_path: Path, start: Start, form: str) -> None:
    with start(served_path, "--log-format", form, "--log-level", "debug") as server:
        begun = len(server.log.read_text().splitlines())
        assert httpx.get(f"{server.url}/{quote(FORGED)}").status_code == 404
        assert server.get("/health", headers={"X-Request-ID": 'a"status=500'}).status_code == 200
        raw = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: a\n2026 forged\r\n\r\n"
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(raw)
            assert connection.recv(100).startswith(b"HTTP/1.1 ")
        for body in ({"prompt": FORGED, FORGED: 1}, {"prompt": "a", "stop": FORGED}, {"model": FORGED, "prompt": "a"}):
            server.post("/v1/completions", body, headers={"User-Agent": "x"})
        until(lambda: server.log.read_text().count("completions") >= 3)
    lines = server.log.read_bytes().decode().split("\n")
    for line in lines[begun:-1]:
        assert line.isprintable(), line
        if form == "json":
            assert isinstance(json.loads(line), dict)
        else:
            assert re.match(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ |    ", line), line
            assert not line.startswith("2026-01-01")
            assert len(re.findall(" status=", line)) <= 1


BROKEN = (
    "import fixmin_cpp.serve.app as app\n"
    "def fail(host, body):\n"
    "    try: raise KeyError(body.content)\n"
    "    except KeyError as error: raise RuntimeError(body.content + '\\n2026-01-01 forged') from error\n"
    "app._tokenize = fail"
)


@pytest.mark.parametrize("form", ["text", "json"])
def test_failures_are_logged_once_and_without_what_was_asked(served_path: Path, start: Start, form: str) -> None:
    with start(served_path, "--log-format", form, before=BROKEN) as server:
        answer = server.post("/tokenize", {"content": SECRET}, headers={"X-Request-ID": "broken"})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert answer.headers["x-request-id"] == "broken"
        until(lambda: server.metric("fixmin:http_responses_total", status="500") == 1)
    log = server.log.read_text()
    assert SECRET not in log
    assert log.count("Traceback (most recent call last)") == 2  # the failure and its cause
    assert log.count("a request failed") == 1
    if form == "json":
        (line,) = (line for line in objects(server) if line["level"] == "error")
        assert line["request_id"] == "broken"
        assert line["exception"].index("KeyError") < line["exception"].index("RuntimeError")
    else:
        assert "a request failed request_id=broken\n    Traceback" in log


def test_failures_at_level_debug_show_messages(served_path: Path, start: Start) -> None:
    with start(served_path, "--log-level", "debug", before=BROKEN) as server:
        server.post("/tokenize", {"content": SECRET})
        until(lambda: "RuntimeError: thequick\n    2026-01-01 forged" in server.log.read_text())


def test_clients_that_leave_within_their_body_are_no_failures(served_path: Path, start: Start) -> None:
    with start(served_path, "--log-format", "json") as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port)) as connection:
            head = (
                "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Request-ID: left\r\n"
            )
            connection.sendall(head.encode() + b'Content-Length: 100\r\n\r\n{"content":')
            until(lambda: server.metric("fixmin:connections_open") >= 2)
        assert asked(server, "left")["status"] == 499
        assert [line for line in objects(server) if line["level"] != "info"] == []


@pytest.mark.parametrize(
    ("level", "least"),
    [("critical", 50), ("error", 40), ("warning", 30), ("info", 20), ("DEBUG", 10), ("trace", 5)],
)
def test_levels(level: str, least: int) -> None:
    """In a process of its own: the root logger is there once."""
    code = (
        "import logging, warnings; from fixmin_cpp.logs import *\n"
        f"configure(LogLevel({level.lower()!r}), LogFormat.json)\n"
        "for name in ('fixmin_cpp.x', 'uvicorn.error', 'other'):\n"
        "    for number in (50, 40, 30, 20, 10, 5): logging.getLogger(name).log(number, number)\n"
        "warnings.warn('careful')\n"
    )
    ran = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in ran.stderr.splitlines()]
    numbers = [5, 10, 20, 30, 40, 50]
    for name in ("fixmin_cpp.x", "uvicorn.error"):
        got = sorted(int(line["message"]) for line in said if line["logger"] == name)
        assert got == [number for number in numbers if number >= least]
    got = sorted(int(line["message"]) for line in said if line["logger"] == "other")
    assert got == [number for number in numbers if number >= max(least, 30)]
    assert any("careful" in line["message"] for line in said) == (least <= 30)


def _serve(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from fixmin_cpp.cli import main; main()", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.gguf", "--port", "0"), "absent.gguf"),
        (("absent.gguf", "--timeout", "-1"), "timeout must be"),
        (("absent.gguf", "--api-key-file", "absent"), "absent"),
        (("absent.gguf", "--uds", "/"), "cannot listen on /"),
    ],
)
def test_errors_at_the_start_are_objects_too(arguments: tuple[str, ...], message: str) -> None:
    ran = _serve(*arguments, FIXMIN_LOG_FORMAT="JSON")
    assert ran.returncode == 1
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    assert message in lines[-1]["message"]
    assert lines[-1]["level"] == "critical"


def test_options_that_contradict_or_are_none() -> None:
    assert "give one" in _serve("absent.gguf", "-q", "--log-level", "info").stderr
    assert _serve("absent.gguf", "--log-level", "loud").returncode == 2
    assert _serve("absent.gguf", "--log-format", "xml").returncode == 2


def test_quiet(served_path: Path, start: Start) -> None:
    command = [sys.executable, "-c", "from fixmin_cpp.cli import main; main()", "serve", str(served_path)]
    ran: Any = subprocess.Popen([*command, "--uds", "q", "-q"], stderr=subprocess.PIPE, cwd=served_path.parent)
    until((served_path.parent / "q").exists)
    ran.send_signal(signal.SIGTERM)
    assert ran.communicate(timeout=30)[1] == b""
    assert ran.returncode == 0


@contextlib.contextmanager
def unread(model: Path, folder: Path, *options: str, before: str = "") -> Iterator[Any]:
    """A process whose log goes into a pipe that nobody reads yet, and a client of it."""
    command = [sys.executable, "-c", before + "\nfrom fixmin_cpp.cli import main; main()", "serve", str(model)]
    path = folder / "s"
    ran: Any = subprocess.Popen([*command, "--uds", str(path), *options], stderr=subprocess.PIPE)
    try:
        until(path.exists)
        with httpx.Client(base_url="http://x", timeout=30, transport=httpx.HTTPTransport(uds=str(path))) as client:
            until(lambda: client.get("/health").status_code == 200)
            yield ran, client
    finally:
        ran.kill()
        ran.wait()
        ran.stderr.close()


def test_a_log_that_nobody_reads_stops_nothing(served_path: Path, tmp_path: Path) -> None:
    with unread(served_path, tmp_path, "--log-level", "trace") as (ran, client):
        for _ in range(300):
            assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=BODY).status_code == 200
        ran.send_signal(signal.SIGTERM)
        assert ran.wait(60) == 0


@pytest.mark.parametrize("most", [4 << 20, 1 << 14])
def test_a_log_that_is_read_late_has_every_line_or_says_how_many_not(
    served_path: Path, tmp_path: Path, most: int
) -> None:
    """A pipe takes 65,536 bytes."""
    before = f"import fixmin_cpp.serve.log_lines as log_lines\nlog_lines._MOST = {most}"
    n = 600
    with unread(served_path, tmp_path, "--log-format", "json", before=before) as (ran, client):
        for i in range(n):
            assert client.get("/health", headers={"X-Request-ID": f"h{i}"}).status_code == 200
        lines = [json.loads(ran.stderr.readline())]
        while lines[-1].get("request_id") not in (f"h{n - 1}", "after"):
            lines.append(json.loads(ran.stderr.readline()))
            if "missing" in lines[-1]["message"]:  # it has room again
                client.get("/health", headers={"X-Request-ID": "after"})
        ran.send_signal(signal.SIGTERM)
        lines += map(json.loads, ran.communicate(timeout=60)[1].splitlines())
        assert ran.returncode == 0
    assert "Finished server process" in lines[-1]["message"]
    numbers = [int(line["request_id"][1:]) for line in lines if line.get("request_id", "").startswith("h")]
    lost = [line["lines"] for line in lines if "missing" in line["message"]]
    if most > 1 << 20:
        assert (numbers, lost) == (list(range(n)), [])
    else:
        assert numbers == list(range(len(numbers)))  # the pipe's and as many as may wait, then the first that fits
        assert len(lost) == 1
        assert len(numbers) + lost[0] == n


def test_a_log_that_ends_stops_nothing(served_path: Path, tmp_path: Path) -> None:
    with unread(served_path, tmp_path) as (ran, client):
        ran.stderr.close()
        for _ in range(3):
            assert client.get("/health").status_code == 200
        ran.send_signal(signal.SIGTERM)
        assert ran.wait(60) == 0
