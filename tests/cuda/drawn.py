"""What requests draw on the CPU and on the emulated GPU of this package, as one JSON object.

    python drawn.py FOLDER

{name of a case: {"cpu" and "cuda": {"tokens": of each request, "n_extracts"}, "by_extracts": whether no logits had to
leave the GPU for it, "n_tokens"}}. Run by test_extracts.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf_factory import make_model

from fixmin_cpp import _core

V = 200
OFF = dict(top_k=0, top_p=1.0, min_p=0.0)
LENGTHS = (3, 20, 40)


class Mask:
    """Every third token, and another third after each."""

    def __init__(self) -> None:
        self.n = 0

    def allowed(self):
        chosen = np.zeros(-V % 32 + V, bool)
        chosen[self.n % 3 : V : 3] = True
        return np.packbits(chosen, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        assert token % 3 == self.n % 3
        self.n += 1

    def finished(self) -> bool:
        return self.n == 10


#: Name -> parameters, options of the requests, whether extracts are enough.
CASES = {
    "greedy": ({}, {}, True),
    "the defaults": (dict(temperature=0.8), {}, True),
    "top_p": (dict(temperature=1.0, **OFF | dict(top_p=0.9)), {}, True),
    "the model's own": (dict(temperature=1.0, **OFF), {}, True),
    "hot": (dict(temperature=3.0, **OFF | dict(min_p=0.001)), {}, True),
    "masked": (dict(temperature=0.8), dict(mask=Mask), True),
    "masked, greedy": ({}, dict(mask=Mask), True),
    "banned": (dict(temperature=0.8, banned_ids=[3, 5]), {}, True),
    "banned and masked": (dict(temperature=0.8, banned_ids=list(range(0, 90))), dict(mask=Mask), True),
    "banned and guessed": (dict(banned_ids=[3, 5]), dict(n_draft=5), True),
    "guessed": (dict(max_new_tokens=50), dict(n_draft=5), True),
    "guessed, drawn": (dict(temperature=0.4), dict(n_draft=5), True),
    "with log-probabilities": (dict(temperature=0.8), dict(n_logprobs=2), False),
    "penalties": (dict(temperature=0.8, repeat_penalty=1.2), {}, False),
    "biased and masked": (dict(temperature=0.8, logit_bias={5: 2.0}), dict(mask=Mask), False),
    "typical": (dict(temperature=0.8, typical_p=0.7, **OFF), {}, False),
}


def drawn(path: Path, device: str, params: dict, options: dict) -> dict:
    engine = _core.Engine(str(path), device=device, n_threads=1)
    ids = np.tile(np.arange(7, dtype=np.uint32), 6)  # a text that repeats itself: something to guess from
    requests = []
    for i, n in enumerate(LENGTHS):
        one = {name: value() if value is Mask else value for name, value in options.items()}
        requests.append(
            engine.submit(ids[:n], _core.SamplingParams(**{"max_new_tokens": 12, "seed": i} | params), **one)
        )
    for request in requests:
        while not request.wait(100, 60.0):  # more than there will be: the end
            pass
    tokens = [np.asarray(request.read(0)[0]).tolist() for request in requests]
    return {"tokens": tokens, "n_extracts": engine.stats()["n_extracts"]}


def main() -> None:
    path = make_model(Path(sys.argv[1]) / "model.gguf", vocab_size=V, weight_type="Q8_0")
    found = {}
    for name, (params, options, by_extracts) in CASES.items():
        one = {device: drawn(path, device, params, options) for device in ("cpu", "cuda")}
        found[name] = one | {"by_extracts": by_extracts, "n_tokens": sum(len(t) for t in one["cpu"]["tokens"])}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
