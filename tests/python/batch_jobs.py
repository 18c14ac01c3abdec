"""What the tests of batch jobs share: inputs, and outputs without what differs from run to run."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from fixmin_cpp.batch import run_batch

# One thread, which the small models of tests are fastest with where other processes want the cores too.
run_job = partial(run_batch, n_threads=1)

PROMPTS = ["the cat", "a", "日本 é 😀", "Question: Who?\nAnswer:", "ab", "Paris the the"]


def write_lines(path: Path, lines: list[Any]) -> Path:
    """Objects as JSON, bytes as they are."""
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def mixed_lines(n: int, longer: int = 0) -> list[Any]:
    """Sampled, greedy, with and without seeds and ids, in both forms, and every seventh wrong."""
    lines: list[Any] = []
    usual = {"ignore_eos": longer > 0}
    for i in range(n):
        prompt = PROMPTS[i % len(PROMPTS)]
        if i % 7 == 3:
            lines.append({"id": i, "prompt": prompt, "temperature": -1})
        elif i % 7 == 5:
            body = {"model": "m", "prompt": [prompt, "b"], "max_tokens": longer + 3 + i % 5, **usual}
            lines.append({"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions", "body": body})
        else:
            arguments = {"temperature": 0.9, **[{}, {"id": f"line {i}", "seed": i}, {"temperature": 0}][i % 3], **usual}
            lines.append({"prompt": prompt, "max_new_tokens": longer + 2 + i % 9, **arguments})
    return lines


def records(path: Path) -> list[dict[str, Any]]:
    """The output without timings and dates."""
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    for record in found:
        record.pop("timings", None)
        if "custom_id" in record:
            record["response"]["body"].pop("created", None)
    return found


def wait_for_lines(path: Path, n: int, process: Any) -> None:
    """Returns when the file has so many lines, or fails when the process ends before."""
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert process.poll() is None, "the job was done too soon"
        time.sleep(0.002)
