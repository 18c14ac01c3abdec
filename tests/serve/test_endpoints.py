"""The endpoints beside completions, what the schema promises, and that nothing at all gives a 5xx."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from servers import Server, httpx

import fixmin_cpp
from fixmin_cpp import GenerationArguments, _core

serve = pytest.importorskip("fixmin_cpp.serve")
prometheus_parser = pytest.importorskip("prometheus_client.parser")


def test_tokenize_and_back(server: Server, model: fixmin_cpp.Model) -> None:
    text = "the abc 日本"
    ids = model.encode(text)
    for body in ({"content": text}, {"prompt": text}):
        answer = server.post("/tokenize", body).json()
        assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), model.info["n_ctx"])
    pieces = server.post("/tokenize", {"content": text, "with_pieces": True}).json()["tokens"]
    assert "".join(piece["piece"] for piece in pieces) == text
    assert server.post("/detokenize", {"tokens": ids}).json()["content"] == text
    assert server.post("/tokenize", {"content": ""}).json()["tokens"] == []


def test_codes(server: Server, model: fixmin_cpp.Model) -> None:
    """A bin(t) xor b with NumPy, from the file's own matrix."""
    code = server.get("/props").json()["code"]
    metadata = _core.GgufFile(str(server.model)).metadata
    width = metadata["fixmin.code.width"]
    a = np.asarray(metadata["fixmin.code.affine_matrix"]).reshape(width, width)
    b = np.asarray(metadata["fixmin.code.affine_shift"])
    assert np.array_equal(code["matrix"], a)
    assert np.array_equal(code["shift"], b)
    ids = model.encode("the abc q")
    for body in ({"text": "the abc q"}, {"tokens": ids}):
        tokens = server.post("/codes", body).json()["tokens"]
        assert [token["id"] for token in tokens] == ids
        assert [token["text"] for token in tokens] == [model.decode(i) for i in ids]
        for token in tokens:
            bits = [token["id"] >> i & 1 for i in range(width)]
            assert token["bits"] == bits
            assert token["code"] == ((a @ bits + b) % 2).tolist()
    assert server.post("/codes", {"text": ""}).json() == {"tokens": []}


def test_props(server: Server, model: fixmin_cpp.Model) -> None:
    props = server.get("/props").json()
    assert props["model_name"] == "toy"
    assert props["n_ctx"] == model.info["n_ctx"]
    assert props["parameters_saved"] == model.info["vocab_size"] * model.info["embedding_length"]
    assert props["code"]["lift"] in ("tile", "interleave")


def test_metrics(server: Server) -> None:
    def read() -> dict[str, float]:
        families = prometheus_parser.text_string_to_metric_families(server.get("/metrics").text)
        sums: Counter[str] = Counter()  # over labels
        for family in families:
            for sample in family.samples:
                sums[sample.name] += sample.value
        return sums

    before = read()
    answer = server.post("/v1/completions", {"prompt": ["the a", "abc"], "max_tokens": 7, "ignore_eos": True}).json()
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    n_prompt, n_new = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    assert n_new == 14
    for name in ("llamacpp:prompt_tokens_total", "vllm:prompt_tokens_total"):
        assert grown[name] == n_prompt
    for name in ("llamacpp:tokens_predicted_total", "vllm:generation_tokens_total"):
        assert grown[name] == n_new
    assert grown["vllm:time_to_first_token_seconds_count"] == 2
    assert grown["vllm:inter_token_latency_seconds_count"] == 12
    assert grown["vllm:e2e_request_latency_seconds_count"] == 1
    assert grown["vllm:request_success_total"] == 2
    assert after["llamacpp:requests_processing"] == after["vllm:num_requests_waiting"] == 0


def test_page(server: Server) -> None:
    answer = server.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@contextlib.asynccontextmanager
async def in_this_process(path: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A client of a server that is starting, and its host."""
    app = serve.create_app(serve.ServeSettings(model=str(path)))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client,
    ):
        yield client, app.state.host


def test_health_and_requests_while_loading(served_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with a model that takes until it is told to be ready."""
    ready = threading.Event()
    load = fixmin_cpp.Model

    def slowly(path: Any, progress: Any, **arguments: Any) -> fixmin_cpp.Model:
        progress(0.25)
        assert ready.wait(60)
        return load(path, progress=progress, **arguments)

    monkeypatch.setattr("fixmin_cpp.serve.host.Model", slowly)

    async def watch() -> None:
        async with in_this_process(served_path) as (client, host):
            while host.progress == 0.0:
                await asyncio.sleep(0.01)
            for path in ("/health", "/v1/models", "/metrics", "/props"):
                answer = await client.get(path)
                assert answer.status_code == 503
                assert answer.json()["progress"] == 0.25
                assert answer.json()["error"]["type"] == "unavailable_error"
                assert answer.json()["error"]["code"] == "model_loading"  # a text, as OpenAI's are
            assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 503
            ready.set()
            while (await client.get("/health")).status_code == 503:
                await asyncio.sleep(0.01)
            answer = await client.post("/v1/completions", json={"prompt": "the", "max_tokens": 3})
            assert answer.status_code == 200

    asyncio.run(watch())


def test_health_when_the_device_has_failed(served_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fixmin_cpp.serve import generation

    def fail(*_: Any) -> None:
        raise fixmin_cpp.DeviceError("the GPU has failed")

    async def watch() -> None:
        async with in_this_process(served_path) as (client, _):
            while (await client.get("/health")).status_code == 503:
                await asyncio.sleep(0.01)
            failing = dict.fromkeys(generation.ANSWERS, fail)
            monkeypatch.setattr(generation, "ANSWERS", failing)
            answer = await client.post("/v1/completions", json={"prompt": "the", "max_tokens": 3})
            assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the GPU has failed")
            answer = await client.get("/health")
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the device has failed: the GPU has failed"

    asyncio.run(watch())


def test_every_argument_is_a_field() -> None:
    """What generate() takes can be asked for, but for the two that have other fields."""
    from fixmin_cpp.serve.schemas import BODIES

    for path in ("/v1/completions", "/v1/chat/completions"):
        kinds = {name: field.annotation for name, field in BODIES[path].model_fields.items()}
        assert GenerationArguments.__annotations__.keys() - kinds.keys() == {"prompt_logprobs"}
        assert kinds["logprobs"] == (int | None if path == "/v1/completions" else bool | None)


def test_schema_is_openapi(server: Server) -> None:
    schema = server.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.")
    paths = {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models", "/tokenize", "/codes"}
    assert paths <= schema["paths"].keys()


@pytest.mark.external
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_schemathesis_finds_no_5xx(server: Server, mode: str) -> None:
    """Requests made from the schema, right and wrong ones."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    failures: list[str] = []
    statuses: list[int] = []

    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens", 16), int):
            case.body = {**case.body, "max_tokens": min(2, case.body.get("max_tokens", 2))}  # for time
        answer = case.call(timeout=60)
        statuses.append(answer.status_code)
        if answer.status_code >= 500:
            failures.append(f"{answer.status_code} for {case.as_curl_command()}: {answer.text[:300]}")

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode == "NEGATIVE" and operation.method.upper() == "GET":
            continue  # nothing to get wrong
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])
        profile = settings(
            max_examples=50, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
        )
        profile(given(case=strategy)(ask))()
    assert not failures, failures[0]
    assert len(statuses) > 200
    assert 400 in statuses
    if mode == "POSITIVE":
        assert 200 in statuses
    assert server.post("/v1/completions", {"prompt": "the", "max_tokens": 2}).status_code == 200
