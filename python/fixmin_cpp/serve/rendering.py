"""JSON of answers that may be long, made piece by piece: no step holds up the event loop or takes much memory."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response, StreamingResponse

__all__ = ["by_id", "embeddings", "token_list"]


def token_list(tokens: Iterable[bytes], **others: Any) -> Response:
    """{"tokens": [...], **others} of tokens that are JSON already."""
    end = json.dumps(others)[1:].encode()  # without its {
    content = b'{"tokens":[' + b",".join(tokens) + (b"]," if others else b"]") + end
    return Response(content, media_type="application/json")


def by_id(ids: Iterable[int], render: Callable[[int], Any]) -> list[bytes]:
    """JSON of each token. `render` makes an object of an id, once however often the id occurs."""
    known: dict[int, bytes] = {}
    texts = []
    for token_id in ids:
        text = known.get(token_id)
        if text is None:
            dumped = json.dumps(render(token_id), ensure_ascii=False, separators=(",", ":"))
            text = known[token_id] = dumped.encode()
        texts.append(text)
    return texts


def embeddings(vectors: Sequence[NDArray[np.float32]], n_tokens: int, model: str, as_base64: bool) -> Response:
    """OpenAI's answer, sent vector by vector: as JSON they are ten times as large."""

    async def parts() -> AsyncIterator[str]:
        yield '{"object":"list","data":['
        for i, vector in enumerate(vectors):
            numbers = base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()
            entry = {"object": "embedding", "index": i, "embedding": numbers}
            yield ("," if i else "") + json.dumps(entry, separators=(",", ":"))
            await asyncio.sleep(0)
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        yield "]," + json.dumps({"model": model, "usage": usage})[1:]

    return StreamingResponse(parts(), media_type="application/json")
