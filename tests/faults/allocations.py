"""Every allocation of a piece of work fails in turn: python allocations.py WORK FOLDER, with the shim loaded.

WORK is load, generate or serve. After each fault: a clear error or the right answer, memory back, the next request
right. Prints what was done as JSON.
"""

import errno
import faulthandler
import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "python"), str(TESTS / "fuzz")]

import numpy as np  # noqa: E402
from injected import Action, Faults, Kind  # noqa: E402
from toy_models import concatenating, write_model  # noqa: E402

import fixmin_cpp  # noqa: E402

#: What a caller sees of memory that is not there.
CLEAR = (MemoryError, OSError, fixmin_cpp.FixminError)


class Refused(str):
    """What an error said; the error itself would hold on to what it ended."""


class Counts:
    """What a sweep did."""

    def __init__(self) -> None:
        self.n_faults = self.n_errors = self.n_right = 0


def sweep(faults: Faults, kind: Kind, action: Action, work: Callable[[], Any], check: Callable[[Any], None]) -> Counts:
    """Work with the n-th call failing, n = 1, 2, ... until it needs fewer. `check` gets the result, or the error."""
    counts = Counts()
    n = 0
    while True:
        n += 1
        faulthandler.dump_traceback_later(120, exit=True)
        result: Any
        try:
            with faults.at(kind, n, action, errno.ENOMEM):
                result = work()
        except CLEAR as error:
            result = Refused(error)
        if isinstance(result, Refused):
            assert result, "an error says what went wrong"
            counts.n_errors += 1
        else:
            counts.n_right += 1
        hit = faults.calls(kind) >= n
        if not hit:
            assert not isinstance(result, Refused), result
        check(result)
        faulthandler.cancel_dump_traceback_later()
        if not hit:
            return counts
        counts.n_faults += 1


def all_sweeps(
    faults: Faults, kinds: list[Kind], work: Callable[[], Any], check: Callable[[Any], None]
) -> dict[str, Any]:
    done = {}
    for kind in kinds:
        for action in (Action.FAIL_ONCE, Action.FAIL_ON):
            counts = sweep(faults, kind, action, work, check)
            done[f"{kind.name.lower()} {action.name.lower()}"] = vars(counts)
    return done


def model_file(folder: Path) -> Path:
    return write_model(folder / "toy.gguf", concatenating(), context_length=128)


def load(folder: Path, faults: Faults) -> dict[str, Any]:
    path = model_file(folder)
    text = "the abc"
    with fixmin_cpp.Model(path, n_threads=2) as model:
        want = model.logits(text)
    gc.collect()
    before = faults.live()

    def work() -> fixmin_cpp.Model:
        return fixmin_cpp.Model(path, n_threads=2)

    def check(result: Any) -> None:
        if isinstance(result, fixmin_cpp.Model):
            assert np.array_equal(result.logits(text), want)
            result.close()
            del result
        gc.collect()
        assert faults.live() <= before + 8, (before, faults.live())  # of what is made once

    return all_sweeps(faults, [Kind.ALLOCATION, Kind.MAPPING, Kind.THREAD], work, check)


def idle(model: fixmin_cpp.Model) -> dict[str, int]:
    """Waits until nothing runs."""
    end = time.monotonic() + 60
    while True:
        stats = model.stats()
        if stats["n_running"] + stats["n_waiting"] == 0:
            return stats
        assert time.monotonic() < end, stats
        time.sleep(0.001)


def generate(folder: Path, faults: Faults) -> dict[str, Any]:
    model = fixmin_cpp.Model(model_file(folder), n_threads=2, n_kv=256)
    common: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("the abc the abc the abc", {"prompt_lookup_num_tokens": 4, "logprobs": 2}),
        ("Paris " * 8, {"temperature": 1.0, "seed": 7, "top_k": 0, "dry_multiplier": 0.5, "repeat_penalty": 1.1}),
        ("the", {"regex": "[a-z]{1,9}"}),
    ]

    def one(prompt: str, options: dict[str, Any]) -> list[int]:
        return model.generate(prompt, **common, **options).token_ids

    want = [one(*request) for request in requests]
    scores = model.score("the abc the abc").logprobs.tolist()
    state = folder / "state"
    model.save_state(state, "the abc " * 12)
    results: list[Any] = [None] * len(requests)

    def side_by_side() -> list[Any]:
        """Requests in threads of their own; what each gave, or its error."""

        def run(i: int) -> None:
            try:
                results[i] = one(*requests[i])
            except CLEAR as error:
                results[i] = Refused(error)

        results[:] = [None] * len(requests)
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(results)

    def check(_: Any) -> None:
        stats = idle(model)
        assert stats["n_free_blocks"] + stats["n_cached_blocks"] == stats["n_blocks"], stats
        got = [one(*request) for request in requests[:2]]
        assert got == want[:2], (got, want[:2])

    def check_answers(result: Any) -> None:
        for given, right in zip(result, want, strict=True):
            assert isinstance(given, Refused) or given == right, (given, right)
        check(result)

    def check_one(result: Any) -> None:
        assert isinstance(result, Refused) or result == want[0], (result, want[0])
        check(result)

    def check_score(result: Any) -> None:
        assert isinstance(result, Refused) or result == scores, result
        check(result)

    done = {}
    parts = {
        "one": (lambda: one(*requests[0]), check_one),
        "three": (side_by_side, check_answers),
        "score": (lambda: model.score("the abc the abc").logprobs.tolist(), check_score),
        "load_state": (lambda: (model.clear_prefix_cache(), model.load_state(state)), check),
    }
    for name, (work, checked) in parts.items():
        for result, counts in all_sweeps(faults, [Kind.ALLOCATION], work, checked).items():
            done[f"{name}: {result}"] = counts
    gc.collect()
    before = faults.live()
    for _ in range(50):
        check(None)
    gc.collect()
    assert faults.live() <= before + 50, (before, faults.live())
    model.close()
    return done


def serve(folder: Path, faults: Faults) -> dict[str, Any]:
    import requests_fuzz

    server = requests_fuzz.Server(folder)
    done = {}
    bodies = {
        "completion": ("/v1/completions", {"prompt": "the abc", "max_tokens": 4, "temperature": 0, "logprobs": 1}),
        "stream": ("/v1/completions", {"prompt": ["the", "abc"], "max_tokens": 4, "temperature": 0, "stream": True}),
        "embedding": ("/v1/embeddings", {"input": "the abc"}),
    }

    def content(answer: tuple[int, bytes]) -> Any:
        """What is the same each time."""
        data = answer[1]
        if data.startswith(b"data: "):
            return [(part["choices"][0]["index"], part["choices"][0]["text"]) for part in requests_fuzz.events(data)]
        value = json.loads(data)
        return value.get("choices") or value.get("data") or value

    for name, (address, fields) in bodies.items():
        body = json.dumps(fields).encode()
        post = lambda: server.post(address, body)  # noqa: B023, E731
        right = content(post())
        texts = sorted(right) if name == "stream" else [{**c, "seed": 0} for c in right]

        def check(answer: Any) -> None:
            status, data = answer
            if status == 200:
                got = content(answer) if not data.count(b'"error"') else None
                if got is not None:
                    got = sorted(got) if name == "stream" else [{**c, "seed": 0} for c in got]  # noqa: B023
                    assert got == texts, (got, texts)  # noqa: B023
            else:
                assert status >= 500, answer
                assert json.loads(data)["error"]["message"], data
            again = post()  # noqa: B023
            assert again[0] == 200, again
            check_same = content(again)
            same = sorted(check_same) if name == "stream" else [{**c, "seed": 0} for c in check_same]  # noqa: B023
            assert same == texts, same  # noqa: B023

        for result, counts in all_sweeps(faults, [Kind.ALLOCATION], post, check).items():
            done[f"{name}: {result}"] = counts
    server.close()
    return done


def main() -> None:
    work, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps({"load": load, "generate": generate, "serve": serve}[work](folder, Faults())))


if __name__ == "__main__":
    main()
