"""Mixed requests for an hour against one process and one server: python soak_hour.py [--minutes 60] [--part process]

Every request is one of a few hundred whose answers were computed alone beforehand. In the process threads and an event
loop generate, stream and leave, cancel, run out of time, follow constraints, guess tokens, score, save and load
states, forget, and fork; the cache is so small that requests wait and are sent back. The server gets honest clients,
and between them such as send rubbish, send slowly, read slowly, or vanish. An honest answer that is another one than
alone is wrong; one that does not come is lost. Prints what was done, and the memory of each quarter, as JSON; the exit
code is 1 if an answer was wrong or lost.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "serve")]

from toy_models import concatenating, write_model  # noqa: E402

import fixmin_cpp  # noqa: E402

PROMPTS = [
    "the abc the abc the abc",
    "Paris " * 10,
    "the",
    "ab" * 30,
    "日本 é 😀",
    "Q: the?\nL:",
    "the " * 40,
    "abc " * 20,
]


def resident_kib(pid: int | str = "self") -> int:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def catalogue(n: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests whose answers depend on nothing but them."""
    rng = random.Random(seed)
    requests = []
    for _ in range(n):
        options: dict[str, Any] = {"max_new_tokens": rng.randint(1, 40), "ignore_eos": rng.random() < 0.8}
        if rng.random() < 0.6:
            options |= {"temperature": rng.choice([0.7, 1.0, 1.5]), "seed": rng.randint(0, 10_000)}
        if rng.random() < 0.3:
            options["prompt_lookup_num_tokens"] = rng.randint(1, 10)
        if rng.random() < 0.2:
            options |= {"repeat_penalty": 1.2, "presence_penalty": 0.3}
        if rng.random() < 0.15:
            options["regex"] = rng.choice(["[a-z]{2,20}", "(the|abc)( (the|abc))*", "[QPL]+"])
        if rng.random() < 0.1:
            options["dry_multiplier"] = 0.8
        requests.append((rng.choice(PROMPTS) + rng.choice(["", " the", "abc", "P"]), options))
    return requests


class Tally:
    """What was done, from any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.lost: list[str] = []

    def count(self, kind: str) -> None:
        with self.lock:
            self.done[kind] += 1

    def expect(self, kind: str, got: object, want: object) -> None:
        with self.lock:
            self.done[kind] += 1
            if got != want:
                self.wrong.append(f"{kind}: {got!r} is not {want!r}")

    def lose(self, kind: str, error: BaseException) -> None:
        with self.lock:
            self.lost.append(f"{kind}: {error!r}")

    def report(self, resident: list[int], **more: Any) -> dict[str, Any]:
        n = max(1, len(resident) // 4)
        quarters = [max(resident[i * n : (i + 1) * n] or [0]) for i in range(4)]
        counts = {"requests": sum(self.done.values()), "wrong": len(self.wrong), "lost": len(self.lost)}
        return (
            counts
            | {"by_kind": dict(sorted(self.done.items())), "resident_kib_of_quarters": quarters, **more}
            | {"examples": self.wrong[:5] + self.lost[:5]}
        )


# --- one process ------------------------------------------------------------------------------------------------------


class Process:
    """A model that everything uses at once, and what it has to answer."""

    def __init__(self, path: Path, folder: Path, tally: Tally) -> None:
        self.path, self.folder, self.tally = path, folder, tally
        self.requests = catalogue(200, 1)
        self.texts = [prompt + " end" for prompt in PROMPTS]
        with fixmin_cpp.Model(path, n_threads=1) as alone:
            self.answers = [alone.generate(prompt, **options).text for prompt, options in self.requests]
            self.scores = [alone.score(text).logprobs.tolist() for text in self.texts]
        # 16 blocks: two long requests fill them.
        self.model = fixmin_cpp.Model(path, n_threads=2, n_kv=512, n_parallel=8)
        self.end = 0.0

    def one(self, rng: random.Random, name: str) -> None:
        """Some request, in a thread."""
        i = rng.randrange(len(self.requests))
        prompt, options = self.requests[i]
        kind = rng.random()
        if kind < 0.4:
            self.tally.expect("generate", self.model.generate(prompt, **options).text, self.answers[i])
        elif kind < 0.55:
            text = ""
            with self.model.stream(prompt, **options) as stream:
                n = rng.choice([0, 1, 3, 1000])
                for piece in stream:
                    text += piece.text
                    n -= 1
                    if n <= 0:
                        break
                else:
                    n = -1000
            want = self.answers[i]
            self.tally.expect("stream", want.startswith(text) if n > -1000 else text == want, True)
        elif kind < 0.65:
            text = self.model.generate(prompt, **options, timeout=rng.random() * 0.01).text
            self.tally.expect("timeout", self.answers[i].startswith(text.rstrip("\N{REPLACEMENT CHARACTER}")), True)
        elif kind < 0.8:
            j = rng.randrange(len(self.texts))
            self.tally.expect("score", self.model.score(self.texts[j]).logprobs.tolist(), self.scores[j])
        elif kind < 0.9:
            texts = self.model.generate([prompt, self.requests[i - 1][0]], **options)
            self.tally.expect("two prompts", texts[0].text, self.answers[i])
        elif kind < 0.95:
            state = self.folder / f"state-{name}"
            self.model.save_state(state, self.texts[0])
            if rng.random() < 0.5:
                self.model.clear_prefix_cache()
            self.model.load_state(state)
            self.tally.expect("state", self.model.score(self.texts[0]).logprobs.tolist(), self.scores[0])
        else:
            self.model.clear_prefix_cache()
            self.tally.count("forget")

    def work(self, number: int) -> None:
        """A thread's."""
        rng = random.Random(number)
        while time.monotonic() < self.end:
            try:
                self.one(rng, str(number))
            except Exception as error:
                self.tally.lose("thread", error)

    async def loop(self) -> None:
        """The event loop's."""
        rng = random.Random(99)

        async def one() -> None:
            i = rng.randrange(len(self.requests))
            prompt, options = self.requests[i]
            task = asyncio.ensure_future(self.model.agenerate(prompt, **options))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.01)
                task.cancel()
            try:
                self.tally.expect("await", (await task).text, self.answers[i])
            except asyncio.CancelledError:
                self.tally.count("cancel")
            except Exception as error:
                self.tally.lose("await", error)

        while time.monotonic() < self.end:
            await asyncio.gather(*(one() for _ in range(6)))

    def fork(self, rng: random.Random) -> None:
        """A child at a random moment, which asks for one answer."""
        i = rng.randrange(len(self.requests))
        prompt, options = self.requests[i]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if self.model.generate(prompt, **options).text == self.answers[i] else 2
            finally:
                os._exit(status)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended[0] == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)
            self.tally.lose("fork", TimeoutError("a child hangs"))
        else:
            self.tally.expect("fork", os.waitstatus_to_exitcode(ended[1]), 0)

    def run(self, seconds: float) -> dict[str, Any]:
        self.end = time.monotonic() + seconds
        threads = [threading.Thread(target=self.work, args=(i,)) for i in range(4)]
        threads.append(threading.Thread(target=lambda: asyncio.run(self.loop())))
        for thread in threads:
            thread.start()
        resident, rng = [], random.Random(7)
        while time.monotonic() < self.end:
            time.sleep(min(2.0, seconds / 40))
            resident.append(resident_kib())
            if rng.random() < 0.2:
                self.fork(rng)
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                self.tally.lose("thread", TimeoutError("a thread hangs"))
        stats = self.model.stats()
        left = stats["n_blocks"] - stats["n_free_blocks"] - stats["n_cached_blocks"]
        return self.tally.report(resident, stats=stats, blocks_lost=left)


# --- one server -------------------------------------------------------------------------------------------------------


class Clients:
    """Honest ones and others."""

    def __init__(self, server: Any, path: Path, tally: Tally) -> None:
        import httpx

        self.httpx, self.server, self.tally = httpx, server, tally
        host, port = server.url.removeprefix("http://").split(":")
        self.address = (host, int(port))
        self.bodies: list[dict[str, Any]] = []
        self.answers: list[str] = []
        with fixmin_cpp.Model(path, n_threads=1) as alone:
            for prompt, options in catalogue(120, 2):
                # What both take as it is given: defaults differ, and OpenAI's penalties count otherwise.
                options.pop("presence_penalty", None)
                options = {"temperature": 0.0, "top_k": 40, "top_p": 0.9, "min_p": 0.0, **options}
                body = {("max_tokens" if key == "max_new_tokens" else key): value for key, value in options.items()}
                self.bodies.append({"prompt": prompt, **body})
                self.answers.append(alone.generate(prompt, **options).text)
        self.end = 0.0

    def honest(self, rng: random.Random, client: Any) -> None:
        i = rng.randrange(len(self.bodies))
        body = dict(self.bodies[i])
        for _ in range(50):  # a full queue says when to come again
            if stream := rng.random() < 0.5:
                body["stream"] = True
            answer = client.post("/v1/completions", json=body)
            if answer.status_code not in (429, 503):
                break
            self.tally.count("told to wait")
            time.sleep(0.1)
        if answer.status_code != 200:
            return self.tally.lose("honest", RuntimeError(answer.text[:300]))
        if stream:
            data = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            text = "".join(choice["text"] for one in data[:-1] for choice in json.loads(one)["choices"])
            self.tally.expect("honest, streamed", (text, data[-1]), (self.answers[i], "[DONE]"))
        else:
            self.tally.expect("honest", answer.json()["choices"][0]["text"], self.answers[i])

    def honest_client(self, number: int) -> None:
        rng = random.Random(1000 + number)
        with self.httpx.Client(base_url=self.server.url, timeout=120) as client:
            while time.monotonic() < self.end:
                try:
                    self.honest(rng, client)
                except Exception as error:
                    self.tally.lose("honest", error)

    def other(self, rng: random.Random) -> str:
        """One connection of a client that does not behave."""
        body = json.dumps(rng.choice(self.bodies) | {"stream": rng.random() < 0.7, "max_tokens": 60}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        request = head + str(len(body)).encode() + b"\r\n\r\n" + body
        with socket.create_connection(self.address, timeout=10) as raw, contextlib.suppress(OSError):
            kind = rng.choice(["rubbish", "changed", "cut", "slow", "vanishes", "reads slowly", "silent"])
            if kind == "rubbish":
                raw.sendall(rng.randbytes(rng.randint(1, 4000)))
                raw.recv(1000)
            elif kind == "changed":
                changed = bytearray(request)
                for _ in range(rng.randint(1, 9)):
                    changed[rng.randrange(len(changed))] = rng.randrange(256)
                raw.sendall(changed)
                raw.settimeout(1)
                raw.recv(1000)
            elif kind == "cut":
                raw.sendall(request[: rng.randrange(len(request))])
            elif kind == "slow":
                for byte in request[: rng.randint(1, 30)]:
                    raw.sendall(bytes([byte]))
                    time.sleep(0.02)
            elif kind == "vanishes":
                raw.sendall(request)
                time.sleep(rng.random() * 0.05)
                if rng.random() < 0.5:  # with a reset
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            elif kind == "reads slowly":
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                raw.sendall(request)
                for _ in range(10):
                    raw.recv(16)
                    time.sleep(0.02)
            else:
                time.sleep(rng.random())
        return kind

    def other_client(self, number: int) -> None:
        rng = random.Random(2000 + number)
        while time.monotonic() < self.end:
            try:
                self.tally.count(self.other(rng))
            except OSError as error:  # a server that takes no connection any more
                self.tally.lose("connection", error)
                time.sleep(0.5)

    def run(self, seconds: float) -> dict[str, Any]:
        self.end = time.monotonic() + seconds
        threads = [threading.Thread(target=self.honest_client, args=(i,)) for i in range(4)]
        threads += [threading.Thread(target=self.other_client, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        resident = []
        while time.monotonic() < self.end:
            time.sleep(min(2.0, seconds / 40))
            resident.append(resident_kib(self.server.process.pid))
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                self.tally.lose("client", TimeoutError("a client hangs"))
        idle = self.server.idle(60)
        return self.tally.report(resident, idle_at_the_end=idle, alive=self.server.process.poll() is None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--part", choices=["process", "server", "both"], default="both")
    arguments = parser.parse_args()
    seconds = 60 * arguments.minutes
    reports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fixmin-soak-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        path = write_model(folder / "toy.gguf", concatenating(), context_length=256)
        waiting = None
        if arguments.part != "process":
            from servers import serving

            server = stack.enter_context(serving(path, folder / "log", "--read-timeout", "2", "--write-timeout", "2"))
            clients = Clients(server, path, Tally())
            waiting = threading.Thread(target=lambda: reports.update(server=clients.run(seconds)))
            # Not beside the other part's threads in one interpreter: there a fork would copy the clients' locks.
            if arguments.part == "both":
                child = os.fork()
                if child == 0:
                    status = 1
                    try:
                        report = Process(path, folder, Tally()).run(seconds)
                        (folder / "process.json").write_text(json.dumps(report))
                        status = 0
                    finally:
                        os._exit(status)
            waiting.start()
            waiting.join()
            if arguments.part == "both":
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                reports["process"] = (
                    json.loads((folder / "process.json").read_text()) if status == 0 else {"lost": status}
                )
        else:
            reports["process"] = Process(path, folder, Tally()).run(seconds)
    print(json.dumps(reports, indent=1))
    return 1 if any(report.get("wrong") or report.get("lost") for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
