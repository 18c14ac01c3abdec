"""What an operator meets: the end of a server, its connections, its log, its metrics."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Server, Start, until
from toy_models import concatenating, write_model
from typer.main import get_command

import fixmin_cpp
from fixmin_cpp.cli import app

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
LONG = {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True}


def _in_thread(ask: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    return thread, found


def _running(server: Server, n: int) -> None:
    until(lambda: server.metric("llamacpp:requests_processing") >= n)


def _everybody_is_told(server: Server, ask_for_the_end: Callable[[], None]) -> None:
    """One whole answer and one stream are running when the end comes."""
    whole, answers = _in_thread(lambda: server.post("/v1/completions", LONG))
    stream, streams = _in_thread(lambda: server.post("/v1/completions", {**LONG, "stream": True}))
    _running(server, 2)
    ask_for_the_end()
    assert server.process.wait(40) == 0
    whole.join(10)
    stream.join(10)
    assert answers[0].status_code == 503
    error = answers[0].json()["error"]
    assert "shutting down" in error["message"]
    assert error["type"] == "unavailable_error"
    events = [line[6:] for line in streams[0].text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "shutting down" in json.loads(events[-2])["error"]["message"]
    log = server.log.read_text()
    assert "Traceback" not in log
    for status in (503, 200):  # a stream has begun well
        assert len(re.findall(f" path=/v1/completions status={status} .* finish_reason=abort$", log, re.MULTILINE)) == 1


def test_past_the_shutdown_timeout_everybody_is_told(long_path: Path, start: Start) -> None:
    with start(long_path, "--shutdown-timeout", "1") as server:
        _everybody_is_told(server, lambda: server.process.send_signal(signal.SIGTERM))


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_at_a_second_signal_everybody_is_told(long_path: Path, start: Start, first: signal.Signals) -> None:
    with start(long_path, "--shutdown-timeout", "1000") as server:

        def ask() -> None:
            server.process.send_signal(first)
            until(lambda: "Shutting down" in server.log.read_text())
            server.process.send_signal(signal.SIGINT)
            server.process.send_signal(signal.SIGINT)  # somebody may be impatient

        _everybody_is_told(server, ask)


@pytest.mark.parametrize(("raised", "code"), [("Panic('no such letter')", 1), ("SystemExit(7)", 7)])
def test_whatever_ends_the_loading_ends_the_server(served_path: Path, raised: str, code: int) -> None:
    """What a library in Rust raises in a panic is no Exception."""
    before = (
        "import fixmin_cpp.serve.host as host\nclass Panic(BaseException): pass\n"
        f"def load(*_, **__): raise {raised}\nhost.Model = load\nfrom fixmin_cpp.cli import main; main()"
    )
    command = [sys.executable, "-c", before, "serve", str(served_path), "--port", "0"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == code, ran.stderr
    if code == 1:
        assert "ERROR the model cannot be loaded: Panic: no such letter\n" in ran.stderr
        assert "could not be loaded: Panic: no such letter" in ran.stderr.splitlines()[-1]
        assert "Traceback" not in ran.stderr


def test_busy_preparation_does_not_keep_a_process(served_path: Path, start: Start) -> None:
    slow = (
        "import time, logging, fixmin_cpp.serve.app as app, fixmin_cpp.serve.host as host\n"
        "app._chat_prompt = lambda *_: time.sleep(600)\n"
        "compute, log = host.ModelHost.compute, logging.getLogger('fixmin_cpp')\n"
        "host.ModelHost.compute = lambda *a, **k: (log.info('ASKED'), compute(*a, **k))[1]"
    )
    with start(served_path, "--shutdown-timeout", "1", before=slow) as server:
        body = {"messages": [{"role": "user", "content": "the"}]}
        asked = [_in_thread(lambda: server.post("/v1/chat/completions", body)) for _ in range(6)]
        # Each to have its body read, in the same four threads, and those that get so far for their prompts.
        until(lambda: server.log.read_text().count("ASKED") >= 6 + 4)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0
        for thread, _ in asked:
            thread.join(10)
    assert [found[0].status_code for _, found in asked] == [503] * 6
    assert "Traceback" not in server.log.read_text()


def test_connections_beyond_the_limit_get_json(served_path: Path, start: Start) -> None:
    with start(served_path, "--max-connections", "2") as server:
        url = httpx.URL(server.url)
        alone = re.compile(r"^fixmin:connections_open\{.*\} 1\.0$", re.MULTILINE)
        until(lambda: alone.search(server.get("/metrics").text))  # those of the start are gone
        with (
            socket.create_connection((url.host, url.port)) as one,
            socket.create_connection((url.host, url.port)) as two,
        ):
            until(lambda: server.get("/v1/models").status_code == 503)
            answer = server.get("/v1/models")
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "too_many_connections"
            assert answer.headers["connection"] == "close"
            one.close()
            two.close()
        until(lambda: server.get("/v1/models/").status_code == 200)
        assert server.get("/v1/models/").json()["data"][0]["id"] == server.model.stem
        refused = server.log.read_text().count("connection refused connections=")
        assert refused >= 2
        assert server.metric("fixmin:connections_refused_total") == refused


def test_idle_connections_are_closed(served_path: Path, start: Start) -> None:
    with start(served_path, "--keep-alive", "1") as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port), timeout=30) as connection:
            request = f"GET /health HTTP/1.1\r\nHost: {url.host}\r\n\r\n".encode()
            for _ in range(2):  # the same connection takes another request
                connection.sendall(request)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += connection.recv(4096)
                assert answer.startswith(b"HTTP/1.1 200")
            assert connection.recv(4096) == b""


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_half_closed_client_gets_its_answer(long_server: Server, version: str, stream: bool) -> None:
    url = httpx.URL(long_server.url)
    body = json.dumps({"prompt": "the", "max_tokens": 400, "ignore_eos": True, "stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/{version}\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert b"HTTP/1.1 200" in answer
    assert (b"data: [DONE]" if stream else b'"finish_reason":"length"') in answer


def _completion(own_id: int, **fields: Any) -> bytes:
    body = json.dumps({"prompt": "the", "max_tokens": 30, "ignore_eos": True, **fields}).encode()
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"X-Request-ID: {own_id}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def _all_answers(server: Server, data: bytes) -> bytes:
    """To a client that ends its side as soon as it has sent everything."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [2, 3, 20])
def test_half_closed_client_gets_all_its_answers(server: Server, n: int, stream: bool) -> None:
    """Of requests that it has sent one behind the other, in their order."""
    answer = _all_answers(server, b"".join(_completion(i, stream=stream) for i in range(n)))
    assert answer.count(b"HTTP/1.1 200") == answer.count(b'"finish_reason":"length"') == n
    assert [int(own_id) for own_id in re.findall(rb"x-request-id: (\d+)\r\n", answer)] == list(range(n))


def test_half_closed_client_with_more_than_is_read_ahead(server: Server) -> None:
    long = "the" * 10_000
    answer = _all_answers(server, b"".join(_completion(i, user=long) for i in range(10)))
    assert [int(own_id) for own_id in re.findall(rb"x-request-id: (\d+)\r\n", answer)] == list(range(10))


def test_half_closed_client_that_has_not_sent_all(server: Server) -> None:
    """What is whole is answered, and the rest can't come any more."""
    answer = _all_answers(server, _completion(0) + _completion(1) + _completion(2)[:-5])
    assert answer.count(b'"finish_reason":"length"') == 2
    assert answer.count(b"HTTP/1.1 200") == 2
    until(server.idle)


def test_half_closed_client_is_not_asked_before_its_time(served_path: Path, start: Start) -> None:
    """Whether it is still there; most answers are quicker."""
    patient = "import fixmin_cpp.serve.protocol as protocol\nprotocol._PROBES = (1000.0, 1000.0)"
    with start(served_path, before=patient) as server:
        assert _all_answers(server, _completion(0)).startswith(b"HTTP/1.1 200 OK\r\n")


def test_cache_holds_all_that_run(served_path: Path, start: Start) -> None:
    with start(served_path, "--parallel", "40") as server:
        assert f"KV cache of {40 * 256} positions" in server.log.read_text()


def test_cache_is_a_quarter_of_the_memory_at_most(served_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fixmin_cpp.serve import ServeSettings, host

    seen: list[dict[str, Any]] = []

    def load(path: Any, **arguments: Any) -> fixmin_cpp.Model:
        seen.append(arguments)
        return fixmin_cpp.Model(path, **arguments)

    monkeypatch.setattr(host, "Model", load)
    for n_kv, positions in ((None, 40 * 256), (320, 320)):
        opened = host.ModelHost(ServeSettings(model=served_path, n_parallel=40, n_kv=n_kv))._open()
        assert opened.info["n_kv"] == positions
        opened.close()
    assert [(each["kv_contexts"], each["kv_memory_share"]) for each in seen] == [(40, 0.25)] * 2


def test_the_code_shown_is_that_of_the_loaded_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fixmin_cpp.inspect import describe
    from fixmin_cpp.serve import ServeSettings, host

    path, other = (write_model(tmp_path / f"{n}.gguf", concatenating(), seed=n) for n in (1, 2))
    expected, changed = describe(path)["code"], describe(other)["code"]
    assert expected != changed

    def load(*arguments: Any, **settings: Any) -> fixmin_cpp.Model:
        model = fixmin_cpp.Model(*arguments, **settings)
        os.replace(other, path)
        return model

    monkeypatch.setattr(host, "Model", load)
    served = host.ModelHost(ServeSettings(model=path))
    served._open().close()
    assert served.code == expected


def test_request_ids_and_log_lines(served_path: Path, start: Start) -> None:
    with start(served_path) as server:
        assert server.get("/v1/models", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
        for wrong in ("a b", "x" * 129):
            made = server.get("/v1/models", headers={"X-Request-ID": wrong}).headers["x-request-id"]
            assert len(made) == 32
    log = server.log.read_text()
    assert "request request_id=mine-1 method=GET path=/v1/models status=200 duration_s=" in log
    assert "loaded " in log


def test_clients_that_went_away_are_499(long_path: Path, start: Start) -> None:
    with start(long_path) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as answer:
            next(answer.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.5)
        assert server.idle()
        until(lambda: server.metric("fixmin:http_responses_total", status="499") == 2)
        assert server.metric("vllm:request_success_total", finished_reason="abort") == 2
    lines = [line for line in server.log.read_text().splitlines() if "status=499" in line]
    assert len(lines) == 2
    for line in lines:
        facts = dict(pair.split("=") for pair in line.split() if "=" in pair)
        assert (facts["prompt_tokens"], facts["finish_reason"]) == ("1", "abort")
        assert int(facts["generated_tokens"]) > 0


def test_every_sample_names_the_model(server: Server) -> None:
    server.post("/v1/completions", {"prompt": "the", "max_tokens": 3})
    lines = [line for line in server.get("/metrics").text.splitlines() if line and not line.startswith("#")]
    assert lines
    assert [line for line in lines if 'model_name="toy"' not in line] == []
    assert server.idle()
    assert server.metric("llamacpp:kv_cache_usage_ratio") == 0  # known prompts give way


def test_every_option_is_documented() -> None:
    command: Any = get_command(app)
    described = DOCS.read_text()
    for option in command.commands["serve"].params:
        if option.param_type_name != "option" or option.name == "help":
            continue
        long = [name for name in option.opts if name.startswith("--")]
        assert any(f"`{name}`" in described for name in long), long
        if option.name not in ("quiet", "debug"):
            assert option.envvar in [f"FIXMIN_{name[2:].replace('-', '_').upper()}" for name in long]
