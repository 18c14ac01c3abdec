"""Batch jobs in this process: every record against the model alone, and jobs that are ended at any moment."""

import fcntl
import json
import os
import pty
import re
import resource
import signal
import subprocess
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from batch_jobs import PROMPTS, mixed_lines, records, run_job, wait_for_lines, write_lines
from fixmin_cli import FIXMIN, TIMEOUT, fixmin
from toy_models import byte_level, write_model

import fixmin_cpp
from fixmin_cpp.batch import BatchReport
from fixmin_cpp.batch_lines import InputFile, Line, Settings
from fixmin_cpp.batch_output import OutputFile
from fixmin_cpp.batch_work import ModelFile, run_lines
from fixmin_cpp.errors import FixminError
from fixmin_cpp.load_options import LoadOptions

OPENAI = {"custom_id": "x", "method": "POST", "url": "/v1/completions"}


@pytest.fixture(scope="module")
def slow_model_path(folder: Path) -> Path:
    """A job of a few hundred lines takes it seconds."""
    return write_model(folder / "slow.gguf", byte_level(), embedding_length=128, block_count=6, context_length=256)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_each_line_gets_what_generate_gives(model, tmp_path, out):
    arguments = [
        {},
        {"max_new_tokens": 5, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "seed": 7, "ignore_eos": True},
    ]
    arguments.append({"max_new_tokens": 9, "stop": ["e", "th"], "temperature": 1.3, "seed": 2**64 - 1})
    lines = [{"id": [i], "prompt": PROMPTS[i % 6], **arguments[i % 3]} for i in range(18)]
    lines.append({"prompt": model.encode("the cat"), "max_new_tokens": 4})
    report = run_job(model.path, write_lines(tmp_path / "in", lines), out, token_ids=True, n_parallel=5)
    for number, (line, record) in enumerate(zip(lines, records(out), strict=True), 1):
        own = {name: value for name, value in line.items() if name not in ("id", "prompt")}
        expected = model.generate(line["prompt"], **own)
        n_prompt = expected.timings.n_prompt
        n_new = len(expected.token_ids) + (expected.finish_reason == "eos")
        seed = record.pop("seed")
        assert seed == own.get("seed", seed)
        assert record == {
            "id": line.get("id", number),
            "line": number,
            "text": expected.text,
            "token_ids": expected.token_ids,
            "finish_reason": expected.finish_reason,
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new},
            "error": None,
        }
    assert (report.n_lines, report.n_done, report.n_errors, report.n_resumed) == (19, 19, 0, 0)
    assert report.completion_tokens == sum(record["usage"]["completion_tokens"] for record in records(out))
    assert not out.with_name("out.jsonl.resume").exists()


def test_lines_without_a_seed_get_one_from_the_job_and_their_number(model, tmp_path, out):
    source = write_lines(tmp_path / "in", [{"prompt": "the cat", "max_new_tokens": 12}] * 20)
    jobs = []
    for seed in (0, 0, 1):
        run_job(model.path, source, out, options={"temperature": 1.0}, seed=seed, token_ids=True, overwrite=True)
        jobs.append(records(out))
    assert jobs[0] == jobs[1]
    seeds = {record["seed"] for job in jobs[1:] for record in job}
    assert len(seeds) == 40
    assert max(seeds) < 2**53
    for record in jobs[2]:
        alone = model.generate("the cat", max_new_tokens=12, temperature=1.0, seed=record["seed"])
        assert record["token_ids"] == alone.token_ids


def test_options_count_for_lines_that_do_not_say_otherwise(model, tmp_path, out):
    lines = [{"prompt": "a"}, {"prompt": "a", "max_new_tokens": 3, "ignore_eos": False}, {"prompt": "a", "stop": None}]
    options = {"max_new_tokens": 8, "ignore_eos": True}
    run_job(model.path, write_lines(tmp_path / "in", lines), out, options=options)
    texts = [model.generate("a", **{**options, **own}).text for own in ({}, {"max_new_tokens": 3}, {})]
    assert [record["text"] for record in records(out)] == texts


def test_positions_of_the_cache(model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", [{"prompt": "a", "max_new_tokens": 2}])
    failed = fixmin("batch", source, out, "-m", model_path, "--n-kv", 2_000_000_000)
    assert failed.returncode == 1
    assert re.search(rb"n_kv is 2000000000: such a cache takes \d+ bytes, more than all the memory, \d+", failed.stderr)
    assert fixmin("batch", source, out, "-m", model_path, "--n-kv", 4096).returncode == 0


def test_openai_lines(model, tmp_path, out):
    bodies = [
        {"model": "m", "prompt": "the cat", "max_tokens": 6, "temperature": 0, "n": 1, "user": "u", "stop": None},
        {"prompt": ["the cat", "ab"], "seed": 5, "top_p": 0.9, "stream": False, "logit_bias": {}},
        {"prompt": [[1, 2, 3], [4]], "max_tokens": 4, "temperature": 0},
    ]
    lines = [{**OPENAI, "custom_id": f"c{i}", "body": body} for i, body in enumerate(bodies)]
    run_job(model.path, write_lines(tmp_path / "in", lines), out, token_ids=True)
    first, second, third = records(out)
    alone = model.generate("the cat", max_new_tokens=6)
    usage = {"prompt_tokens": alone.timings.n_prompt, "completion_tokens": 6}
    reason = {"eos": "stop"}.get(alone.finish_reason, alone.finish_reason)
    choice = {"index": 0, "text": alone.text, "logprobs": None, "finish_reason": reason, "token_ids": alone.token_ids}
    choice["seed"] = first["response"]["body"]["choices"][0]["seed"]
    body = {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [choice]}
    body["usage"] = {**usage, "total_tokens": sum(usage.values())}
    response = {"status_code": 200, "request_id": "req_1", "body": body}
    assert first == {"id": "batch_req_1", "custom_id": "c0", "response": response, "error": None}
    # What OpenAI's completions are without these fields: 16 tokens, temperature 1.
    for choice, prompt in zip(second["response"]["body"]["choices"], ["the cat", "ab"], strict=True):
        alone = model.generate(prompt, seed=5, top_p=0.9, max_new_tokens=16, temperature=1.0, top_k=0, min_p=0)
        assert (choice["text"], choice["seed"]) == (alone.text, 5)
    for choice, ids in zip(third["response"]["body"]["choices"], [[1, 2, 3], [4]], strict=True):
        assert choice["token_ids"] == model.generate(ids, max_new_tokens=4).token_ids


def test_a_stop_token_is_called_stop_in_openai_lines(model_path, model, tmp_path, out):
    ids = model.generate("the cat", max_new_tokens=3, ignore_eos=True).token_ids
    path = write_model(tmp_path / "ends.gguf", byte_level(), eos_id=ids[2])
    with fixmin_cpp.Model(path) as ends:
        expected = ends.generate("the cat", max_new_tokens=20)
    assert expected.finish_reason == "eos"
    body = {"prompt": "the cat", "max_tokens": 20, "temperature": 0}
    run_job(path, write_lines(tmp_path / "in", [{**OPENAI, "body": body}, {"prompt": "the cat"}]), out)
    openai, native = records(out)
    assert openai["response"]["body"]["choices"][0]["finish_reason"] == "stop"
    assert native["finish_reason"] == "eos"
    # It was generated too: usage counts it as the server's does.
    n_prompt, n_new = expected.timings.n_prompt, len(expected.token_ids) + 1
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
    assert openai["response"]["body"]["usage"] == native["usage"] == usage


def test_openai_lines_with_a_response_format(model, tmp_path, out):
    """As the server reads it; test_batch_answers.py compares the two."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}}}
    bodies = [
        {"prompt": "the", "max_tokens": 100, "response_format": form},
        {"prompt": "the", "max_tokens": 100, "response_format": {"type": "xml"}},
        {"prompt": "the", "max_tokens": 5, "response_format": {"type": "json_object"}},
    ]
    run_job(model.path, write_lines(tmp_path / "in", [{**OPENAI, "body": body} for body in bodies]), out)
    first, second, third = (record["response"]["body"] for record in records(out))
    assert json.loads(first["choices"][0]["text"])["a"] in ("x", "y")
    assert "response_format.type must be" in second["error"]["message"]
    assert third["choices"][0]["text"].startswith("{")


# A line, its id in the record, and what the record says of it.
BAD = [
    (b'{"prompt": "a"\n', 2, "not JSON"),
    (b'{"prompt": "a", "temperature": NaN}\n', 2, "NaN is not a JSON number"),
    (b'{"prompt": "\xff"}\n', 2, "not UTF-8: byte 0xff at column 13"),
    (b'{"id": "x", "prompt": "\\ud83d"}\n', "x", "surrogate"),
    (b'{"id": "\\ud83d", "prompt": "a"}\n', 2, "surrogate"),
    (b'{"id": 1e999, "prompt": "a"}\n', 2, "a number beyond those of doubles"),
    (b'{"id": [-1e999], "prompt": 5}\n', 2, "a number beyond those of doubles"),
    (b'{"id": "x", "prompt": "a", "temperature": 1e400}\n', "x", "a number beyond those of doubles"),
    (b'{"custom_id": "x", "body": {"prompt": "a", "model": {"a": 1e999}}}\n', "x", "a number beyond those of doubles"),
    (b'{"custom_id": 1e999, "body": {"prompt": "a"}}\n', None, "a number beyond those of doubles"),
    (b'{"custom_id": "x", "body": {"prompt": "\\ud800"}}\n', "x", "surrogate"),
    (b"[" * 100_000 + b"\n", 2, "nested too deeply"),
    (b'{"seed": ' + b"9" * 10_000 + b', "prompt": "a"}\n', 2, "not JSON"),
    (b'["prompt"]\n', 2, "must be a JSON object, got list"),
    (b'{"id": ' + b"[" * 101 + b"]" * 101 + b', "prompt": "a"}\n', 2, "lists or objects more than 100 deep"),
    (b'{"id": "x", "prompt": ' + b"[" * 400 + b"]" * 400 + b"}\n", "x", "more than 100 deep"),
    ({"id": "x", "prompt": [["a b"]]}, "x", "got lists of them in a list"),
    ({"id": "x", "prompt": [[[5, 6]]]}, "x", "got lists of them in a list"),
    ({"id": "x", "prompt": [{"input_ids": [[5], [6]]}]}, "x", "prompt"),
    ({"id": "x"}, "x", "prompt is missing"),
    ({"id": "x", "prompt": None}, "x", "prompt is missing"),
    ({"id": "x", "prompt": ""}, "x", "prompt is empty"),
    ({"id": "x", "prompt": ["a", "b"]}, "x", "got 2 prompts"),
    ({"id": "x", "prompt": 5}, "x", "prompt must be"),
    ({"id": "x", "prompt": [1, 10**6]}, "x", "prompt[1] is 1000000"),
    ({"id": "x", "prompt": [1] * 10_000}, "x", "the context holds"),
    ({"id": "x", "prompt": "a", "max_tokens": 4}, "x", "there is no argument 'max_tokens'"),
    ({"id": "x", "prompt": "a", "temperature": "hot"}, "x", "temperature must be a number"),
    ({"id": "x", "prompt": "a", "seed": -2}, "x", "seed must be between"),
    ({"id": "x", "prompt": "a", "stop": [""]}, "x", "stop[0] must not be empty"),
    ({**OPENAI, "url": "/v1/embeddings", "body": {}}, "x", "/v1/embeddings"),
    ({**OPENAI, "url": "/v1/chat/completions", "body": {}}, "x", "messages is missing"),
    ({**OPENAI, "method": "GET", "body": {"prompt": "a"}}, "x", "method must be POST"),
    ({**OPENAI, "body": [1]}, "x", "body must be an object"),
    ({**OPENAI, "custom_id": 5, "body": {"prompt": "a"}}, 5, "custom_id must be a text"),
    ({**OPENAI, "body": {"prompt": "a"}, "priority": 1}, "x", "there is no field 'priority'"),
    ({**OPENAI, "body": {"prompt": "a", "n": 0}}, "x", "n must be at least 1"),
    ({**OPENAI, "body": {"prompt": "a", "stream": True}}, "x", "stream: not supported"),
    ({"id": "x", "prompt": "a", "logit_bias": {"b": 1}}, "x", "logit_bias key must be an integer"),
    ({"id": "x", "prompt": "a", "logit_bias": {"9" * 5000: 1}}, "x", "logit_bias key must be an integer"),
    ({"id": "x", "prompt": "a", "repeat_penalty": 2, "repetition_penalty": 2}, "x", "are one argument"),
    ({"id": "x", "prompt": "a", "allowed_ids": [10**6]}, "x", "allowed_ids[0] is 1000000"),
    ({"id": "x", "prompt": "a", "allowed_ids": [5], "banned_ids": [5]}, "x", "no token is left to draw"),
    ({**OPENAI, "body": {"prompt": "a", "tools": [{}]}}, "x", "tools: not supported"),
    ({**OPENAI, "body": {"max_tokens": 1}}, "x", "prompt is missing"),
]


def test_a_bad_line_gets_a_record_that_says_why(model, tmp_path, out):
    good = {"prompt": "the cat", "max_new_tokens": 3}
    for i, (bad, own_id, message) in enumerate(BAD):
        source = write_lines(tmp_path / f"in{i}", [good, bad, good])
        report = run_job(model.path, source, out, overwrite=True)
        before, record, after = records(out)
        assert report.n_errors == 1
        assert before["text"] == after["text"] == model.generate("the cat", max_new_tokens=3).text
        if "custom_id" in record:
            assert (record["custom_id"], record["id"], record["response"]["status_code"]) == (
                own_id,
                "batch_req_2",
                400,
            )
            reason = record["response"]["body"]["error"]["message"]
            assert reason.startswith("line 2: ")
        else:
            assert (record["id"], record["line"], record["error"]["line"]) == (own_id, 2, 2)
            reason = record["error"]["message"]
        assert message in reason
        assert report.first_error == f"{source}, line 2: {reason.removeprefix('line 2: ')}"


def test_lines_end_and_begin_as_files_have_them(model, tmp_path, out):
    (tmp_path / "in").write_bytes(b'\xef\xbb\xbf{"prompt":"a"}\r\n\r\n  \n{"prompt":"ab"}\n\n\n{"prompt":"the cat"}')
    report = run_job(model.path, tmp_path / "in", out, options={"max_new_tokens": 4})
    assert [(record["line"], record["id"]) for record in records(out)] == [(1, 1), (4, 4), (7, 7)]
    expected = [completion.text for completion in model.generate(["a", "ab", "the cat"], max_new_tokens=4)]
    assert [record["text"] for record in records(out)] == expected
    assert report.n_lines == 3


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_input_without_lines(model, tmp_path, out, content):
    (tmp_path / "in").write_bytes(content)
    assert run_job(model.path, tmp_path / "in", out).n_lines == 0
    assert list(tmp_path.glob("out*")) == [out]
    assert out.read_bytes() == b""


def test_scores_and_embeddings(model, tmp_path, out):
    lines = [{"id": i, "prompt": prompt} for i, prompt in enumerate(["the cat is", [1, 2, 3, 4], "x"])]
    source = write_lines(tmp_path / "in", lines)
    run_job(model.path, source, out, task="score")
    *scored, short = records(out)
    for line, record in zip(lines, scored, strict=False):
        score = model.score(line["prompt"])
        assert record["token_ids"] == score.token_ids
        assert np.array_equal(np.float32(record["logprobs"]), score.logprobs)
        assert (record["nll"], record["perplexity"]) == (score.nll, score.perplexity)
    assert "at least 2 tokens" in short["error"]["message"]
    report = run_job(model.path, source, out, task="embed", overwrite=True)
    for line, record in zip(lines, records(out), strict=True):
        states = model.hidden_states(line["prompt"], model.info["block_count"])
        assert np.array_equal(np.float32(record["embedding"]), states.astype(np.float64).mean(0).astype(np.float32))
        assert record["usage"]["prompt_tokens"] == len(states)
    assert report.tok_s > 0


def test_scores_take_no_generation_arguments(model, tmp_path, out):
    lines = [{"prompt": "ab", "max_new_tokens": 4}, {**OPENAI, "body": {"prompt": "ab"}}]
    assert run_job(model.path, write_lines(tmp_path / "in", lines), out, task="score").n_errors == 2
    first, second = records(out)
    assert "max_new_tokens" in first["error"]["message"]
    assert "score" in second["response"]["body"]["error"]["message"]


class Interrupt(Exception):
    """Ends a job where a test wants it."""


def interrupt(model_path: Path, source: Path, out: Path, n: int, **arguments: object) -> None:
    """Runs a job until the output has n records."""

    def stop(report: BatchReport) -> None:
        if report.n_done == n:
            raise Interrupt

    with pytest.raises(Interrupt):
        run_job(model_path, source, out, progress=stop, **arguments)


def test_a_job_goes_on_wherever_its_output_is_torn(model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", [b"\n", *mixed_lines(20), b"\n", {"prompt": "a"}])
    run_job(model_path, source, tmp_path / "whole")
    whole = records(tmp_path / "whole")
    interrupt(model_path, source, out, 12)
    assert records(out) == whole[:12]
    left = out.read_bytes()
    border = left[:-1].rindex(b"\n") + 1
    damaged = left[:border] + bytes(len(left) - border - 1) + b"\n" + b'{"line'
    for torn in [*(left[:n] for n in (0, 1, 30, border - 1, border, border + 1, len(left) - 1, len(left))), damaged]:
        if out.with_name("out.jsonl.resume").exists():
            sidecar = out.with_name("out.jsonl.resume").read_bytes()
        out.with_name("out.jsonl.resume").write_bytes(sidecar)
        out.write_bytes(torn)
        report = run_job(model_path, source, out)
        assert records(out) == whole
        assert report.n_resumed == (11 if torn == damaged else torn.count(b"\n"))
        assert report.n_errors == sum(i % 7 == 3 for i in range(20))
        assert not out.with_name("out.jsonl.resume").exists()


@pytest.mark.slow
def test_a_job_that_is_killed_again_and_again(slow_model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", mixed_lines(240) * 2)
    run_job(slow_model_path, source, tmp_path / "whole", options={"top_p": 0.9}, n_parallel=3)
    command = [
        *FIXMIN,
        "batch",
        str(source),
        str(out),
        "-m",
        str(slow_model_path),
        "-t",
        "1",
        "--top-p",
        "0.9",
        "--json",
    ]
    for n in (1, 50, 200):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            wait_for_lines(out, n, process)
            process.kill()
            process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGKILL
    result = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=True)
    assert records(out) == records(tmp_path / "whole")
    assert json.loads(result.stdout)["n_resumed"] >= 200
    assert result.stderr == b""


def test_a_full_disk(model_path, tmp_path, out):
    """The torn line that it leaves is repaired by the next run."""
    source = write_lines(tmp_path / "in", mixed_lines(30))
    run_job(model_path, source, tmp_path / "whole")
    limit = (tmp_path / "whole").stat().st_size // 2
    command = [*FIXMIN, "batch", str(source), str(out), "-m", str(model_path), "-t", "1", "-q"]
    result = subprocess.run(
        command,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # it would be cut off, and damaged from then on
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 1
    assert str(out) in result.stderr.decode()
    assert not out.read_bytes().endswith(b"\n")
    run_job(model_path, source, out)
    assert records(out) == records(tmp_path / "whole")


def test_ctrl_c_and_on_again(slow_model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", mixed_lines(400))
    command = [*FIXMIN, "batch", str(source), str(out), "-m", str(slow_model_path), "-t", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_lines(out, 5, process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, stdout, stderr.splitlines()[-1]) == (130, b"", b"interrupted")
    assert len(records(out)) < 400
    run_job(slow_model_path, source, out)
    assert len(records(out)) == 400


@pytest.mark.parametrize("pause", [0.0, 0.03, 0.2])  # seconds: whatever the end has come to
def test_ctrl_c_again_and_again(slow_model_path, tmp_path, out, pause):
    """The end is not torn apart: nothing aborts, and the job goes on as after one."""
    source = write_lines(tmp_path / "in", mixed_lines(400))
    command = [*FIXMIN, "batch", str(source), str(out), "-m", str(slow_model_path), "-t", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_lines(out, 5, process)
        for _ in range(6):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)
        _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode in (130, -signal.SIGINT)  # the latter after Python itself has ended
    assert b"Traceback" not in stderr
    assert b"terminate" not in stderr
    run_job(slow_model_path, source, out)
    assert len(records(out)) == 400


def other_model(model_path: Path) -> dict[str, object]:
    path = write_model(model_path.with_name("other.gguf"), byte_level(), context_length=96)
    return {"model": path}


def other_input(model_path: Path) -> dict[str, object]:
    path = model_path.with_name("other.jsonl")
    return {"source": write_lines(path, [*mixed_lines(9), {"prompt": "b"}])}


CHANGES = [
    (other_model, "model was"),
    (other_input, "input was"),
    ({"options": {"temperature": 0.5}}, "option temperature was None and is 0.5"),
    ({"options": {}}, "option max_new_tokens was 7 and is None"),
    ({"seed": 1}, "seed was 0 and is 1"),
    ({"kv_type": "f32"}, "kv_type was 'f16' and is 'f32'"),
    ({"n_ctx": 32}, "n_ctx was None and is 32"),
    ({"token_ids": True}, "token_ids was False and is True"),
    ({"task": "score", "options": {}}, "task was 'generate' and is 'score'"),
]


def test_a_job_goes_on_only_as_the_job_it_was(model_path, tmp_path, out, monkeypatch):
    source = write_lines(tmp_path / "in", mixed_lines(10))
    arguments = {"model": model_path, "source": source, "target": out, "options": {"max_new_tokens": 7}}
    interrupt(model_path, source, out, 4, options={"max_new_tokens": 7})
    before = out.read_bytes()
    for change, message in CHANGES:
        with pytest.raises(fixmin_cpp.ArgumentError, match="begun with other settings") as error:
            run_job(**{**arguments, **(change(model_path) if callable(change) else change)})
        assert message in str(error.value)
    with monkeypatch.context() as patch:
        patch.setattr("fixmin_cpp.batch.__version__", "99")
        with pytest.raises(fixmin_cpp.ArgumentError, match="fixmin was"):
            run_job(**arguments)
    assert out.read_bytes() == before
    # Neither threads nor n_parallel change an answer.
    assert run_job(**arguments, n_parallel=1).n_resumed == 4


def test_what_is_no_unfinished_job_is_left_alone(model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", mixed_lines(10))
    run_job(model_path, source, out)
    done = out.read_bytes()
    out.with_name("out.jsonl.done").unlink()
    with pytest.raises(fixmin_cpp.ArgumentError, match="not the beginning of a job"):
        run_job(model_path, source, out)
    assert out.read_bytes() == done
    interrupt(model_path, source, out, 4, overwrite=True)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(fixmin_cpp.ArgumentError, match="its line 2 answers line 3, not line 2"):
        run_job(model_path, source, out)
    out.write_bytes(done + lines[0])
    with pytest.raises(fixmin_cpp.ArgumentError, match="the input has ended"):
        run_job(model_path, source, out)
    out.with_name("out.jsonl.resume").write_bytes(b'{"seed"')
    for overwrite in (False, True):
        with pytest.raises(fixmin_cpp.ArgumentError, match=r"resume has the name .* or it is damaged: move it away"):
            run_job(model_path, source, out, overwrite=overwrite)
    out.with_name("out.jsonl.resume").unlink()
    assert run_job(model_path, source, out, overwrite=True).n_resumed == 0
    assert len(records(out)) == 10


@pytest.mark.parametrize("suffix", [".resume", ".done"])
def test_files_of_others_beside_the_output_are_left_alone(model_path, tmp_path, out, suffix):
    """Those that a job would write or remove: its own input, its model, or whatever else has such a name."""
    beside = Path(f"{out}{suffix}")
    write_lines(beside, mixed_lines(3))
    before = beside.read_bytes()
    for source in (beside, write_lines(tmp_path / "in", mixed_lines(3))):
        for overwrite in (False, True):
            with pytest.raises(fixmin_cpp.ArgumentError, match=f"{re.escape(str(beside))} (is an input|has the name)"):
                run_job(model_path, source, out, overwrite=overwrite)
            assert beside.read_bytes() == before
            assert not out.exists()
    beside.write_bytes(Path(model_path).read_bytes())
    with pytest.raises(fixmin_cpp.ArgumentError, match="is an input"):
        run_job(beside, tmp_path / "in", out)
    beside.unlink()
    beside.mkdir()
    with pytest.raises(fixmin_cpp.ArgumentError, match="no job has written it"):
        run_job(model_path, tmp_path / "in", out)
    assert sorted(os.listdir(tmp_path)) == sorted(["in", beside.name])


def test_two_runs_that_begin_at_once(tmp_path):
    """One of them writes the file, which is there afterwards; the other one is refused and removes nothing."""
    source = InputFile.scan(write_lines(tmp_path / "in", [{"prompt": "a"}]))
    account = {"fixmin": "x", "input": source.sha256, "model": "m"}
    for number in range(50):
        path, barrier, results = tmp_path / f"out{number}", threading.Barrier(2), []

        def work(path=path, barrier=barrier, results=results):
            barrier.wait()
            try:
                with OutputFile(path, account, source, overwrite=False) as file:
                    if not file.resume(source.lines()).n_records:
                        file.append(b'{"id":1,"line":1,"error":null}\n')
                    file.finish()
                    results.append("done")
            except fixmin_cpp.ArgumentError as error:
                results.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "done" in results
        assert all(result == "done" or "another run is writing" in result for result in results), results
        assert path.read_bytes() == b'{"id":1,"line":1,"error":null}\n'


def test_an_output_that_is_moved_away(model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", mixed_lines(5))

    def move(report):
        if report.n_done == 2:
            out.rename(tmp_path / "moved")
            out.write_bytes(b"of somebody else\n")

    with pytest.raises(FixminError, match=r"out.jsonl was moved or removed while the job wrote it"):
        run_job(model_path, source, out, progress=move)
    assert out.read_bytes() == b"of somebody else\n"
    assert not out.with_name("out.jsonl.done").exists()


def test_an_input_that_is_changed_meanwhile(model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", mixed_lines(9))
    before = source.read_bytes()

    def change(report):
        if report.n_done == 1:
            source.write_bytes(before.replace(b"the", b"hte"))

    with pytest.raises(FixminError, match="was changed while its lines were answered"):
        run_job(model_path, source, out, progress=change)
    assert not out.with_name("out.jsonl.done").exists()


def test_a_finished_output_is_never_cut(model_path, tmp_path, out, monkeypatch):
    source = write_lines(tmp_path / "in", mixed_lines(5))
    run_job(model_path, source, out)
    done = out.read_bytes()
    monkeypatch.setattr("fixmin_cpp.batch_output.read_record", lambda data: None)
    with pytest.raises(fixmin_cpp.ArgumentError, match="its job has ended, but its line 1 cannot be read"):
        run_job(model_path, source, out)
    assert out.read_bytes() == done


def test_a_job_that_is_done(model_path, tmp_path, out, monkeypatch):
    source = write_lines(tmp_path / "in", mixed_lines(10))
    run_job(model_path, source, out)
    done, account = out.read_bytes(), out.with_name("out.jsonl.done")
    with monkeypatch.context() as patch:
        patch.setattr("fixmin_cpp.batch_work.ModelFile.load", None)  # it is not loaded again
        for _ in range(2):
            report = run_job(model_path, source, out)
            assert (report.n_lines, report.n_done, report.n_resumed, report.n_errors) == (10, 10, 10, 1)
            assert (out.read_bytes(), report.completion_tokens) == (done, 0)
    for change, message in CHANGES:
        arguments = {"model": model_path, "source": source, "target": out, "options": {"max_new_tokens": 7}}
        run_job(**arguments, overwrite=True)
        before = out.read_bytes()
        with pytest.raises(fixmin_cpp.ArgumentError, match="begun with other settings") as error:
            run_job(**{**arguments, **(change(model_path) if callable(change) else change)})
        assert message in str(error.value)
        assert out.read_bytes() == before
    account.write_bytes(b'["input"]')
    with pytest.raises(fixmin_cpp.ArgumentError, match=r"out.jsonl.done has the name .* or it is damaged"):
        run_job(model_path, source, out)


@pytest.mark.parametrize("edit", [lambda d: d.replace(b'"id"', b'"ID"', 1), lambda d: d[:-9], lambda d: d + b"\n"])
def test_output_that_was_changed_after_its_job_had_ended(model_path, tmp_path, out, edit):
    source = write_lines(tmp_path / "in", mixed_lines(5))
    run_job(model_path, source, out)
    edited = edit(out.read_bytes())
    out.write_bytes(edited)
    with pytest.raises(fixmin_cpp.ArgumentError, match="was changed after its job had ended"):
        run_job(model_path, source, out)
    assert out.read_bytes() == edited
    assert run_job(model_path, source, out, overwrite=True).n_resumed == 0
    assert run_job(model_path, source, out).n_resumed == 5


def test_output_of_a_job_that_was_done_is_gone(model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", mixed_lines(5))
    run_job(model_path, source, out)
    whole = records(out)
    out.unlink()
    assert run_job(model_path, source, out).n_resumed == 0
    assert records(out) == whole


@pytest.mark.parametrize("n_before", [4, 10])
def test_an_input_that_has_grown(model_path, tmp_path, out, n_before):
    """The answers are those of one run over all of it, whether the job was done before or not."""
    lines = mixed_lines(14)
    source = write_lines(tmp_path / "in", lines[:10])
    if n_before < 10:
        interrupt(model_path, source, out, n_before)
    else:
        run_job(model_path, source, out)
    write_lines(source, lines)
    report = run_job(model_path, source, out)
    assert (report.n_lines, report.n_done, report.n_resumed) == (14, 14, n_before)
    assert not out.with_name("out.jsonl.resume").exists()
    run_job(model_path, source, tmp_path / "whole")
    assert records(out) == records(tmp_path / "whole")
    assert run_job(model_path, source, out).n_resumed == 14


def test_an_input_whose_last_line_has_grown(model_path, tmp_path, out):
    source = tmp_path / "in"
    source.write_bytes(b'{"prompt": "a", "max_new_tokens": 1')
    run_job(model_path, source, out)
    done = out.read_bytes()
    for more in (b"2}\n", b'}\n{"prompt": "b"}\n'):
        source.write_bytes(b'{"prompt": "a", "max_new_tokens": 1' + more)
        with pytest.raises(fixmin_cpp.ArgumentError, match="input was"):
            run_job(model_path, source, out)
        assert out.read_bytes() == done


def test_one_run_at_a_time(model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", mixed_lines(4))
    with open(out, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(fixmin_cpp.ArgumentError, match="another run is writing"):
            run_job(model_path, source, out, overwrite=True)
    run_job(model_path, source, out)


def test_fail_fast(model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", mixed_lines(12))  # the fourth and the eleventh are wrong
    for _ in range(2):
        with pytest.raises(fixmin_cpp.FixminError, match=r"in, line 4: temperature must be between"):
            run_job(model_path, source, out, fail_fast=True)
        assert [record.get("line", 0) for record in records(out)] == [1, 2, 3]
    report = run_job(model_path, source, out)
    assert (report.n_resumed, report.n_errors, len(records(out))) == (3, 2, 12)


WRONG = [
    ({"task": "chat"}, "task must be one of"),
    ({"seed": -1}, "seed must be between"),
    ({"n_parallel": 0}, "n_parallel must be between"),
    ({"options": {"temperature": -1}}, "temperature must be between"),
    ({"options": {"warmth": 1}}, "there is no argument 'warmth'"),
    ({"options": {"seed": 1}}, "seed is that of the job"),
    ({"options": {"banned_ids": [10**6]}}, "banned_ids[0] is 1000000"),
    ({"options": {"stop": {"a"}}}, "options must be what JSON can hold"),
    ({"options": {"top_k": 1}, "task": "embed"}, "top_k is an option of the task generate"),
    ({"token_ids": True, "task": "embed"}, "token_ids is an option of the task generate"),
    ({"ray_actors": 2}, "need ray_address"),
    ({"ray_gpus": 1}, "need ray_address"),
    ({"source": "."}, "must be a file"),
    ({"target": "."}, "must be a file"),
    ({"target": "in"}, "is an input"),
    ({"kv_type": "q1"}, "kv_type"),
    ({"n_threads": -2}, "n_threads"),
]


def test_arguments(model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"model": model_path, "source": write_lines(Path("in"), mixed_lines(3)), "target": "out"}
    for wrong, message in WRONG:
        with pytest.raises(fixmin_cpp.ArgumentError) as error:
            run_job(**{**arguments, **wrong})
        assert message in str(error.value)
        assert not Path("out.resume").exists()
    before = model_path.read_bytes()
    with pytest.raises(fixmin_cpp.ArgumentError, match="is an input"):
        run_job(**{**arguments, "target": model_path, "overwrite": True})
    assert model_path.read_bytes() == before
    for missing in ("model", "source"):
        with pytest.raises(FileNotFoundError, match="absent"):
            run_job(**{**arguments, missing: "absent"})
    with pytest.raises(FileNotFoundError, match="absent/out"):
        run_job(**{**arguments, "target": "absent/out"})


def test_progress(model_path, tmp_path, out):
    source = write_lines(tmp_path / "in", mixed_lines(10))
    interrupt(model_path, source, out, 4)
    reports = []
    last = run_job(model_path, source, out, progress=reports.append)
    assert [report.n_done for report in reports] == [5, 6, 7, 8, 9, 10]
    assert {(report.n_lines, report.n_resumed) for report in reports} == {(10, 4)}
    assert [report.n_errors for report in reports] == [1] * 6
    tokens = [report.completion_tokens for report in reports]
    assert tokens == sorted(tokens)
    assert last.completion_tokens == tokens[-1] > 0
    assert last.completion_tokens / last.tok_s == pytest.approx(last.seconds, abs=0.002)  # both are rounded


class GatedModel:
    """Stands for a model whose first prompt takes until the twelfth has come."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.prompts: list[str] = []

    def generate(self, prompt: str, **arguments: object) -> fixmin_cpp.Completion:
        if prompt == "p1":
            assert self.gate.wait(60), "the lines after a slow one were not begun"
        if prompt == "p12":
            self.gate.set()
        self.prompts.append(prompt)
        return fixmin_cpp.Completion("", [], "length", 0, fixmin_cpp.Timings(1, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0))


def test_lines_are_read_only_as_far_ahead_as_they_are_worked_on():
    """A line that takes long stops neither those after it, up to a limit, nor the order of results."""
    model, settings = GatedModel(), Settings.check("generate", 0, {}, False, 256)
    n_read = 0

    def lines():
        nonlocal n_read
        for number in range(1, 101):
            n_read = number
            yield Line(number, 0, b'{"prompt": "p%d"}' % number)

    numbers = []
    for result in run_lines(model, settings, lines(), 3):  # three places, four lines for each
        assert n_read <= result.line + 12
        numbers.append(result.line)
    assert numbers == list(range(1, 101))
    assert len(model.prompts) == 100
    assert model.prompts.index("p1") >= 2


def test_a_runner_that_is_closed_begins_no_more():
    model, settings = GatedModel(), Settings.check("generate", 0, {}, False, 256)
    model.gate.set()
    results = run_lines(model, settings, (Line(n, 0, b'{"prompt": "p%d"}' % n) for n in range(1, 1000)), 2)
    assert next(results).line == 1
    results.close()
    assert len(model.prompts) <= 2 + 8


def test_memory_does_not_grow_with_the_input(tmp_path):
    path = tmp_path / "in"
    with open(path, "wb") as file:
        for _ in range(200):
            file.write((b'{"prompt": "%s"}\n' % (b"x" * 484)) * 200)
    tracemalloc.start()
    try:
        lines = InputFile.scan(path)
        assert sum(1 for _ in lines.lines()) == lines.n_lines == 40_000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 20
    finally:
        tracemalloc.stop()


def test_what_is_appended_to_the_input_later_is_not_part_of_the_job(tmp_path):
    path = write_lines(tmp_path / "in", [{"prompt": "a"}, {"prompt": "b"}])
    lines = InputFile.scan(path)
    with open(path, "ab") as file:
        file.write(b'{"prompt": "c"}\n')
    assert [line.number for line in lines.lines()] == [1, 2]


def test_a_model_file_that_differs_elsewhere(model_path, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model_path.read_bytes())
    file = ModelFile.of(copy, LoadOptions.check({"n_threads": 1, "n_parallel": 1}))
    file.load().close()
    with open(copy, "r+b") as changed:
        changed.seek(-1, os.SEEK_END)
        changed.write(b"\x01")
    with pytest.raises(fixmin_cpp.FixminError, match="is another file than when the job was started"):
        file.load()


def test_a_model_file_that_is_replaced_while_a_job_begins(model_path, bare_model_path, tmp_path, out, monkeypatch):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model_path.read_bytes())

    def replaced(path, **settings):
        os.replace(tmp_path / "other.gguf", path)
        return fixmin_cpp.Model(path, **settings)

    (tmp_path / "other.gguf").write_bytes(bare_model_path.read_bytes())
    monkeypatch.setattr("fixmin_cpp.batch_work.Model", replaced)
    source = write_lines(tmp_path / "in", [{"prompt": [1, 2]}])
    with pytest.raises(fixmin_cpp.FixminError, match="is another file than when the job was started"):
        run_job(copy, source, out)


def test_command(model, tmp_path, out):
    source = write_lines(tmp_path / "in", [{"prompt": "the cat"}, {"prompt": "the cat", "temperature": 0}, b"x\n"])
    options = [
        "-n",
        6,
        "--temperature",
        0.8,
        "--top-k",
        40,
        "--top-p",
        0.95,
        "--stop",
        "q",
        "--ignore-eos",
        "--seed",
        3,
    ]
    named = {"max_new_tokens": 6, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "stop": ["q"], "ignore_eos": True}
    result = fixmin("batch", source, out, "-m", model.path, "-t", 1, *options, "--token-ids", "--json")
    assert (result.returncode, result.stderr) == (0, b"")
    summary = json.loads(result.stdout)
    assert (summary["path"], summary["n_lines"], summary["n_done"], summary["n_errors"]) == (str(out), 3, 3, 1)
    first, second, _ = records(out)
    assert first["token_ids"] == model.generate("the cat", **named, seed=first["seed"]).token_ids
    assert second["token_ids"] == model.generate("the cat", **{**named, "temperature": 0}).token_ids
    run_job(model.path, source, tmp_path / "again", options=named, seed=3, token_ids=True)
    assert records(out) == records(tmp_path / "again")


def test_command_with_other_arguments_of_generate(model, tmp_path, out):
    source = write_lines(tmp_path / "in", [{"prompt": "the cat"}])
    options = ["-n", 6, "--temp", 1, "--top-k", 3, "--min-p", 0.1, "--logit-bias", "5+0.5"]
    result = fixmin("batch", source, out, "-m", model.path, "-t", 1, *options)
    (record,) = records(out)
    alone = model.generate(
        "the cat", max_new_tokens=6, temperature=1.0, top_k=3, min_p=0.1, logit_bias={5: 0.5}, seed=record["seed"]
    )
    assert record["text"] == alone.text
    assert result.stdout.decode().splitlines()[0] == f"path: {out}"
    result = fixmin("batch", source, out, "-m", model.path, "-t", 1, "--best-of", 2)  # a record holds one text
    assert (result.returncode, b"No such option: --best-of" in result.stderr) == (2, True)
    with pytest.raises(TypeError, match=r"^n is an argument of Model.generate\(\) only: here a prompt has one"):
        run_job(model.path, source, out, options={"n": 2})


@pytest.mark.parametrize("option", ["--json-schema-file", "--grammar-file"])
def test_command_does_not_overwrite_its_other_inputs(model, tmp_path, option):
    source = write_lines(tmp_path / "in", [{"prompt": "a"}])
    form = tmp_path / "form"
    form.write_text("{}")
    result = fixmin("batch", source, form, "-m", model.path, option, form, "--overwrite")
    assert (result.returncode, b"is an input" in result.stderr) == (1, True)
    assert form.read_text() == "{}"


def test_command_to_stdout_is_refused(model, tmp_path):
    source = write_lines(tmp_path / "in", [{"prompt": "a"}])
    result = fixmin("batch", source, "-", "-m", model.path)
    assert (result.returncode, b"must be a file, not stdout" in result.stderr) == (1, True)
    assert not Path("-").exists()


def test_command_quiet_and_refused(model, tmp_path, out):
    source = write_lines(tmp_path / "in", [{"prompt": "a", "max_new_tokens": 2}])
    assert fixmin("batch", source, out, "-m", model.path, "-t", 1, "-q").stdout == b""
    result = fixmin("batch", source, out, "-m", model.path, "-t", 1, "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    result = fixmin("batch", source, out, "-m", model.path, "-t", 1, "-c", 0)
    assert (result.returncode, result.stderr.decode()) == (0, f"already done: {out} has all 1 lines\n")
    result = fixmin("batch", source, out, "-m", model.path, "-t", 1, "-n", 3)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode().startswith(f"error: {out} was begun with other settings: option max_new_tokens")
    out.with_name("out.jsonl.done").unlink()
    result = fixmin("batch", source, out, "-m", model.path, "-t", 1)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode().startswith(f"error: {out} exists and is not the beginning of a job")
    assert fixmin("batch", source, out, "-m", model.path, "-t", 1, "--overwrite").returncode == 0


def test_command_on_a_terminal(slow_model_path, tmp_path, out):
    """A bar with lines and speed, which is gone at the end."""
    source = write_lines(tmp_path / "in", mixed_lines(60))
    command = [*FIXMIN, "batch", str(source), str(out), "-m", str(slow_model_path), "-t", "1"]
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                data = os.read(parent, 65536)
            except OSError:  # the other side was closed
                break
            shown += data
        assert process.wait(TIMEOUT) == 0
    os.close(parent)
    assert b"of 60 lines, " in shown
    assert b"tok/s" in shown
    assert len(records(out)) == 60


def test_progress_in_a_pipe(monkeypatch, capsys):
    from fixmin_cpp.cli import _batch_progress

    with _batch_progress(False) as update:
        for n in range(11, 100):
            update(BatchReport("out", 1000, n, 10, 2, 0, 7 * n, (n - 10) * 0.5, 21.0))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # of 44.5 seconds
    assert lines[0] == "30 of 1000 lines, 21 tok/s, 2 errors, 0:08:05 left"
