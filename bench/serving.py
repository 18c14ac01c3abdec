"""`fixmin serve` under load, beside the engine in a process of its own and beside llama_cpp.server.

    python bench/serving.py [--data out/bench] [--seconds 180] [--parts load,crowd,vanish,peer] \
        [--json FILE] [--markdown FILE]

Needs what `make bench-peers` made. Each user asks, reads the whole stream and asks again: prompts of 16 to 64 letters,
a token each, 16 to 128 new tokens, greedy; the same sequence of requests for every server. Everything runs on this
machine, the users too.

load:   64 users for --seconds: requests, errors, generated tokens per second, seconds to the first token and between
        tokens, resident memory of the server in the first and the last quarter. Then the same through Model.astream()
        in a process without HTTP.
crowd:  200 users for a third of the time, with room for 100 generations: the others get 429 and try again.
vanish: how long a connection that is closed in the middle of its stream keeps its place, 20 times, 8 others running.
peer:   8 users for a third of the time, fixmin serve and llama_cpp.server by turns, Q8_0 of the same weights.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer, decoders, models

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PORT = 18500
WARM_UP = 45  # seconds, until the KV cache is full of known prompts and memory no longer grows for that


# --- files with tokenizers -------------------------------------------------------------------------------------------


def with_tokenizer(source: Path, out: Path, add: Callable[[gguf.GGUFWriter, int], None]) -> Path:
    """`source` with a tokenizer: the speed checkpoint has none, and servers take text."""
    if out.exists():
        return out
    reader = gguf.GGUFReader(source)
    facts = {name: f for name, f in reader.fields.items() if not name.startswith(("GGUF.", "tokenizer."))}
    writer = gguf.GGUFWriter(out.with_suffix(".part"), facts.pop("general.architecture").contents())
    vocab_size = 0
    for name, fact in facts.items():
        kind, *of = fact.types
        writer.add_key_value(name, fact.contents(), kind, sub_type=of[-1] if of else None)
        if name.endswith(".vocab_size"):
            vocab_size = int(fact.contents())
    add(writer, vocab_size)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out.with_suffix(".part").rename(out)
    return out


def add_json(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Letters, then words that only the model can write; id 0 ends a text."""
    vocab = {token: i for i, token in enumerate(_texts(vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.Sequence([])
    writer.add_tokenizer_model("none")
    writer.add_string("tokenizer.huggingface.json", tokenizer.to_str())


def add_sentencepiece(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """The same for llama.cpp."""
    texts = _texts(vocab_size)
    kinds = [gguf.TokenType.NORMAL] * vocab_size
    texts[-259:] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds[-259:] = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(vocab_size - 259)
    writer.add_bos_token_id(vocab_size - 258)
    writer.add_eos_token_id(vocab_size - 257)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def _texts(vocab_size: int) -> list[str]:
    return [*LETTERS, *(f" w{i}" for i in range(len(LETTERS), vocab_size))]


# --- users -----------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What users saw. Times in seconds."""

    n_requests: int = 0
    n_tokens: int = 0
    n_refused: int = 0  # 429, asked again
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rss: list[float] = field(default_factory=list)  # of the server, bytes, once a second


Ask = Callable[[str, int], AsyncIterator[None]]


class Refused(Exception):
    """429."""


def ask_http(port: int, extra: dict[str, Any]) -> Ask:
    """A streamed completion; yields with every token."""

    async def ask(prompt: str, n: int) -> AsyncIterator[None]:
        body = {"model": "m", "prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True, **extra}
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            status = int((await reader.readline()).split()[1])
            if status == 429:
                raise Refused
            if status != 200:
                raise RuntimeError(f"status {status}: {await reader.read(500)!r}")
            ended = False
            while line := await reader.readline():
                if line.startswith(b"data: [DONE]"):
                    ended = True
                elif line.startswith(b'data: {"error"'):
                    raise RuntimeError(line.decode())
                elif line.startswith(b"data: ") and b'"finish_reason":"' not in line.replace(b": ", b":"):
                    yield
            if not ended:
                raise RuntimeError("the stream broke off")
        finally:
            writer.close()

    return ask


async def crowd(ask: Ask, n_users: int, seconds: float, watch: Callable[[], float] | None = None) -> Seen:
    """Lets the users ask for so long; the last requests are read to their ends, outside the measured time."""
    seen = Seen()
    begin = time.perf_counter()

    async def user(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() - begin < seconds:
            prompt, n = "".join(rng.choices(LETTERS, k=rng.randint(16, 64))), rng.randint(16, 128)
            try:
                await _one(ask, prompt, n, seen, begin + seconds)
            except Refused:
                seen.n_refused += 1
                await asyncio.sleep(rng.uniform(0.5, 1.5))
            except Exception as error:
                seen.errors.append(repr(error))

    async def watching() -> None:
        while watch is not None:
            seen.rss.append(watch())
            await asyncio.sleep(1.0)

    watcher = asyncio.create_task(watching())
    await asyncio.gather(*(user(i) for i in range(n_users)))
    watcher.cancel()
    seen.seconds = seconds
    return seen


async def _one(ask: Ask, prompt: str, n: int, seen: Seen, end: float) -> None:
    last = time.perf_counter()
    n_own = 0
    async with contextlib.aclosing(ask(prompt, n)) as tokens:
        async for _ in tokens:
            now = time.perf_counter()
            (seen.between if n_own else seen.first).append(now - last)
            last = now
            n_own += 1
            seen.n_tokens += now < end
    if n_own < n - 1:  # a token may come with its neighbour's event
        raise RuntimeError(f"{n_own} tokens of {n}")
    seen.n_requests += 1


# --- servers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(command: list[str], ready: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers at `ready`."""
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}{ready}", timeout=2)
                break
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def fixmin(model: Path, *options: str) -> list[str]:
    """The command of this project's server."""
    command = [sys.executable, "-c", "from fixmin_cpp.cli import main; main()", "serve", str(model)]
    return [*command, "--port", str(PORT), "--threads", "2", "-q", *options]


def rss(pid: int) -> float:
    """Resident bytes."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return float(found[1]) * 1024 if found else 0.0


def load(model: Path, log: Path, seconds: float) -> list[dict[str, Any]]:
    """64 users of the server, then of the engine."""
    with serving(fixmin(model), "/health", log) as process:
        asyncio.run(crowd(ask_http(PORT, {"ignore_eos": True}), 64, WARM_UP))
        seen = asyncio.run(crowd(ask_http(PORT, {"ignore_eos": True}), 64, seconds, lambda: rss(process.pid)))
    within = subprocess.run(
        [sys.executable, __file__, "--within", str(model), "--seconds", str(seconds)], capture_output=True, check=True
    )
    return [_record("fixmin serve, 64 users", seen), json.loads(within.stdout)]


def within(model: Path, seconds: float) -> dict[str, Any]:
    """The users of `load` in the process of the engine."""
    from fixmin_cpp import Model

    async def users(loaded: Model) -> Seen:
        async def ask(prompt: str, n: int) -> AsyncIterator[None]:
            async with loaded.astream(prompt, max_new_tokens=n, ignore_eos=True) as pieces:
                async for _ in pieces:
                    yield

        await crowd(ask, 64, WARM_UP)
        return await crowd(ask, 64, seconds, lambda: rss(os.getpid()))

    with Model(model, n_threads=2, n_parallel=64) as loaded:
        return _record("Model.astream(), 64 users", asyncio.run(users(loaded)))


def many(model: Path, log: Path, seconds: float) -> list[dict[str, Any]]:
    """200 users where 100 find room."""
    with serving(fixmin(model, "--max-queue", "36"), "/health", log):
        seen = asyncio.run(crowd(ask_http(PORT, {"ignore_eos": True}), 200, seconds))
    return [_record("fixmin serve, 200 users, room for 100", seen)]


def vanish(model: Path, log: Path) -> dict[str, Any]:
    """Seconds from the end of a connection until its generation has left the engine."""

    def running() -> int:
        text = urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics").read().decode()
        return int(float(re.search(r"^llamacpp:requests_processing(?:{.*})? (\S+)$", text, re.M)[1]))  # type: ignore[index]

    async def measure() -> tuple[list[float], list[float]]:
        ask = ask_http(PORT, {"ignore_eos": True})
        gaps: list[float] = []

        async def other() -> None:
            last = time.perf_counter()
            async for _ in ask("a" * 32, 900):
                gaps.append(time.perf_counter() - last)
                last = time.perf_counter()

        others = [asyncio.create_task(other()) for _ in range(8)]
        await asyncio.sleep(3)
        delays = []
        for _ in range(20):
            tokens = ask("b" * 32, 500)
            for _ in range(5):
                await anext(tokens)
            before = await asyncio.to_thread(running)
            begin = time.perf_counter()
            await tokens.aclose()
            while await asyncio.to_thread(running) >= before:
                pass
            delays.append(time.perf_counter() - begin)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return delays, gaps

    with serving(fixmin(model), "/health", log):
        delays, gaps = asyncio.run(measure())
    return {
        "delay_s": statistics.median(delays),
        "longest_s": max(delays),
        "step_s": statistics.median(gaps),
        "longest_step_s": max(gaps[8:]),
    }


def peer(data: Path, own: Path, log: Path, seconds: float) -> list[dict[str, Any]]:
    """8 users by turns."""
    other = with_tokenizer(data / "neox" / "q8_0.gguf", data / "serve-llama.gguf", add_sentencepiece)
    python = data / "peers" / "llama" / "bin" / "python"
    # By default a new request ends the one that is running.
    settings = {"n_ctx": 1024, "n_threads": 2, "n_threads_batch": 2, "port": PORT, "interrupt_requests": "false"}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    servers: dict[str, tuple[list[str], str, dict[str, Any]]] = {
        "fixmin serve": (fixmin(own), "/health", {"ignore_eos": True}),
        "llama_cpp.server": (
            [str(python), "-m", "llama_cpp.server", "--model", str(other), *options],
            "/v1/models",
            {},
        ),
    }
    records = []
    for users in (1, 8):
        for name, (command, ready, extra) in servers.items():
            with serving(command, ready, log):
                asyncio.run(crowd(ask_http(PORT, extra), 1, 3))
                seen = asyncio.run(crowd(ask_http(PORT, extra), users, seconds))
            records.append(_record(f"{name}, {users} user{'s' * (users > 1)}", seen))
    return records


def _record(name: str, seen: Seen) -> dict[str, Any]:
    def of(values: list[float], share: float) -> float | None:
        return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None

    quarter = max(1, len(seen.rss) // 4)
    record = {
        "name": name,
        "requests": seen.n_requests,
        "errors": len(seen.errors),
        "first_error": seen.errors[0] if seen.errors else None,
        "refused": seen.n_refused,
        "tok_s": seen.n_tokens / seen.seconds,
        "first_p50_s": of(seen.first, 0.5),
        "first_p95_s": of(seen.first, 0.95),
        "between_p50_s": of(seen.between, 0.5),
        "between_p95_s": of(seen.between, 0.95),
    }
    if seen.rss:
        record["rss_first_quarter"] = statistics.mean(seen.rss[:quarter])
        record["rss_last_quarter"] = statistics.mean(seen.rss[-quarter:])
    return record


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = ["# Serving under load", "", "Made by `bench/serving.py`, which says what is measured. Full-size Q8_0.", ""]
    head = ["", "requests", "errors", "429", "tok/s", "first token p50", "p95", "between tokens p50", "p95", "RSS"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for record in result.get("load", []) + result.get("crowd", []) + result.get("peer", []):
        times = [record[f"{what}_{share}_s"] for what in ("first", "between") for share in ("p50", "p95")]
        shown = ["" if value is None else f"{value * 1e3:,.0f} ms" for value in times]
        memory = ""
        if "rss_first_quarter" in record:
            memory = f"{record['rss_first_quarter'] / 1e6:,.0f} → {record['rss_last_quarter'] / 1e6:,.0f} MB"
        facts = [*(str(record[name]) for name in ("name", "requests", "errors", "refused")), f"{record['tok_s']:.0f}"]
        lines.append(f"| {' | '.join([*facts, *shown, memory])} |")
    if found := result.get("vanish"):
        lines += [
            "",
            f"A client that vanishes: its place is free after {found['delay_s'] * 1e3:.0f} ms (median of 20; longest "
            f"{found['longest_s'] * 1e3:.0f}), a step of the others taking {found['step_s'] * 1e3:.0f} ms (longest "
            f"{found['longest_step_s'] * 1e3:.0f}); that includes asking /metrics.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("out/bench"))
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--parts", default="load,crowd,vanish,peer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.within:
        print(json.dumps(within(arguments.within, arguments.seconds)))
        return
    model = with_tokenizer(arguments.data / "full-q8_0.gguf", arguments.data / "serve-fixmin.gguf", add_json)
    log = arguments.data / "serving.log"
    parts: dict[str, Callable[[], Any]] = {
        "load": lambda: load(model, log, arguments.seconds),
        "crowd": lambda: many(model, log, arguments.seconds / 3),
        "vanish": lambda: vanish(model, log),
        "peer": lambda: peer(arguments.data, model, log, arguments.seconds / 3),
    }
    result = {}
    for name in arguments.parts.split(","):
        result[name] = parts[name]()
        print(json.dumps(result[name]), flush=True)
    print(markdown(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
