"""What a caller of _core.Engine.submit does, in one call."""

from collections.abc import Iterator

import numpy as np

from fixmin_cpp import _core


def finished(request: _core.Request, timeout_s: float = 60.0) -> _core.Request:
    """The request, once it has ended; raises what went wrong in it."""
    assert request.wait(2**62, timeout_s), "the request did not end"
    request.result()
    return request


def generate(engine: _core.Engine, ids: np.ndarray, params: _core.SamplingParams) -> list[int]:
    return finished(engine.submit(ids, params)).read(0)[0]


def tokens(request: _core.Request) -> Iterator[int]:
    """They come while the engine goes on with the next ones."""
    n, ended = 0, False
    while not ended:
        assert request.wait(n, 60.0), "no token came"
        ids, _, ended = request.read(n)
        n += len(ids)
        yield from ids


def score(engine: _core.Engine, ids: np.ndarray) -> np.ndarray:
    """float32 [T-1], natural log-probabilities of ids[1:]."""
    request = finished(engine.submit(ids, _core.SamplingParams(max_new_tokens=0), n_prompt_logprobs=0))
    assert request.result()["finish_reason"] == "length"
    return request.prompt_logprobs()
