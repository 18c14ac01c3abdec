"""What people point at a server: curl as on the model cards, the openai package, litellm, lm-evaluation-harness.

What they get is compared with the same model in this process, never with another answer of the server.
"""

import asyncio
import json
import math
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Server, Start
from toy_models import byte_level

import fixmin_cpp

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.external

PROMPT = "the a"
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # OpenAI's defaults, in this project's names
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


# --- the model cards -------------------------------------------------------------------------------------------------


def test_curl_of_the_cards(demo_path: Path, start: Start) -> None:
    """Both commands as docs/serving.md quotes them, each on its port if that is free here."""
    commands = re.findall(
        r'^curl -X POST "http://localhost:\d+/v1/completions".*?^\s*}\'$', DOCS.read_text(), re.S | re.M
    )
    assert [re.search(r":(\d+)/", command)[1] for command in commands] == ["8000", "30000"]
    with fixmin_cpp.Model(demo_path) as model:
        n_ctx = model.info["n_ctx"]
    for command in commands:
        port = int(re.search(r":(\d+)/", command)[1])
        with start(demo_path, port=port if _is_free(port) else 0) as server:
            ran = subprocess.run(
                ["bash", "-c", command.replace(f"http://localhost:{port}", server.url)], capture_output=True, check=True
            )
        answer = json.loads(ran.stdout)
        assert answer["object"] == "text_completion"
        (choice,) = answer["choices"]
        assert len(choice["text"].split()) > 10
        used = answer["usage"]["total_tokens"]
        # The demo has a context of 256, the cards ask for 512 tokens: it ends there, or at the end of a text.
        assert choice["finish_reason"] == ("length" if used >= n_ctx else "stop")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


# --- openai ----------------------------------------------------------------------------------------------------------


def test_completion_is_that_of_the_model(client: Any, model: fixmin_cpp.Model) -> None:
    expected = model.generate(PROMPT, max_new_tokens=30, seed=5, **PLAIN)
    answer = client.completions.create(
        model="any", prompt=PROMPT, max_tokens=30, seed=5, extra_body={"return_token_ids": True}
    )
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert choice.token_ids == expected.token_ids
    assert choice.finish_reason == {"eos": "stop"}.get(expected.finish_reason, expected.finish_reason)
    assert answer.model == "toy"
    assert answer.usage.prompt_tokens == expected.timings.n_prompt
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_defaults_are_openais(client: Any, model: fixmin_cpp.Model) -> None:
    answer = client.completions.create(model="any", prompt=PROMPT, seed=3)
    assert answer.choices[0].text == model.generate(PROMPT, max_new_tokens=16, seed=3, **PLAIN).text


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        (
            {"presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"presence_penalty": 1.5, "frequency_penalty": 0.5, "openai_penalties": True},
        ),
        ({"logit_bias": {"5": 100}}, {"logit_bias": {5: 100.0}}),
        (
            {"extra_body": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.3}},
            dict(top_k=3, min_p=0.1, repeat_penalty=1.3),
        ),
        ({"extra_body": {"min_tokens": 20, "ignore_eos": True}}, {"min_new_tokens": 20, "ignore_eos": True}),
        ({"extra_body": {"stop_token_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}}, {"stop_ids": list(range(10))}),
        ({"extra_body": {"regex": "(abc|the)+"}}, {"regex": "(abc|the)+"}),
        ({"extra_body": {"response_format": {"type": "text"}}}, {}),
    ],
)
def test_settings_mean_what_they_say(
    client: Any, model: fixmin_cpp.Model, sent: dict[str, Any], meant: dict[str, Any]
) -> None:
    expected = model.generate(PROMPT, max_new_tokens=24, seed=11, **{**PLAIN, **meant})
    answer = client.completions.create(model="any", prompt=PROMPT, max_tokens=24, seed=11, **sent)
    assert answer.choices[0].text == expected.text


def test_json_schema_of_a_response_format(client: Any, bytes_path: Path, start: Start) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    with start(bytes_path) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
        answer = made.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "hi"}], response_format=form, max_tokens=100, seed=1
        )
    assert json.loads(answer.choices[0].message.content)["a"] in ("x", "y")


def test_stream_is_the_same_text(client: Any, model: fixmin_cpp.Model) -> None:
    expected = model.generate(PROMPT, max_new_tokens=30, seed=5, **PLAIN)
    stream = client.completions.create(
        model="any", prompt=PROMPT, max_tokens=30, seed=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected.text
    assert len(chunks) >= len(expected.token_ids)  # token by token
    assert [c.choices[0].finish_reason for c in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason in ("length", "stop")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_of_half_characters(bytes_path: Path, start: Start) -> None:
    with fixmin_cpp.Model(bytes_path) as model, start(bytes_path) as server:
        for seed in range(5):
            expected = model.generate("日本", max_new_tokens=40, seed=seed, **PLAIN).text
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
                stream = made.completions.create(model="m", prompt="日本", max_tokens=40, seed=seed, stream=True)
                assert "".join(choice.text for chunk in stream for choice in chunk.choices) == expected


def test_logprobs(client: Any, model: fixmin_cpp.Model) -> None:
    expected = model.generate(PROMPT, max_new_tokens=12, seed=2, logprobs=3, **PLAIN)
    answer = client.completions.create(model="any", prompt=PROMPT, max_tokens=12, seed=2, logprobs=3)
    streamed = client.completions.create(model="any", prompt=PROMPT, max_tokens=12, seed=2, logprobs=3, stream=True)
    whole = answer.choices[0].logprobs
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for part in parts for entry in getattr(part, name)] == getattr(whole, name)
    assert whole.token_logprobs == [token.logprob for token in expected.logprobs]
    assert "".join(whole.tokens) == model.decode(expected.token_ids)  # special tokens spelled out
    starts = [len(model.decode(expected.token_ids[:i], skip_special_tokens=True)) for i in range(len(whole.tokens))]
    assert whole.text_offset == starts
    for found, token in zip(whole.top_logprobs, expected.logprobs, strict=True):
        wanted = {model.decode(i): value for i, value in reversed([*token.top])}
        assert found == {**wanted, model.decode(token.token_id): token.logprob}


def test_echo_scores_the_prompt(client: Any, model: fixmin_cpp.Model) -> None:
    text = "the abc the a"
    score = model.score(text)
    for max_tokens in (0, 3):
        answer = client.completions.create(
            model="any", prompt=text, max_tokens=max_tokens, temperature=0, echo=True, logprobs=1
        )
        (choice,) = answer.choices
        assert choice.text == text + model.generate(text, max_new_tokens=3).text * (max_tokens > 0)
        n = len(score.token_ids)
        assert choice.logprobs.tokens[:n] == [model.decode(i) for i in score.token_ids]
        assert choice.logprobs.token_logprobs[0] is None
        np.testing.assert_array_equal(np.float32(choice.logprobs.token_logprobs[1:n]), score.logprobs)
        assert len(choice.logprobs.tokens) == n + max_tokens == len(choice.logprobs.text_offset)
        assert answer.usage.completion_tokens == max_tokens


def test_prompts_of_all_kinds(client: Any, model: fixmin_cpp.Model) -> None:
    texts = ["the", "abc a", "q"]
    ids = [model.encode(text) for text in texts]
    expected = [model.generate(text, max_new_tokens=8).text for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(model="any", prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert (
        client.completions.create(model="any", prompt=ids[1], max_tokens=8, temperature=0).choices[0].text
        == expected[1]
    )


def test_n_and_best_of(client: Any, model: fixmin_cpp.Model) -> None:
    expected = model.generate(["the", "abc"], n=2, best_of=4, max_new_tokens=8, seed=9, **PLAIN)
    answer = client.completions.create(model="any", prompt=["the", "abc"], n=2, best_of=4, max_tokens=8, seed=9)
    assert [choice.text for choice in answer.choices] == [c.text for each in expected for c in each.candidates]
    assert answer.usage.completion_tokens > sum(len(c.token_ids) for each in expected for c in each.candidates)
    streamed = ["", "", ""]
    ends = set()
    for chunk in client.completions.create(model="any", prompt="the", n=3, max_tokens=8, seed=9, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            if choice.finish_reason:
                ends.add(choice.index)
    several = model.generate("the", n=3, max_new_tokens=8, seed=9, **PLAIN)
    assert streamed == [candidate.text for candidate in several.candidates]
    assert ends == {0, 1, 2}


def test_n_without_a_temperature_are_equal(client: Any, model: fixmin_cpp.Model) -> None:
    expected = [model.generate(prompt, max_new_tokens=8).text for prompt in ("the", "abc")]
    for given in ({"n": 3}, {"n": 3, "best_of": 4}):
        answer = client.completions.create(
            model="any", prompt=["the", "abc"], max_tokens=8, temperature=0, logprobs=1, **given
        )
        assert [choice.text for choice in answer.choices] == [expected[0]] * 3 + [expected[1]] * 3
        assert answer.choices[0].logprobs == answer.choices[2].logprobs
        assert answer.usage.completion_tokens > 2 * 8
    (alone,) = client.completions.create(model="any", prompt="the", best_of=2, max_tokens=8, temperature=0).choices
    assert alone.text == expected[0]
    streamed = ["", ""]
    for chunk in client.completions.create(
        model="any", prompt="the", n=2, max_tokens=8, temperature=0, stream=True, extra_body={"min_p": 0.1}
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [expected[0]] * 2
    messages = [{"role": "user", "content": "the"}]
    chat = client.chat.completions.create(model="any", messages=messages, n=2, max_tokens=8, temperature=0)
    assert chat.choices[0].message.content == chat.choices[1].message.content


def test_stop(client: Any, model: fixmin_cpp.Model) -> None:
    whole = model.generate(PROMPT, max_new_tokens=40, seed=4, ignore_eos=True, **PLAIN).text
    stop = whole[10:12]
    answer = client.completions.create(
        model="any", prompt=PROMPT, max_tokens=40, seed=4, stop=[stop, "zzzz"], extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == whole[: whole.find(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_chat(client: Any, model: fixmin_cpp.Model) -> None:
    messages = [
        {"role": "system", "content": "talk."},
        {"role": "user", "content": [{"type": "text", "text": "the"}]},
        {"role": "assistant", "content": "abc"},
        {"role": "user", "content": "a?"},
    ]
    prompt = "talk.\nQuestion: the\nAnswer: abc\nQuestion: a?\nAnswer:"
    arguments = {"max_new_tokens": 20, "seed": 6, "stop": ["\nQuestion:"], **PLAIN}
    expected = model.generate(prompt, logprobs=2, **arguments)
    answer = client.chat.completions.create(
        model="any", messages=messages, max_completion_tokens=20, seed=6, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert [token.logprob for token in choice.logprobs.content] == [token.logprob for token in expected.logprobs]
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * len(expected.token_ids)
    stream = client.chat.completions.create(model="any", messages=messages, max_tokens=20, seed=6, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected.text


def test_template_of_the_operator(served_path: Path, start: Start, tmp_path: Path, model: fixmin_cpp.Model) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m.role[0] }}: {{ m.content }}! {% endfor %}a:")
    with start(served_path, "--chat-template", str(file)) as server:
        answer = server.post(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "the"}], "max_tokens": 5, "temperature": 0},
        ).json()
    assert answer["choices"][0]["message"]["content"] == model.generate("u: the! a:", max_new_tokens=5).text


def test_embeddings(client: Any, model: fixmin_cpp.Model) -> None:
    texts = ["the", "abc a"]
    states = [model.hidden_states(text, model.info["block_count"]).astype(np.float64).mean(0) for text in texts]
    for options in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model="any", input=texts, **options)
        found = np.array([entry.embedding for entry in answer.data])
        np.testing.assert_allclose(found, states, rtol=1e-6, atol=1e-6)
        assert answer.usage.total_tokens == sum(len(model.encode(text)) for text in texts)


def test_models(client: Any) -> None:
    assert [entry.id for entry in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_cancelled_stream_frees_its_place(long_path: Path, start: Start) -> None:
    with start(long_path) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
        stream = made.completions.create(
            model="any", prompt="the", max_tokens=90_000, stream=True, extra_body={"ignore_eos": True}
        )
        for _, chunk in zip(range(5), stream, strict=False):
            assert chunk.choices[0].finish_reason is None
        assert server.metric("llamacpp:requests_processing") == 1
        stream.close()
        assert server.idle()
        assert server.metric("llamacpp:tokens_predicted_total") < 60_000


def test_cancelled_whole_answer_frees_its_place(long_path: Path, start: Start) -> None:
    async def give_up(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
            body = {"ignore_eos": True}
            asking = made.completions.create(model="any", prompt="the", max_tokens=90_000, extra_body=body)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asking, 1.0)

    with start(long_path) as server:
        asyncio.run(give_up(server.url))
        assert server.idle()
        assert server.metric("llamacpp:tokens_predicted_total") < 60_000


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": "a" * 300}, "prompt"),
        ({"prompt": "a", "max_tokens": -5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 1000}, "n"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
        ({"prompt": "a", "best_of": 3, "stream": True}, "best_of"),
        ({"prompt": "a", "logprobs": 1000}, "logprobs"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"100000": 1}}, "logit_bias"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "regex": "("}, None),
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({"prompt": "a", "max_tokens": 1, "max_new_tokens": 2}, "max_tokens"),
        ({"prompt": 3}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_errors_are_400_and_name_what(client: Any, body: dict[str, Any], part: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", cast_to=object, body=body)
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.body["message"]
    if part is not None:
        assert part in caught.value.body["message"]
        assert caught.value.body["param"] == part


def test_too_long_a_prompt_has_openais_code(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="any", prompt="q" * 1000)
    assert caught.value.body["code"] == "context_length_exceeded"


def test_unknown_path_and_method(client: Any, server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        client.post("/nothing", cast_to=object, body={})
    assert server.get("/v1/completions").status_code == 405
    assert server.get("/v1/completions").json()["error"]["type"] == "invalid_request_error"


# --- others ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_litellm(server: Server, model: fixmin_cpp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # asks nobody for prices
    litellm = pytest.importorskip("litellm")
    where = {"api_base": f"{server.url}/v1", "api_key": "none"}
    answer = litellm.text_completion(
        model="text-completion-openai/toy", prompt=PROMPT, max_tokens=12, temperature=0, **where
    )
    assert answer.choices[0].text == model.generate(PROMPT, max_new_tokens=12).text
    chat = litellm.completion(
        model="openai/toy", messages=[{"role": "user", "content": "the"}], max_tokens=12, temperature=0, **where
    )
    prompt = "Question: the\nAnswer:"
    assert chat.choices[0].message.content == model.generate(prompt, max_new_tokens=12, stop="\nQuestion:").text


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_local_completions(bytes_path: Path, start: Start, tmp_path: Path) -> None:
    """Loglikelihoods through HTTP are those of the in-process class."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, "1")
    pytest.importorskip("lm_eval")
    transformers = pytest.importorskip("transformers")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from fixmin_cpp.lm_eval_model import FixMinLM

    tokenizer = byte_level()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "tok")
    pairs = [("the ", "abc"), ("Qu", "a the"), ("日本", "é"), ("the the the", " t")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    with start(bytes_path) as server:
        remote = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="toy",
            tokenizer=str(tmp_path / "tok"),
            tokenizer_backend="huggingface",
            num_concurrent=1,
            batch_size=2,
            max_length=200,
        )
        over_http = remote.loglikelihood(requests, disable_tqdm=True)
    here = FixMinLM(pretrained=str(bytes_path))
    in_process = here.loglikelihood(requests, disable_tqdm=True)
    for (far, far_greedy), (near, near_greedy) in zip(over_http, in_process, strict=True):
        assert math.isclose(far, near, rel_tol=1e-6)
        assert far_greedy == near_greedy
