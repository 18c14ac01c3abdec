"""Servers at a Unix socket, and below a prefix behind a proxy."""

import contextlib
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import Server, Start, httpx, proxy, serving

from fixmin_cpp import ArgumentError, ArgumentTypeError

serve = pytest.importorskip("fixmin_cpp.serve")
sockets = pytest.importorskip("fixmin_cpp.serve.sockets")


# --- Unix sockets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: a socket's has at most 107 bytes."""
    return tmp_path_factory.mktemp("s") / "fixmin.sock"


def test_a_unix_socket_is_there_while_the_server_is(served_path: Path, start: Start, place: Path) -> None:
    with start(served_path, "--uds", str(place), port=None) as server:
        assert stat.S_ISSOCK(place.stat().st_mode)
        whole = {"prompt": "the", "max_tokens": 5, "seed": 3}
        answer = server.post("/v1/completions", whole, headers={"Host": "any.example"})
        assert answer.json()["usage"]["completion_tokens"] > 0
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json={**whole, "stream": True}) as stream,
        ):
            events = [line[6:] for line in stream.iter_lines() if line]
        assert events[-1] == "[DONE]"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    assert not place.exists()
    assert f"listening on unix:{place}" in server.log.read_text()
    assert "http://" not in server.log.read_text()


def test_allowed_hosts_count_on_a_unix_socket(served_path: Path, start: Start, place: Path) -> None:
    with start(served_path, "--uds", str(place), "--allowed-host", "llm.example", port=None) as server:
        for host, status in (("llm.example", 200), ("localhost", 200), ("evil.example", 421)):
            assert server.get("/v1/models", headers={"Host": host}).status_code == status


def test_the_socket_of_a_dead_server_is_replaced(served_path: Path, start: Start, place: Path) -> None:
    with start(served_path, "--uds", str(place), port=None) as server:
        server.process.kill()
        server.process.wait()
    assert place.exists()
    with start(served_path, "--uds", str(place), port=None) as server:
        assert server.get("/health").status_code == 200
    assert not place.exists()


def test_of_two_that_find_a_dead_one_one_gets_its_place(place: Path) -> None:
    """Neither removes the other's socket between looking and listening."""
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(place))
    dead.close()
    settings = serve.ServeSettings(model="any.gguf", uds=str(place))
    begun, enough = threading.Semaphore(0), threading.Event()

    def one() -> str:
        begun.release()
        try:
            with sockets.listening(settings):
                assert enough.wait(30)
                return ""
        except OSError as error:
            enough.set()
            return str(error)

    folder = os.open(place.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(one) for _ in range(2)]
        for _ in both:
            assert begun.acquire(timeout=30)
        time.sleep(0.2)
        with socket.socket(socket.AF_UNIX) as probe, pytest.raises(ConnectionRefusedError):
            probe.connect(str(place))  # both wait
        os.close(folder)
        served, refused = sorted(future.result(60) for future in both)
    assert served == ""
    assert "another process is listening there" in refused
    assert not place.exists()


def test_the_socket_of_a_living_server_is_not(served_path: Path, start: Start, place: Path) -> None:
    with start(served_path, "--uds", str(place), port=None) as server:
        ran = fails(served_path, "--uds", str(place))
        assert f"cannot listen on {place}: another process is listening there" in ran
        assert server.get("/health").status_code == 200


def test_a_socket_that_took_the_place_is_left(served_path: Path, start: Start, place: Path) -> None:
    with start(served_path, "--uds", str(place), port=None) as server:
        place.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(place))
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
            assert place.exists()


def test_nothing_stays_where_the_model_cannot_be_loaded(place: Path) -> None:
    assert "absent.gguf" in fails(place.parent / "absent.gguf", "--uds", str(place))
    assert not place.exists()


def refusal(path: Path) -> str:
    """Why a server cannot listen there."""
    with (
        pytest.raises(OSError, match="cannot listen on") as caught,
        sockets.listening(serve.ServeSettings(model="x.gguf", uds=path)),
    ):
        pass
    return str(caught.value.strerror)


def test_paths_that_are_no_sockets(place: Path) -> None:
    kept = place.parent / "kept"
    kept.write_text("text")
    link, folder = place.parent / "link", place.parent / "folder"
    link.symlink_to(kept)
    folder.mkdir()
    dangling = place.parent / "dangling"
    dangling.symlink_to(place.parent / "absent")
    fifo = place.parent / "fifo"
    os.mkfifo(fifo)
    for path in (kept, link, folder, dangling, fifo):
        assert refusal(path) == f"cannot listen on {path}: something else than a socket is there"
    assert kept.read_text() == "text"
    assert "No such file or directory" in refusal(place.parent / "absent" / "s")
    assert "too long" in refusal(place.parent / ("x" * 120))
    assert "Not a directory" in refusal(kept / "s")


def test_a_socket_of_another_kind_in_use(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(place))
        assert refusal(place).startswith(f"cannot listen on {place}: ")
        assert place.exists()


def test_a_busy_server_is_in_use(place: Path) -> None:
    """Its queue of connections is full: nobody answers at once."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(place))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(str(place))
        assert "another process is listening there" in refusal(place)


@pytest.mark.parametrize("other", [("--port", "0"), ("--port", "8000"), ("--host", "0.0.0.0")])
def test_a_socket_and_an_address_contradict(served_path: Path, place: Path, other: tuple[str, str]) -> None:
    assert "give one or the other" in fails(served_path, "--uds", str(place), *other)


@pytest.mark.parametrize(("uds", "error"), [("", ArgumentError), ("a\0b", ArgumentError), (7, ArgumentTypeError)])
def test_paths_of_sockets_are_checked(uds: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="uds"):
        serve.ServeSettings(model="x.gguf", uds=uds)


def fails(model: Path, *arguments: str) -> str:
    """What a server says that does not start."""
    command = [sys.executable, "-c", "from fixmin_cpp.cli import main; main()", "serve", str(model), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    return " ".join(ran.stderr.split())


# --- below a prefix --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def below(served_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(served_path, log, "--root-path", "/a/llm/", "--api-key", "k") as server:
        yield server


@pytest.mark.parametrize("strips", [False, True])
def test_all_works_below_a_prefix(below: Server, strips: bool) -> None:
    key = {"Authorization": "Bearer k"}
    with proxy(below, "/a/llm", strips) as url:
        for path in ("/health", "/", "/docs", "/docs/", "/health/"):
            assert httpx.get(url + path).status_code == 200, path
        assert '<base href="/a/llm/">' in httpx.get(url + "/").text
        for path in ("/v1/models", "/v1/models/", "/props", "/metrics", "/openapi.json"):
            assert httpx.get(url + path).status_code == 401, path
            assert httpx.get(url + path, headers=key).status_code == 200, path
        assert httpx.get(url + "/openapi.json", headers=key).json()["servers"] == [{"url": "/a/llm"}]
        body = {"prompt": "the", "max_tokens": 4, "seed": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=key)
        assert answer.json()["usage"]["completion_tokens"] > 0
        streamed = httpx.post(f"{url}/v1/completions/", json={**body, "stream": True}, headers=key).text
        assert streamed.endswith("data: [DONE]\n\n")
        assert httpx.get(f"{url}/nowhere", headers=key).status_code == 404
        assert httpx.get(f"{url}x/health", headers=key).status_code == 404


def test_without_its_proxy_it_answers_as_well(below: Server) -> None:
    assert below.get("/health").status_code == 200
    assert below.get("/a/llm/health").status_code == 200
    assert below.get("/a/llm").status_code == 200  # the playground
    key = {"Authorization": "Bearer k"}
    assert below.get("/a/llm/a/llm/health", headers=key).status_code == 404
    assert below.get("/a/health", headers=key).status_code == 404
    url = httpx.URL(below.url)
    with socket.create_connection((url.host, url.port), timeout=60) as raw:  # as a proxy is asked
        raw.sendall(f"GET {below.url}/a/llm/health HTTP/1.1\r\nHost: {url.netloc.decode()}\r\n\r\n".encode())
        assert raw.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("wrong", ["llm", "/a b", "/a//b", "/..", "/a/./b", "//x", "/a?b", "/<b>", "/é", 7, None])
def test_prefixes_are_checked(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="root_path"):
        serve.ServeSettings(model="x.gguf", root_path=wrong)


@pytest.mark.parametrize("own", ["/v1", "/v1/x", "/docs", "/health"])
def test_a_prefix_is_no_path_of_the_servers(own: str) -> None:
    with pytest.raises(ArgumentError, match="root_path"):
        serve.create_app(serve.ServeSettings(model="x.gguf", root_path=own))


@pytest.mark.parametrize("prefix", ["", "/", "/a", "/a/", "/v1x", "/a.b/..c/d~e"])
def test_prefixes_that_are_taken(prefix: str) -> None:
    settings = serve.ServeSettings(model="x.gguf", root_path=prefix)
    assert settings.prefix == prefix.rstrip("/")
    serve.create_app(settings)
