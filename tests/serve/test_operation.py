"""What an operator meets: the end of a server, its connections, its log, its metrics."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Server, Start
from toy_models import concatenating, write_model

import fixmin_cpp

LONG = {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True}


def _in_thread(ask: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    return thread, found


def _running(server: Server, n: int) -> None:
    deadline = time.monotonic() + 30
    while server.metric("llamacpp:requests_processing") < n:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_past_the_shutdown_timeout_everybody_is_told(long_path: Path, start: Start) -> None:
    with start(long_path, "--shutdown-timeout", "1") as server:
        whole, answers = _in_thread(lambda: server.post("/v1/completions", LONG))
        stream, streams = _in_thread(lambda: server.post("/v1/completions", {**LONG, "stream": True}))
        _running(server, 2)
        server.process.send_signal(signal.SIGTERM)
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
    assert "Traceback" not in server.log.read_text()


def test_busy_preparation_does_not_keep_a_process(served_path: Path, start: Start) -> None:
    slow = "import time, fixmin_cpp.serve.app as app\napp._chat_prompt = lambda *_: time.sleep(600)"
    with start(served_path, "--shutdown-timeout", "1", before=slow) as server:
        body = {"messages": [{"role": "user", "content": "the"}]}
        asked = [_in_thread(lambda: server.post("/v1/chat/completions", body)) for _ in range(6)]
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0
        for thread, _ in asked:
            thread.join(10)
    assert [found[0].status_code for _, found in asked] == [503] * 6
    assert "Traceback" not in server.log.read_text()


def test_connections_beyond_the_limit_get_json(served_path: Path, start: Start) -> None:
    with start(served_path, "--max-connections", "2") as server:
        url = httpx.URL(server.url)
        time.sleep(0.5)  # until the connections of the start are gone
        with socket.create_connection((url.host, url.port)), socket.create_connection((url.host, url.port)):
            time.sleep(0.5)
            answer = server.get("/v1/models")
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "too_many_connections"
            assert answer.headers["connection"] == "close"
        time.sleep(0.5)
        assert server.get("/v1/models/").json()["data"][0]["id"] == server.model.stem


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
    assert [arguments["_kv_room"] for arguments in seen] == [(40, 0.25)] * 2


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
    assert "mine-1 GET /v1/models: 200 in " in log
    assert "loaded " in log


def test_clients_that_went_away_are_499(long_path: Path, start: Start) -> None:
    with start(long_path) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as answer:
            next(answer.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.5)
        assert server.idle()
        deadline = time.monotonic() + 10
        while 'status="499"} 2.0' not in server.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert server.log.read_text().count("POST /v1/completions: client gone") == 2


def test_every_sample_names_the_model(server: Server) -> None:
    server.post("/v1/completions", {"prompt": "the", "max_tokens": 3})
    lines = [line for line in server.get("/metrics").text.splitlines() if line and not line.startswith("#")]
    assert lines
    assert [line for line in lines if 'model_name="toy"' not in line] == []
    assert server.idle()
    assert server.metric("llamacpp:kv_cache_usage_ratio") == 0  # known prompts give way
