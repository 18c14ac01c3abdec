"""Large requests beside small ones, and slow constraints beside plain requests: who waits for whom."""

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers import Server, Start, httpx, until

fairness = pytest.importorskip("fixmin_cpp.serve.fairness")


def order_of(n_parallel: int, requests: dict[str, int]) -> list[str]:
    """Whose generations begin, where each ends when nothing else can begin."""
    begun: list[str] = []

    async def generation(turns: Any, name: str, n: int) -> None:
        async with turns.turn(name, n):
            begun.append(name)
            await asyncio.sleep(0.001)

    async def all_of_them() -> None:
        turns = fairness.Turns(n_parallel)
        await asyncio.gather(*(generation(turns, name, n) for name, n in requests.items() for _ in range(n)))
        assert turns.n_waiting == 0

    asyncio.run(all_of_them())
    return begun


def test_large_requests_take_turns() -> None:
    begun = order_of(8, {"a": 60, "b": 20, "c": 1})
    assert sorted(begun[:7]) == ["a"] * 4 + ["b"] * 2 + ["c"]  # at most half, three quarters of both; c did not wait
    assert begun.count("a") == 60
    assert begun.count("b") == 20
    last_b = len(begun) - begun[::-1].index("b")
    assert begun[:last_b].count("a") < 40  # b was not behind all of a


@pytest.mark.parametrize("n_parallel", [1, 2, 3, 64])
def test_every_generation_has_its_turn(n_parallel: int) -> None:
    assert sorted(order_of(n_parallel, {"a": 5, "b": 1, "c": 100})) == ["a"] * 5 + ["b"] + ["c"] * 100


def test_what_is_cancelled_takes_no_place() -> None:
    async def run() -> None:
        turns = fairness.Turns(6)  # three for one large request

        async def hold() -> None:
            async with turns.turn("a", 9):
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(hold()) for _ in range(9)]
        await asyncio.sleep(0)
        assert turns.n_waiting == 6
        tasks[8].cancel()  # waits
        tasks[0].cancel()  # runs
        await asyncio.sleep(0.01)
        assert turns.n_waiting == 4
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert turns.n_waiting == 0

        async def other() -> None:
            async with turns.turn("b", 9):
                pass

        await asyncio.wait_for(other(), 5)

    asyncio.run(run())


@contextlib.contextmanager
def large_request(server: Server) -> Iterator[None]:
    """Has begun and will not end."""
    body = {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True, "stream": True, "n": 64}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        stop = threading.Event()

        def read() -> None:
            with contextlib.suppress(httpx.HTTPError):
                for _ in lines:
                    if stop.is_set():
                        return

        reading = threading.Thread(target=read)
        reading.start()
        try:
            yield
        finally:
            stop.set()
            reading.join(60)


def test_a_small_request_does_not_wait_for_a_large_one(long_path: Path, start: Start) -> None:
    with start(long_path, "--parallel", "8") as server:
        with large_request(server), large_request(server):
            answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 3, "ignore_eos": True})
            assert answer.json()["usage"]["completion_tokens"] == 3
            assert server.metric("fixmin:sequences_admitted") == 128  # none of the others had ended
            assert server.metric("llamacpp:requests_processing") <= 6
            assert server.metric("llamacpp:requests_deferred") >= 122
        assert server.idle(60)


def test_waiting_for_a_turn_counts_as_time(long_path: Path, start: Start) -> None:
    with start(long_path, "--parallel", "2", "--timeout", "2") as server:
        body = {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True, "n": 16}
        begin = time.monotonic()
        choices = server.post("/v1/completions", body).json()["choices"]
        assert {choice["finish_reason"] for choice in choices} == {"timeout"}
        assert time.monotonic() - begin < 16  # not 2 s for each


# Takes minutes to compile, and is given up after 10 s.
SLOW = [
    "start: A\nA: " + " & ".join(f"/[a-z]*[a-z]{{1,{i}}}{letter}.*/" for i in range(1, 200)) for letter in "klmnopqrst"
]
QUICK: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"content": "the"}),
    ("/v1/completions", {"prompt": "the", "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}], "max_tokens": 2}),
    ("/v1/embeddings", {"input": "the"}),
]


@pytest.mark.slow
def test_slow_constraints_hold_up_nobody_else(served_path: Path, start: Start) -> None:
    """More of them than there are threads for any work."""
    with start(served_path) as server, ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(server.post, "/v1/completions", {"prompt": "a", "grammar": one}) for one in SLOW]
        until(lambda: server.metric("fixmin:connections_open") >= 11)  # and this one
        begin = time.monotonic()
        for path, body in QUICK:
            assert server.post(path, body).status_code == 200, path
        assert server.get("/health").status_code == 200
        assert time.monotonic() - begin < 10  # that a busy machine does not fail
        assert not all(one.done() for one in asked)
        answers = [one.result(120) for one in asked]
        assert {answer.status_code for answer in answers} <= {400, 503}  # too complex, or too many at a time
        assert any("too complex" in answer.json()["error"]["message"] for answer in answers)
        for path, body in QUICK:
            assert server.post(path, body).status_code == 200, path
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
