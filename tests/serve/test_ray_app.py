"""The tests of the endpoints and clients again, on Ray Serve with two replicas, and what is Ray's own."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Server, httpx

import fixmin_cpp
from fixmin_cpp import ArgumentError

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")
openai = pytest.importorskip("openai")

from test_clients import (  # noqa: E402, F401  # run here too, against the fixture `server` of this file
    client,
    test_chat,
    test_completion_is_that_of_the_model,
    test_echo_scores_the_prompt,
    test_embeddings,
    test_errors_are_400_and_name_what,
    test_logprobs,
    test_models,
    test_n_and_best_of,
    test_prompts_of_all_kinds,
    test_settings_mean_what_they_say,
    test_stop,
    test_stream_is_the_same_text,
    test_unknown_path_and_method,
)
from test_endpoints import test_codes, test_props, test_schema_is_openapi, test_tokenize_and_back  # noqa: E402, F401

from fixmin_cpp.serve import ServeSettings  # noqa: E402
from fixmin_cpp.serve.ray_app import app, build  # noqa: E402

pytestmark = [pytest.mark.external, pytest.mark.filterwarnings("ignore")]

PORT = 18431


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_DISABLE_IMPORT_WARNING"] = "1"
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray.serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    yield
    ray.serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def server(cluster: None, served_path: Path) -> Iterator[Server]:
    settings = ServeSettings(model=str(served_path), model_name="toy", n_threads=1)
    ray.serve.run(build(settings, min_replicas=2, max_replicas=2), name="toy", route_prefix="/")
    yield Server(f"http://127.0.0.1:{PORT}", served_path, None, Path(os.devnull))  # type: ignore[arg-type]
    ray.serve.delete("toy")


def test_both_replicas_answer_alike(server: Server, model: fixmin_cpp.Model) -> None:
    body = {"prompt": "the a", "max_tokens": 20, "temperature": 0}
    texts = {server.post("/v1/completions", body).json()["choices"][0]["text"] for _ in range(20)}
    assert texts == {model.generate("the a", max_new_tokens=20).text}
    status = ray.serve.status().applications["toy"].deployments["fixmin"]
    assert status.replica_states == {"RUNNING": 2}


def test_a_client_that_goes_away_is_noticed(cluster: None, long_path: Path) -> None:
    settings = ServeSettings(model=str(long_path), n_threads=1)
    ray.serve.run(build(settings), name="long", route_prefix="/long")
    url = f"http://127.0.0.1:{PORT}/long"
    body = {"prompt": "the", "max_tokens": 90_000, "ignore_eos": True, "stream": True}
    served = Server(url, long_path, None, Path(os.devnull))  # type: ignore[arg-type]
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()  # closes the connection when nobody holds it any more
            next(lines)
            assert served.metric("llamacpp:requests_processing") == 1
        assert served.idle()
    finally:
        ray.serve.delete("long")


def test_a_model_that_cannot_be_loaded_is_told(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        ray.serve.run(build(ServeSettings(model=str(tmp_path / "absent.gguf"))), name="absent", route_prefix="/absent")
    with contextlib.suppress(Exception):
        ray.serve.delete("absent")


def test_arguments_of_serve_run(served_path: Path) -> None:
    given: dict[str, Any] = {"model": str(served_path), "max_replicas": "3", "timeout": "5", "api_keys": "a,b"}
    deployment = app(given)._bound_deployment
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3
    (settings,) = deployment.init_args
    assert settings["timeout"] == 5.0
    assert settings["api_keys"] == ("a", "b")
    for wrong in ({}, {"model": "m", "colour": "red"}, {"model": "m", "n_threads": "x"}, {"model": "m", "port": "-1"}):
        with pytest.raises(ArgumentError):
            app(wrong)
    with pytest.raises(ArgumentError, match="below min_replicas"):
        build(ServeSettings(model="m"), min_replicas=2)
