"""The HTTP interface: OpenAI's, llama-server's and vLLM's paths, and what is this project's own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from numpy.typing import NDArray
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from .._core import __version__
from ..arguments import as_token_ids
from ..errors import ArgumentError
from ..openai_api.chat import ChatTemplate, strings
from ..openai_api.request import ChatRequest, prompts_in
from . import answers, rendering
from .errors import APIError, install
from .generation import Job
from .guards import Guard, Log, Prefix, Receive, Scope, Send, facts_of
from .host import ModelHost
from .limits import read_body
from .metrics import Metrics
from .schemas import ChatBody, CodesRequest, CompletionBody, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .settings import ServeSettings

__all__ = ["create_app"]

_MAX_TOKENIZED = 1 << 17  # bytes of UTF-8: tokenising takes 200 for each
_MAX_CODES = 1 << 16  # tokens of /codes, and bytes of text
_PAGE = Path(__file__).with_name("playground.html")
_DOCS = Path(__file__).with_name("docs.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": answers.Error}
    for status, text in {
        400: "Something in the request is wrong: the message says what.",
        401: "No API key, or a wrong one.",
        413: "The body is too large.",
        429: "Too many generations are waiting.",
        503: "The model is loading, or the server is shutting down.",
    }.items()
}


class _Events(Response):
    """Server-sent events of a job. A client that goes away cancels it."""

    media_type = "text/event-stream"

    def __init__(self, host: ModelHost, job: Job) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._host = host
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers; returns when the last event was sent or the client has gone."""
        with self._host.admitted(self._job.n_sequences):
            await _unless_disconnected(self._send(send), receive)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._job.events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                await asyncio.sleep(0)  # a hundred events may be there at once: others come between them
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_disconnected(work: Any, receive: Receive) -> Any:
    """The result of `work`, which is cancelled when the client goes away: then None."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class _Route(APIRoute):
    """Reads JSON within its limits, and not in the event loop, before it is validated."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            if request.method == "POST":
                body = await request.body()
                host: ModelHost = request.app.state.host
                request._json = await host.compute(read_body, body)  # where request.json() keeps it
            answer: Response = await handle(request)
            return answer

        return bounded


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def create_app(
    settings: ServeSettings,
    on_failure: Callable[[], None] | None = None,
    *,
    load_first: bool = False,
    hosts: tuple[str, ...] = (),
) -> FastAPI:
    """The server as an ASGI application. The model is loaded when it starts up, while /health answers 503.

    Args:
        settings: see there.
        on_failure: called if the model cannot be loaded.
        hosts: names by which the server may be asked (the header Host); none: any.
        load_first: the start ends when the model is loaded, and fails if it cannot be.

    Raises:
        ArgumentError: settings.chat_template is no template, or root_path begins like a path of the server's own.
    """
    template = ChatTemplate(settings.chat_template)
    host = ModelHost(settings, on_failure)
    metrics = Metrics(host)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        host.start()
        if load_first:
            await host.loaded()
        yield
        await host.close()

    app = FastAPI(
        title="fixmin",
        summary="Language models without an input embedding table.",
        version=__version__,
        lifespan=lifespan,
        default_response_class=JSONResponse,
        responses=_ERRORS,
        openapi_url=None,  # made in a thread, below
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # Guard takes paths with a slash at the end
        dependencies=[Depends(HTTPBearer(auto_error=False))],  # described; Guard checks keys
    )
    app.router.route_class = _Route
    app.state.host = host
    app.state.metrics = metrics
    app.state.chat_template = template.source
    install(app)
    # The last one comes first.
    app.add_middleware(Guard, api_keys=settings.api_keys, max_body_bytes=settings.max_body_bytes, hosts=hosts)
    if settings.cors_origins:  # a browser asks for leave without a key
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Log, on_answer=metrics.answered)
    _add_generation(app, host, metrics, template)
    _add_tokens(app, host)
    _add_facts(app, host, metrics)
    if settings.prefix:
        _add_prefix(app, settings.prefix)
    return app


def _add_prefix(app: FastAPI, prefix: str) -> None:
    first = prefix.split("/")[1]
    if any(route.path.split("/")[1] == first for route in app.routes if isinstance(route, Route)):
        raise ArgumentError(f"root_path {prefix} begins like a path of the server's own, /{first}: choose another one")
    app.add_middleware(Prefix, prefix=prefix)


def _add_generation(app: FastAPI, host: ModelHost, metrics: Metrics, template: ChatTemplate) -> None:
    async def answer(request: Request, job: Job, prompt: Any, stop: Sequence[str] = ()) -> Response:
        ready = await _unless_disconnected(job.prepare(prompt, stop), request.receive)
        if ready is None:
            return JSONResponse(None)
        if job.request.stream:
            return _Events(host, job)
        with host.admitted(job.n_sequences):
            result = await _unless_disconnected(job.answer(), request.receive)
        return Response(result or b"null", media_type="application/json")

    @app.post("/v1/completions", response_model=answers.Completion)
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Continues prompts: texts or token ids."""
        host.require_room()  # before anything is tokenised
        return await answer(request, Job(host, metrics, facts_of(request.scope), body), body.prompt)

    @app.post("/v1/chat/completions", response_model=answers.ChatCompletion)
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        """Answers a chat through the server's template."""
        _ = host.model
        host.require_room()
        job = Job(host, metrics, facts_of(request.scope), body)
        return await answer(request, job, await host.compute(_chat_prompt, host, template, body), template.stop)

    @app.post("/v1/embeddings", response_model=answers.Embeddings)
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """The mean of the last layer's states for each text, before the last norm: D numbers."""
        if body.dimensions is not None:
            raise APIError(400, "dimensions is not supported: states have one length", param="dimensions")
        inputs, many = prompts_in("input", body.input)
        if len(inputs) > host.settings.max_inputs:
            raise ArgumentError(f"input has {len(inputs)} entries, but a request may have {host.settings.max_inputs}")
        special = body.parse_special is not False

        async def embed() -> list[tuple[NDArray[np.float32], int]]:
            names = (f"input[{i}]" if many else "input" for i in range(len(inputs)))
            pairs = zip(names, inputs, strict=True)
            return [await host.compute(_embed, host, name, one, special, by="engine") for name, one in pairs]

        with host.admitted(1):
            found = await _unless_disconnected(embed(), request.receive)
        if found is None:
            return JSONResponse(None)
        vectors, n_tokens = [vector for vector, _ in found], sum(n for _, n in found)
        facts_of(request.scope)["prompt_tokens"] = n_tokens
        return rendering.embeddings(vectors, n_tokens, host.settings.name, body.encoding_format == "base64")


def _chat_prompt(host: ModelHost, template: ChatTemplate, body: ChatRequest) -> list[int]:
    host.check_texts("messages", ["".join(strings(body.messages))])  # a template may read any of them
    return template.prompt_of(body, host.model.require_tokenizer())


def _embed(host: ModelHost, name: str, text: Any, parse_special: bool) -> tuple[NDArray[np.float32], int]:
    model = host.model
    host.check_texts(name, [text])
    ids = model.token_ids(text, name=name, room=0, parse_special=parse_special)
    states = model.hidden_states(ids, model.info["block_count"])
    return states.mean(axis=0, dtype=np.float64).astype(np.float32), len(states)


def _add_tokens(app: FastAPI, host: ModelHost) -> None:
    async def computed(request: Request, function: Callable[..., Response], body: Any) -> Response:
        answer = await _unless_disconnected(host.compute(function, host, body), request.receive)
        return JSONResponse(None) if answer is None else answer

    @app.post("/tokenize", response_model=answers.Tokens)
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """Token ids of a text, as llama-server and vLLM give them."""
        return await computed(request, _tokenize, body)

    @app.post("/detokenize", response_model=answers.Detokenized)
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        """Text of token ids."""
        return await computed(request, _detokenize, body)

    @app.post("/codes", response_model=answers.Codes)
    async def codes(request: Request, body: CodesRequest) -> Response:
        """What stands in place of an input embedding: the bits of each token's id and its code, bit i at place i."""
        return await computed(request, _codes, body)


def _detokenize(host: ModelHost, body: DetokenizeRequest) -> Response:
    model = host.model
    ids: Any = as_token_ids("tokens", body.tokens, model.info["vocab_size"]) if body.tokens else []
    text = model.decode(ids)
    return JSONResponse({"content": text, "prompt": text})


def _tokenize(host: ModelHost, body: TokenizeRequest) -> Response:
    text = body.content if body.content is not None else body.prompt
    if text is None:
        raise ArgumentError("content is missing (or prompt, as vLLM calls it)")
    name = "prompt" if body.content is None else "content"
    _check_length(name, _bytes(text), _MAX_TOKENIZED, "bytes")
    model = host.model
    special, parse = body.add_special or body.add_special_tokens, body.parse_special is not False
    ids = model.require_tokenizer().encode(text, add_special_tokens=special, parse_special=parse, name=name)
    texts = rendering.by_id(ids, partial(_piece, host)) if body.with_pieces else (b"%d" % i for i in ids)
    return rendering.token_list(texts, count=len(ids), max_model_len=model.info["n_ctx"])


def _check_length(name: str, value: Sized, limit: int, unit: str) -> None:
    if len(value) > limit:
        raise APIError(400, f"{name} has {len(value)} {unit}, at most {limit} are taken", param=name)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _piece(host: ModelHost, token_id: int) -> dict[str, Any]:
    return {"id": token_id, "piece": host.token_text(token_id)}


def _codes(host: ModelHost, body: CodesRequest) -> Response:
    if (body.text is None) == (body.tokens is None):
        raise ArgumentError("text or tokens is needed, one of them")
    model = host.model
    given: Any = body.tokens
    if body.text is not None:
        _check_length("text", _bytes(body.text), _MAX_CODES, "bytes")
        given = model.encode(body.text, parse_special=body.parse_special is not False)
    if not given:
        return rendering.token_list([])
    _check_length("text" if body.tokens is None else "tokens", given, _MAX_CODES, "tokens")
    ids = as_token_ids("tokens", given, model.info["vocab_size"])

    def describe(token_id: int) -> dict[str, Any]:
        code = model.codes([token_id])[0].tolist()
        width = len(code)
        bits = [token_id >> i & 1 for i in range(width)] if width <= 32 else None
        return {"id": token_id, "text": host.token_text(token_id), "bits": bits, "code": code}

    return rendering.token_list(rendering.by_id(ids.tolist(), describe))


def _add_facts(app: FastAPI, host: ModelHost, metrics: Metrics) -> None:
    name = host.settings.name

    @app.get("/health")
    @app.get("/v1/health", include_in_schema=False)
    async def health() -> dict[str, str]:
        """Whether requests are answered. 503 with `progress`, 0 to 1, while the model is loading."""
        _ = host.model
        host.require_health()
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model of this server."""
        info = host.model.info
        entry = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "fixmin",
            "max_model_len": info["n_ctx"],
            "meta": {
                "n_vocab": info["vocab_size"],
                "n_ctx_train": info["context_length"],
                "n_embd": info["embedding_length"],
                "size": info["bytes"]["file"],
            },
        }
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model_name:path}")
    async def model(model_name: str) -> dict[str, Any]:
        """The same for its name."""
        if model_name != name:
            raise APIError(404, f"there is no model of that name here, only {name!r}", code="model_not_found")
        found: dict[str, Any] = (await models())["data"][0]
        return found

    @app.get("/props")
    async def props() -> dict[str, Any]:
        """What is loaded, how its codes are made, and what requests may ask for."""
        info = host.model.info
        limits = host.settings
        by_type: dict[str, int] = info["bytes"]["weights_by_type"]
        return {
            "model_name": name,
            "build_info": f"fixmin {__version__}",
            "n_ctx": info["n_ctx"],
            "total_slots": limits.n_parallel,
            "vocab_size": info["vocab_size"],
            "n_layers": info["block_count"],
            "embedding_length": info["embedding_length"],
            "eos_token_id": info["eos_token_id"],
            "quantization": max(by_type, key=lambda kind: by_type[kind]),  # that most bytes have
            "device": info["device"],
            "device_name": info["device_name"],
            "isa": info["isa"],
            "n_threads": info["n_threads"],
            "parameters_saved": info["vocab_size"] * info["embedding_length"],
            "code": {"matrix": None, "shift": None, **host.code},
            "limits": {
                "max_tokens": info["n_ctx"],
                "max_n": limits.max_n,
                "max_logprobs": limits.max_logprobs,
                "max_inputs": limits.max_inputs,
                "timeout": limits.timeout,
            },
            "chat_template": app.state.chat_template,
        }

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """For Prometheus."""
        _ = host.model
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def playground() -> Response:
        """The playground. Its paths are relative: a proxy may show it at /llm as well as at /llm/."""
        base = f'<base href="{host.settings.prefix}/">' if host.settings.prefix else ""
        return HTMLResponse(_PAGE.read_text("utf-8").replace("<head>", f"<head>{base}", 1), headers=_PAGE_HEADERS)

    @app.get("/openapi.json", include_in_schema=False)
    async def description(request: Request) -> Response:
        """What there is, for programs; made at the first request, in a second."""
        made = await host.compute(app.openapi)
        root = request.scope.get("root_path", "")
        return JSONResponse({**made, "servers": [{"url": root}]} if root else made)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> Response:
        """What /openapi.json says, to read and to try: a page of our own, as others load scripts from elsewhere."""
        return HTMLResponse(_DOCS.read_text("utf-8"), headers=_PAGE_HEADERS)
