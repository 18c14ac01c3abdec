"""What single requests of the allowed size cost a server: how long /health waits, and memory.

    python bench/hostile.py MODEL [--only TEXT] [--json FILE]

Starts `fixmin serve MODEL` with all defaults and sends, one after the other, some 650 bodies of up to 4 MiB: large or
wrong values for every field of every endpoint, schemas and grammars that are dear to compile, many generations at once.
Meanwhile another connection asks for /health fifty times a second. A body is over the limits if /health took more than
100 ms or resident memory rose by more than 64 MB (1 MB = 2**20 bytes) in the worst moment. Before the first body
one request fills the KV cache, which is memory that the server was given.

One line for each body that is over, and the number of them; the exit code is 1 if there are any. Nothing else should
run on the machine: where the server gets no CPU, /health waits too.
"""

import argparse
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEALTH_LIMIT = 0.100  # seconds
MEMORY_LIMIT = 64.0  # MB
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
Body = tuple[str, str, bytes]  # name, path, what is sent


def bodies() -> Iterator[Body]:
    """All bodies, each below 4 MiB."""
    for name, path, value in (*_large(), *_dear(), *_many()):
        yield name, path, json.dumps(value).encode()
    for name, body in _malformed():
        yield name, COMPLETIONS, body
    yield from _fields()


def _large() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Long texts and long lists."""
    for n in (1 << 20, 1 << 18, 1 << 16):
        text = "ab " * (n // 3)
        yield f"tokenize {n} letters", "/tokenize", {"content": text}
        yield f"tokenize {n} letters with pieces", "/tokenize", {"content": text, "with_pieces": True}
        yield f"tokenize a word of {n} letters", "/tokenize", {"content": "q" * n}
        yield f"codes of {n} letters", "/codes", {"text": text}
    yield "tokenize emoji", "/tokenize", {"content": "\U0001f600" * (1 << 18)}
    yield "detokenize 199,990 ids", "/detokenize", {"tokens": [7] * 199_990}
    yield "codes of 199,990 ids", "/codes", {"tokens": [7] * 199_990}
    yield "codes of 16,000 ids", "/codes", {"tokens": [7] * 16_000}
    yield "2,048 texts", "/v1/embeddings", {"input": ["the"] * 2048}
    yield "2,048 lists of ids", "/v1/embeddings", {"input": [[7] * 50] * 2048}
    yield "2,048 texts, base64", "/v1/embeddings", {"input": ["the"] * 2048, "encoding_format": "base64"}
    yield "4 long texts to embed", "/v1/embeddings", {"input": ["ab " * 340_000] * 4}
    yield "4 long prompts", COMPLETIONS, {"prompt": ["ab " * 340_000] * 4, "max_tokens": 1}
    yield "32 prompts of 63,000 letters", COMPLETIONS, {"prompt": ["ab " * 21_000] * 32, "max_tokens": 1}
    message = {"role": "user", "content": "a"}
    yield "2,048 messages", CHAT, {"messages": [message] * 2048, "max_tokens": 1}
    yield "2,048 long messages", CHAT, {"messages": [{**message, "content": "a" * 1900}] * 2048}
    yield "2,048 wrong messages", CHAT, {"messages": [{"role": 1, "content": 5, "x": [[]]}] * 2048}
    yield "95,000 parts", CHAT, {"messages": [{**message, "content": [{"type": "text", "text": "a"}] * 95_000}]}
    yield "60,000 wrong parts", CHAT, {"messages": [{**message, "content": [{"type": "text", "text": 1}] * 60_000}]}
    yield "a message of 4 MB", CHAT, {"messages": [{**message, "content": "ab " * 1_300_000}]}
    yield "190,000 names in a message", CHAT, {"messages": [{**message, **{f"k{i}": i for i in range(190_000)}}]}
    yield "190 unknown long names", COMPLETIONS, {"prompt": "a", **{"f" * 20_000 + str(i): 1 for i in range(190)}}
    yield "a name of 4 MB", COMPLETIONS, {"prompt": "a", "f" * 4_000_000: 1}
    yield (
        "metadata",
        COMPLETIONS,
        {"prompt": "a", "metadata": {f"k{i}": "v" for i in range(1000)}, "user": [[0]] * 1000},
    )


def _dear() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Lists that every step goes through, and what is compiled."""
    breakers = ["z" * 250 + str(i) for i in range(64)]
    options: dict[str, dict[str, Any]] = {
        "8,192 biases": {"logit_bias": {str(i): 1 for i in range(8192)}},
        "8,192 wrong biases": {"logit_bias": {f"x{i}": "1" for i in range(8192)}},
        "65,536 allowed ids": {"allowed_ids": [5] * 65_536, "max_tokens": 2},
        "65,536 banned ids": {"banned_ids": [5] * 65_536, "bad_ids": [5] * 65_536, "stop_ids": [5] * 1024},
        "128 stop strings": {"stop": [f"{'z' * 1000}{i}" for i in range(128)], "max_tokens": 200},
        "64 breakers": {"dry_multiplier": 1, "dry_sequence_breakers": breakers},
        "breakers as JSON": {
            "dry_multiplier": 1,
            "dry_sequence_breakers": json.dumps([f"b{i}" for i in range(20_000)]),
        },
        "deep breakers": {"dry_multiplier": 1, "dry_sequence_breakers": "[" * 1000 + "]" * 1000},
        "long breakers": {"dry_multiplier": 1, "dry_sequence_breakers": [[7] * 3000] * 64},
        "1,024 choices": {"choices": ["ab" * 1900 + str(i) for i in range(1024)]},
        "regex of 262,144 letters": {"regex": "(ab|cd)?" * 32_768},
        "regex that counts": {"regex": "((a{1,1000}b){1,1000}c){1,1000}"},
        "nested regex": {"regex": "(" * 50_000 + "a" + ")*" * 50_000},
        "grammar of many forms": {"grammar": "start: " + " | ".join(f'"a{i}"' for i in range(20_000))},
        "grammar of many rules": {
            "grammar": "\n".join(["start: r0", *(f'r{i}: "a" r{i + 1} | "b"' for i in range(9000)), 'r9000: "c"'])
        },
        "schema of many values": {"json_schema": {"enum": [f"v{i}" for i in range(7900)]}},
        "schema of long values": {"json_schema": {"enum": ["v" * 300 + str(i) for i in range(7900)]}},
        "schema of one long value": {"json_schema": {"const": "v" * 4_000_000}},
        "schema as text": {"json_schema": json.dumps({"enum": [f"v{i}" for i in range(20_000)]})},
        "schema of many properties": {
            "json_schema": {"properties": {f"p{i}": {"type": "string"} for i in range(3950)}}
        },
        "schema of long arrays": {"json_schema": {"type": "array", "items": {"minLength": 10**6}, "minItems": 10**6}},
        "schema of many patterns": {
            "json_schema": {"type": "string", "allOf": [{"pattern": f".*{i}.*"} for i in range(25)]}
        },
        "schema with a long pattern": {"json_schema": {"type": "string", "pattern": "(ab|cd)?" * 400_000}},
        "deep schema": {"json_schema": json.loads('{"anyOf":[' * 45 + '{"type":"null"}' + "]}" * 45)},
    }
    for name, option in options.items():
        yield name, COMPLETIONS, {"prompt": "a", "max_tokens": 4, **option}


def _many() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Many generations at once."""
    whole: dict[str, Any] = {"prompt": "a", "n": 128, "max_tokens": 200, "ignore_eos": True}
    yield "128 generations with logprobs", COMPLETIONS, {**whole, "logprobs": 20}
    yield "the same, streamed", COMPLETIONS, {**whole, "logprobs": 20, "stream": True}
    stops = [f"{'z' * 1000}{i}" for i in range(128)]
    yield "128 with stop strings, streamed", COMPLETIONS, {**whole, "stream": True, "stop": stops}
    yield "128 with 4,096 biases", COMPLETIONS, {**whole, "logit_bias": {str(i): 0.5 for i in range(4096)}}
    yield "128 with 8,192 allowed ids", COMPLETIONS, {**whole, "allowed_ids": [*range(5, 4000)] * 2}
    yield "576 prompts", COMPLETIONS, {"prompt": ["the cat"] * 576, "max_tokens": 8}
    yield (
        "511 prompts, echoed",
        COMPLETIONS,
        {
            "prompt": ["the cat " * 20] * 511,
            "max_tokens": 1,
            "echo": True,
            "logprobs": 20,
        },
    )
    yield "2,048 empty prompts", COMPLETIONS, {"prompt": [""] * 2048}


def _malformed() -> Iterator[tuple[str, bytes]]:
    """JSON that is dear to read, or none."""
    yield "brackets in a text", b'{"prompt":"' + b"[,{" * 1_300_000 + b'"}'
    yield "escapes", b'{"prompt":"' + b'\\"' * 2_000_000 + b'"}'
    yield "text without end", b'{"prompt":"' + b"[" * 2000 + b'\\"' * 2_000_000
    yield "1,300,001 empty texts", b'{"prompt":[' + b'"",' * 1_300_000 + b'""]}'
    yield "brackets without end", b"[" * 300_000 + b'"\\' * 1_800_000
    yield "long integers", b'{"prompt":[' + b",".join([b"9" * 4000] * 1000) + b"]}"
    yield "long exponent", b'{"temperature":1e' + b"9" * 4_000_000 + b"}"
    yield "long fraction", b'{"prompt":"a","temperature":1.' + b"9" * 4_000_000 + b"}"
    yield "199,001 ids", b'{"max_tokens":1,"prompt":[' + b"1," * 199_000 + b"1]}"
    yield "a number among ids", b'{"max_tokens":1,"prompt":[' + b"1," * 1000 + b"1.5]}"
    yield "99,001 lists", b'{"max_tokens":1,"prompt":[' + b"[1]," * 99_000 + b"[1]]}"
    yield "60,000 wrong lists", b'{"max_tokens":1,"prompt":[' + b"[{}]," * 60_000 + b"[1]]}"
    yield "deep lists", b'{"user":[' + b"[" * 98 + b"]" * 98 + b"]}"


def _fields() -> Iterator[Body]:
    """A long list, a long object, a long text and a longer list in place of each field."""
    from fixmin_cpp.serve import schemas

    needed: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": "a"},
        CHAT: {"messages": [{"role": "user", "content": "a"}]},
        "/v1/embeddings": {"input": "a"},
    }
    parts = (b"1.5,", b"{},", b"[],", b"[1],", b'"",', b'"zz",', b'{"a":1},')
    for path, model in schemas.BODIES.items():
        for i, name in enumerate(model.model_fields):
            given = {key: value for key, value in needed.get(path, {}).items() if key != name}
            others = json.dumps(given)[:-1].encode()
            head = others + (b"," if len(others) > 1 else b"") + json.dumps(name).encode() + b":"
            part = parts[i % len(parts)]
            values = {
                "list": b"[" + part * 66_000 + part[:-1] + b"]",
                "object": b"{" + b",".join(b'"%d":1' % k for k in range(199_000)) + b"}",
                "text": b'"' + b"ab " * 1_390_000 + b'"',
                "4 MB list": b"[" + part * (4_000_000 // len(part)) + part[:-1] + b"]",
            }
            for kind, value in values.items():
                yield f"{path} {name}: {kind}", path, head + value + b"}"


# --- the server ------------------------------------------------------------------------------------------------------


class Watched:
    """A server, its memory, and how long its /health takes."""

    def __init__(self, model: Path) -> None:
        code = "from fixmin_cpp.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", str(model), "--port", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        self._ended = threading.Event()
        self._worst = 0.0
        for line in self._process.stderr:
            if found := re.search(r"listening on http://[^:]+:(\d+)", line):
                self._port = int(found[1])
                break
        else:
            raise RuntimeError("the server did not start")
        threading.Thread(target=self._process.stderr.read, daemon=True).start()  # it would wait for a full pipe
        while self._get("/health") != 200:
            time.sleep(0.1)
        self._watch = threading.Thread(target=self._poll)
        self._watch.start()

    def close(self) -> None:
        self._ended.set()
        self._watch.join()
        self._process.terminate()
        self._process.wait()

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)

    def _get(self, path: str) -> int:
        connection = self._connect()
        connection.request("GET", path)
        return connection.getresponse().status

    def _poll(self) -> None:
        connection = self._connect()
        while not self._ended.wait(0.02):
            begin = time.perf_counter()
            connection.request("GET", "/health")
            connection.getresponse().read()
            self._worst = max(self._worst, time.perf_counter() - begin)

    def _memory(self, name: str) -> float:
        """MB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def post(self, path: str, body: bytes) -> tuple[int, float, float]:
        """Status (0: the connection broke), seconds that /health took at most, MB more at most."""
        time.sleep(0.1)
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")  # forgets the highest memory
        before, self._worst = self._memory("VmRSS"), 0.0
        connection = self._connect()
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            status = answer.status
        except (http.client.HTTPException, OSError):
            status = 0
        time.sleep(0.05)
        return status, self._worst, self._memory("VmHWM") - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", default="", help="bodies whose name has this in it")
    parser.add_argument("--json", type=Path, help="all figures")
    arguments = parser.parse_args()
    server = Watched(arguments.model)
    found = []
    try:
        whole = {"prompt": "a", "n": 128, "max_tokens": 200, "ignore_eos": True}
        server.post(COMPLETIONS, json.dumps(whole).encode())
        for name, path, body in bodies():
            if arguments.only not in name:
                continue
            status, seconds, memory = server.post(path, body)
            over = seconds > HEALTH_LIMIT or memory > MEMORY_LIMIT or status not in (200, 400, 413)
            found.append({"name": name, "status": status, "health_s": seconds, "memory_mb": memory, "over": over})
            if over or arguments.only:
                print(f"{name}: status {status}, /health {1e3 * seconds:.0f} ms, +{memory:.0f} MB", flush=True)
    finally:
        server.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    n_over = sum(one["over"] for one in found)
    print(
        f"over the limits: {n_over} of {len(found)}; at most {1e3 * max(one['health_s'] for one in found):.0f} ms and "
        f"{max(one['memory_mb'] for one in found):.0f} MB"
    )
    return int(n_over > 0)


if __name__ == "__main__":
    sys.exit(main())
