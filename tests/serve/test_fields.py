"""What single fields of a request mean, and what is accepted without a meaning; docs/serving.md, "Fields"."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Server, httpx, serving
from toy_models import SPECIALS, byte_fallback, byte_level, write_model

import fixmin_cpp

serve = pytest.importorskip("fixmin_cpp.serve")

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
MESSAGES = [{"role": "user", "content": "the"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def ask(server: Server, path: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    given = {"messages": MESSAGES} if path == CHAT else {"prompt": "the a"}
    answer = server.post(path, {"max_tokens": 4, **given, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(server: Server, path: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    given = {"messages": MESSAGES} if path == CHAT else {"prompt": "the a"}
    answer = server.post(path, {"max_tokens": 4, **given, **fields})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a stream, in their order."""
    answer = server.post(COMPLETIONS, {"stream": True, **fields})
    assert answer.status_code == 200, answer.text
    data = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    return [choice for one in data[:-1] for choice in json.loads(one)["choices"]]


def joined(choices: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """What a whole answer would have."""
    mine = [choice for choice in choices if choice["index"] == index]
    lists: dict[str, list[Any]] = {}
    for choice in mine:
        for name, values in (choice["logprobs"] or {}).items():
            lists.setdefault(name, []).extend(values)
    return {"text": "".join(choice["text"] for choice in mine), "logprobs": lists or None}


# --- echo and log-probabilities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 0}, {"n": 3, "temperature": 1.0}, {"prefix_cache": False}])
def test_a_streamed_echo_has_what_a_whole_one_has(server: Server, fields: dict[str, Any]) -> None:
    body = {"echo": True, "logprobs": 2, "max_tokens": 5, "seed": 3, **fields}
    for prompt in ("the abc the a", ["the", "abc q"]):
        whole = server.post(COMPLETIONS, {"prompt": prompt, **body}).json()
        streamed = events(server, prompt=prompt, **body)
        for choice in whole["choices"]:
            got = joined(streamed, choice["index"])
            assert got == {"text": choice["text"], "logprobs": choice["logprobs"]}


@pytest.mark.parametrize("logprobs", [1, None])
def test_ids_of_an_echoed_prompt(server: Server, model: fixmin_cpp.Model, logprobs: int | None) -> None:
    body = {"prompt": ["the abc", "the q"], "echo": True, "max_tokens": 2, "return_token_ids": True}
    body["logprobs"] = logprobs
    wanted = [model.encode(prompt) for prompt in body["prompt"]]
    assert [choice["prompt_token_ids"] for choice in server.post(COMPLETIONS, body).json()["choices"]] == wanted
    openings = {
        choice["index"]: choice["prompt_token_ids"] for choice in events(server, **body) if "prompt_token_ids" in choice
    }
    assert [openings[i] for i in range(2)] == wanted


def test_two_names_of_one_field_are_named_as_they_were_given(server: Server) -> None:
    body = {"prompt": "a", "n_predict": 3, "max_tokens": 5}
    error = server.post(COMPLETIONS, body).json()["error"]["message"]
    assert error == "n_predict and max_tokens are the same: give one"


def test_an_end_of_text_token_has_its_entry(server: Server, model: fixmin_cpp.Model) -> None:
    """Forced by a bias, which log-probabilities do not see: they are the model's."""
    end = model.info["eos_token_id"]
    prompt = "the abc the"
    ids = model.encode(prompt)
    scored = model.score([*ids, end]).logprobs
    for fields in ({}, {"logit_bias": {str(end): 1000}, "seed": 5}):
        body = {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, **fields}
        (choice,) = server.post(COMPLETIONS, body).json()["choices"]
        lists = choice["logprobs"]
        assert {len(values) for values in lists.values()} == {len(ids) + 1}
        assert joined(events(server, **body))["logprobs"] == lists
        if fields:
            assert choice["finish_reason"] == "stop"
            assert choice["text"] == prompt
            assert lists["tokens"][-1] == "</s>"
            np.testing.assert_array_equal(np.float32(lists["token_logprobs"][1:]), scored)
    without = {"prompt": prompt, "max_tokens": 9, "logprobs": 1, "logit_bias": {str(end): 1000}}
    answer = server.post(COMPLETIONS, without).json()
    assert answer["choices"][0]["logprobs"]["tokens"] == ["</s>"]
    assert answer["usage"]["completion_tokens"] == 1
    least = server.post(COMPLETIONS, {**without, "echo": True, "min_tokens": 3, "temperature": 0}).json()
    assert least["choices"][0]["logprobs"]["tokens"][-1] == "</s>"
    assert least["usage"]["total_tokens"] == len(least["choices"][0]["logprobs"]["tokens"]) == len(ids) + 4


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_entries_are_the_tokens_own(make: Any, tmp_path: Path) -> None:
    """Nothing depends on how many are asked for, no two tokens share a key, and bytes are those of the token."""
    tokenizer = make()
    path = write_model(tmp_path / "model.gguf", tokenizer, context_length=128)
    ids = list(range(4, tokenizer.get_vocab_size(), 11))  # among them many that end within a character
    with serving(path, tmp_path / "log") as server, fixmin_cpp.Model(path) as model:
        wanted = model.generate(ids, max_new_tokens=6, seed=1, logprobs=20, **PLAIN)
        body = {"prompt": ids, "max_tokens": 6, "seed": 1, "echo": True}
        lists = {
            n: server.post(COMPLETIONS, {**body, "logprobs": n}).json()["choices"][0]["logprobs"] for n in (0, 1, 5, 20)
        }
        chat = {"messages": MESSAGES, "max_tokens": 6, "seed": 1, "logprobs": True, "top_logprobs": 20}
        tokens = server.post(CHAT, chat).json()["choices"][0]["logprobs"]["content"]
    for n, found in lists.items():
        assert found["token_logprobs"] == lists[20]["token_logprobs"]
        assert found["tokens"] == lists[20]["tokens"]
        for token, own, top, most in zip(
            found["tokens"][1:],
            found["token_logprobs"][1:],
            found["top_logprobs"][1:],
            lists[20]["top_logprobs"][1:],
            strict=True,
        ):
            assert top[token] == own
            assert len(top) in (n, n + 1)
            assert top.items() <= {**most, token: own}.items()
    assert lists[20]["token_logprobs"][len(ids) :] == [token.logprob for token in wanted.logprobs or ()]
    single = {tokenizer.decode([i], skip_special_tokens=False): i for i in range(tokenizer.get_vocab_size())}
    for entry in [other for token in tokens for other in (token, *token["top_logprobs"])]:
        data = bytes(entry["bytes"])
        if not entry["token"].startswith(("bytes:", "token_id:")):
            assert entry["token"].encode() == data
            assert entry["token"].strip(" ") in {text.strip(" ") for text in single}
        elif entry["token"].startswith("bytes:"):
            with pytest.raises(UnicodeDecodeError):
                data.decode()
    assert all(len({entry["token"] for entry in token["top_logprobs"]}) == 20 for token in tokens)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_of_tokens_make_the_text(make: Any) -> None:
    from fixmin_cpp.openai_api.token_names import TokenNames
    from fixmin_cpp.tokenizer import TextTokenizer

    tokenizer = make()
    names = TokenNames(TextTokenizer(tokenizer), tokenizer.get_vocab_size() + 3)
    every = [names.name(i) for i in range(tokenizer.get_vocab_size() + 3)]
    assert len(set(every)) == len(every)
    text = "a cat Paris 日本 é😀" if make is byte_level else "日本é😀"
    data = b"".join(bytes(names.bytes(i) or ()) for i in tokenizer.encode(text).ids)
    assert data.decode() == text
    for special in SPECIALS[:3]:
        assert names.name(tokenizer.token_to_id(special)) == special


@pytest.mark.external
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_over_http_is_lm_eval_in_process(demo_path: Path, demo_server: Server, tmp_path: Path) -> None:
    """On questions whose answers end the text: what the harness takes for the generated token must be there."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, "1")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    from fixmin_cpp.lm_eval_model import FixMinLM

    towns = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
    rows = [
        {
            "question": f"Question: What is the capital of {country}?\nAnswer:",
            "choices": list(towns.values()),
            "answer": i,
        }
        for i, country in enumerate(towns)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "capitals.yaml").write_text(
        f"""task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
    )
    remote = LocalCompletionsAPI(
        base_url=f"{demo_server.url}{COMPLETIONS}",
        model="demo",
        tokenizer=str(Path(__file__).parents[2] / "examples" / "demo" / "affine"),
        tokenizer_backend="huggingface",
        num_concurrent=1,
        max_length=200,
    )
    here = FixMinLM(pretrained=str(demo_path))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    far, near = (
        lm_eval.simple_evaluate(model=one, tasks=["capitals"], task_manager=tasks, bootstrap_iters=0, log_samples=True)
        for one in (remote, here)
    )
    here.model.close()
    assert far["results"]["capitals"]["acc,none"] == near["results"]["capitals"]["acc,none"] == 1.0
    for one, other in zip(far["samples"]["capitals"], near["samples"]["capitals"], strict=True):
        for (a, a_greedy), (b, b_greedy) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert float(a) == pytest.approx(float(b), rel=1e-6)
            assert str(a_greedy) == str(b_greedy)


# --- fields that ask for nothing, and types --------------------------------------------------------------------------

NO_OPS: list[dict[str, Any]] = [
    {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "k"},
    {"parallel_tool_calls": True, "tool_choice": "none", "tools": [], "functions": None, "function_call": "none"},
    {"modalities": ["text"], "prediction": None, "reasoning_effort": "low", "user": "me", "audio": None},
    {"skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False},
    {"request_id": "a", "priority": 0, "length_penalty": 1.0, "guided_json": None, "truncate_prompt_tokens": None},
    {"prompt_logprobs": None, "stop_regex": None, "details": False, "watermark": False, "top_n_tokens": 0},
    {"id_slot": -1, "n_keep": 0, "tfs_z": 1, "n_probs": 0, "cache_prompt": True, "samplers": None},
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_no_ops_change_nothing(server: Server, path: str) -> None:
    expected = ask(server, path, seed=1)["choices"]
    for fields in NO_OPS:
        assert ask(server, path, seed=1, **fields)["choices"] == expected


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_null_stands_for_a_field_that_is_not_given(server: Server, path: str) -> None:
    from fixmin_cpp.serve import schemas

    optional = {f for f, field in schemas.BODIES[path].model_fields.items() if not field.is_required()}
    given = {"max_tokens": 4, "seed": 1}
    expected = ask(server, path, **given)["choices"]
    assert ask(server, path, **{**dict.fromkeys(optional), **given})["choices"] == expected


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"temprature": None}, "temprature", "did you mean 'temperature'"),
        ({"metdata": {}}, "metdata", "did you mean 'metadata'"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"skip_special_tokens": False}, "skip_special_tokens", "not supported"),
        ({"guided_regex": "a"}, "guided_regex", "not supported"),
        ({"n": True}, "n", "integer"),
        ({"n": "1"}, "n", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": False}, "temperature", "number"),
        ({"stream": 1}, "stream", "True or False"),
        ({"stream": "false"}, "stream", "True or False"),
        ({"stop": [1]}, "stop", "must be a str"),
        ({"logit_bias": {"5": True}}, "logit_bias", "number"),
        ({"stop_token_ids": [True]}, "stop_token_ids", "integer"),
        ({"seed": 2**64}, "seed", "seed must be"),
        ({"dry_sequence_breakers": "x"}, "dry_sequence_breakers", "list"),
        ({"max_tokens": 3, "max_new_tokens": 5}, "max_tokens", "give one"),
    ],
)
def test_what_is_wrong_is_named(server: Server, fields: dict[str, Any], param: str, words: str) -> None:
    for path in (COMPLETIONS, CHAT):
        error = refused(server, path, **fields)
        assert words in error["message"], error
        assert error["param"] == param
        assert "Value error" not in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt": ["the", "\ud800"]}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"response_format": {"type": "json_schema", "schema": {"uniqueItems": True}}}, "response_format"),
        (COMPLETIONS, {"json_schema": {"uniqueItems": True}}, "json_schema"),
        (COMPLETIONS, {"min_tokens": 9}, "min_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "the " * 300}]}, "messages"),
        (CHAT, {"response_format": {"type": "json_schema", "schema": {"type": "no"}}}, "response_format"),
        ("/tokenize", {"content": "\ud800"}, "content"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/codes", {"text": "\ud800"}, "text"),
        ("/v1/embeddings", {"input": ["the", "\ud800"]}, "input"),
    ],
)
def test_the_callers_own_field_is_named(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    given = {"messages": MESSAGES, "max_tokens": 4} if path == CHAT else {}
    given = {"prompt": "the", "max_tokens": 4} if path == COMPLETIONS else given
    body = json.dumps({**given, **fields}).encode()
    answer = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
    assert "<" not in answer.json()["error"]["message"]  # the name of a form


def test_the_places_of_wrong_elements(server: Server) -> None:
    assert refused(server, prompt=[1, "a"])["message"].startswith("prompt[1] must be an integer")
    assert refused(server, prompt=[[1], [1.5]])["message"].startswith("prompt[1][0] must be an integer")
    assert refused(server, stop=["a", 1])["message"].startswith("stop[1] must be a str")
    messages = [{"role": "user", "content": [{"type": "text"}]}]
    assert refused(server, CHAT, messages=messages)["message"].startswith("messages[0].content[0].text ")


def test_booleans_are_no_ids_and_no_counts(server: Server) -> None:
    assert refused(server, prompt=[True, False])["param"] == "prompt"
    assert refused(server, prompt=[[1, True]])["param"] == "prompt"
    assert "integer" in refused(server, prompt=[1, True])["message"]
    assert ask(server, logprobs=False)["choices"][0]["logprobs"] is None
    assert "true is for chats" in refused(server, logprobs=True)["message"]
    assert ask(server, CHAT, logprobs=False, top_logprobs=0)["choices"][0]["logprobs"] is None
    assert refused(server, CHAT, logprobs=1)["param"] == "logprobs"
    for path in ("/v1/embeddings", "/detokenize", "/codes"):
        field = {"/v1/embeddings": "input"}.get(path, "tokens")
        assert server.post(path, {field: [True]}).status_code == 400
    assert server.post("/v1/embeddings", {"input": "the", "encoding_format": None, "user": None}).status_code == 200


def test_images_are_refused_by_name(server: Server) -> None:
    for part in ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio", "input_audio": {}}):
        content = [{"type": "text", "text": "the"}, part]
        error = refused(server, CHAT, messages=[{"role": "user", "content": content}])
        assert f"{part['type']} is not supported" in error["message"]
        assert error["param"] == "messages"


# --- what fields mean ------------------------------------------------------------------------------------------------


def test_all_and_only_the_first(server: Server, model: fixmin_cpp.Model) -> None:
    given = {"max_tokens": 12, "seed": 4}
    wanted = ask(server, **given)["choices"]
    assert ask(server, **given, top_k=-1)["choices"] == wanted
    assert ask(server, **given, top_k=0)["choices"] == wanted
    greedy = model.generate("the a", max_new_tokens=12).text
    for top_p in (0, 0.0):
        assert ask(server, **given, top_p=top_p, temperature=1.5)["choices"][0]["text"] == greedy
    both = ask(server, CHAT, max_tokens=9, max_completion_tokens=3, ignore_eos=True)
    assert both["usage"]["completion_tokens"] == 3
    assert ask(server, CHAT, max_tokens=3, max_completion_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3
    assert ask(server, max_tokens=None, n_predict=5, ignore_eos=True)["usage"]["completion_tokens"] == 5
    full = ask(server, max_tokens=None, n_predict=-1, ignore_eos=True)["usage"]["total_tokens"]
    assert full == model.info["n_ctx"]


def test_seeds(server: Server) -> None:
    """-1 is a random one; whatever is given, the seed of the answer is exact in every reader of JSON and repeats it."""
    random = [ask(server, max_tokens=24, seed=-1)["choices"][0] for _ in range(3)]
    assert len({choice["seed"] for choice in random}) == 3
    assert len({choice["text"] for choice in random}) > 1
    for seed in (0, 7, -2, -(2**63), 2**53, 2**60, 2**61, 2**64 - 1):
        answer = ask(server, max_tokens=24, seed=seed, n=3)["choices"]
        assert ask(server, max_tokens=24, seed=seed, n=3)["choices"] == answer
        for choice in answer:
            assert 0 <= choice["seed"] < 2**53
            assert ask(server, max_tokens=24, seed=choice["seed"])["choices"][0]["text"] == choice["text"]
    first = [ask(server, max_tokens=24, seed=2**n)["choices"][0]["seed"] for n in range(53, 64)]
    assert len(set(first)) == 11


@pytest.mark.parametrize("fields", [{"presence_penalty": 2.0}, {"frequency_penalty": 0.7}])
def test_openais_penalties_count_what_was_generated(
    server: Server, model: fixmin_cpp.Model, fields: dict[str, float]
) -> None:
    """Step by step from the logits: all generated tokens, beyond llama.cpp's window of 64, and none of the prompt."""
    ids = model.encode("the abc the a the the the")
    generated: list[int] = []
    for _ in range(90):
        logits = np.float64(model.logits([*ids, *generated])[-1])
        for token, count in Counter(generated).items():
            logits[token] -= np.float32(count * fields.get("frequency_penalty", 0) + fields.get("presence_penalty", 0))
        logits[model.info["eos_token_id"]] = -np.inf
        generated.append(int(np.argmax(logits)))
    body = {"prompt": ids, "max_tokens": 90, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
    assert server.post(COMPLETIONS, body).json()["choices"][0]["token_ids"] == generated
    library = model.generate(ids, max_new_tokens=90, ignore_eos=True, openai_penalties=True, **fields)
    assert library.token_ids == generated
    windowed = server.post(COMPLETIONS, {**body, "repeat_last_n": 64}).json()["choices"][0]["token_ids"]
    assert windowed == model.generate(ids, max_new_tokens=90, ignore_eos=True, **fields).token_ids != generated


def test_stop_strings_wait_for_min_tokens(server: Server, model: fixmin_cpp.Model) -> None:
    whole = model.generate("the a", max_new_tokens=60, ignore_eos=True)
    stop = whole.text[1]
    early = ask(server, max_tokens=60, temperature=0, ignore_eos=True, stop=stop)
    assert early["choices"][0]["text"] == whole.text[: whole.text.index(stop)]
    body = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "stop": stop, "min_tokens": 20}
    (late,) = ask(server, **body, return_token_ids=True)["choices"]
    assert len(late["token_ids"]) >= 20
    passed = model.decode(whole.token_ids[:20], skip_special_tokens=True)
    rest = model.decode(whole.token_ids, skip_special_tokens=True)[len(passed) :]
    assert late["text"] == passed + rest.split(stop)[0]
    assert joined(events(server, prompt="the a", **body))["text"] == late["text"]


@pytest.mark.parametrize("stop", ["<s>", ["zz", "<s>"], "e<s>"])
def test_a_stop_string_may_be_a_special_token(server: Server, model: fixmin_cpp.Model, stop: Any) -> None:
    """Its text is not in the answer, but it ends it."""
    special = model.encode("<s>")
    assert len(special) == 1
    body = {"prompt": "the a", "temperature": 0, "max_tokens": 8, "return_token_ids": True}
    bias = {"logit_bias": {str(special[0]): 1000}, "stop": stop}
    (choice,) = server.post(COMPLETIONS, {**body, **bias}).json()["choices"]
    if stop == "e<s>":  # what stands before it must be there too
        assert choice["finish_reason"] == "length"
        return
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("", "stop", special)
    (other,) = server.post(COMPLETIONS, {**body, **bias, "stop": "</s>"}).json()["choices"]
    assert (other["text"], other["finish_reason"]) == ("", "length")
    chunks = events(server, **{**body, **bias})
    assert [c["finish_reason"] for c in chunks if c["finish_reason"]] == ["stop"]
    assert "".join(c["text"] for c in chunks) == ""


def test_breakers_as_json_text(server: Server) -> None:
    given = {"max_tokens": 20, "temperature": 0, "dry_multiplier": 1.0, "dry_allowed_length": 1}
    for breakers in ([], ["a"], ["\n", "t"]):
        as_list = ask(server, **given, seed=1, dry_sequence_breakers=breakers)["choices"]
        assert ask(server, **given, seed=1, dry_sequence_breakers=json.dumps(breakers))["choices"] == as_list


@pytest.fixture(scope="module")
def json_server(bytes_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(bytes_path, tmp_path_factory.mktemp("log") / "log") as started:
        yield started


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object"},
        {"type": "json_object", "schema": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}},
        {"type": "json_schema", "schema": {"type": "object", "maxProperties": 0}},
    ],
)
def test_a_response_format_gives_an_object(json_server: Server, form: dict[str, Any]) -> None:
    for seed in range(3):
        (choice,) = ask(json_server, CHAT, max_tokens=200, seed=seed, response_format=form)["choices"]
        assert choice["message"]["content"].lstrip().startswith("{")
        if choice["finish_reason"] == "stop":
            found = json.loads(choice["message"]["content"])
            assert isinstance(found, dict)
            assert form.get("schema", {}).get("required", []) <= list(found)


def test_many_texts_are_embedded(server: Server) -> None:
    """OpenAI takes 2,048, LangChain sends 1,000 at a time."""
    answer = server.post("/v1/embeddings", {"input": ["the", "abc", "q"] * 100})
    assert answer.status_code == 200, answer.text
    vectors = [entry["embedding"] for entry in answer.json()["data"]]
    assert len(vectors) == 300
    assert vectors[:3] * 100 == vectors
