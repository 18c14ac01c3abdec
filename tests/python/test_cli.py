"""The command `fixmin` in processes of its own: through pipes, on a terminal, with everything that goes wrong."""

import dataclasses
import json
import math
import os
import pty
import re
import subprocess

import pytest
from fixmin_cli import FIXMIN, TIMEOUT, fixmin, on_terminal

import fixmin_cpp
from fixmin_cpp import GenerationArguments
from fixmin_cpp.cli_options import OPTIONS


def test_version_and_help():
    assert fixmin("--version").stdout.decode() == f"fixmin {fixmin_cpp.__version__}\n"
    assert b"generate" in fixmin("--help").stdout
    assert b"--max-new-tokens" in fixmin("generate", "--help").stdout


def test_generate_writes_the_text_and_nothing_else_to_stdout(letters_model):
    expected = letters_model.generate("the cat\nis", max_new_tokens=12)
    result = fixmin("generate", "-m", letters_model.path, "-p", r"the cat\nis", "-n", 12)
    assert result.returncode == 0
    assert result.stdout.decode() == expected.text + "\n"
    assert "12 new" in result.stderr.decode()
    assert (
        fixmin("generate", "-m", letters_model.path, "-p", r"the cat\nis", "-n", 12, "-q", "--no-stream").stderr == b""
    )


def test_prompt_from_stdin_and_file(letters_model, tmp_path):
    expected = letters_model.generate("the 日本 cat", max_new_tokens=8).text + "\n"
    prompt = "the 日本 cat\n".encode()
    (tmp_path / "prompt.txt").write_bytes(prompt)
    assert fixmin("generate", "-m", letters_model.path, "-n", 8, stdin=prompt).stdout.decode() == expected
    by_file = fixmin("generate", "-m", letters_model.path, "-n", 8, "-f", tmp_path / "prompt.txt")
    assert by_file.stdout.decode() == expected


def test_json(letters_model):
    arguments = {"max_new_tokens": 9, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 11, "ignore_eos": True}
    expected = letters_model.generate("the cat", **arguments)
    options = ["-n", 9, "--temperature", 0.7, "--top-k", 20, "--top-p", 0.9, "--seed", 11, "--ignore-eos"]
    result = fixmin("generate", "-m", letters_model.path, "-p", "the cat", *options, "--threads", 1, "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == expected.text
    assert answer["token_ids"] == expected.token_ids
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["seed"] == 11
    assert answer["timings"]["n_generated"] == len(expected.token_ids)
    assert result.stderr == b""


def test_sampling_options_have_the_names_of_llama_cpp(letters_model):
    arguments = {
        "max_new_tokens": 12, "temperature": 1.3, "seed": 3, "min_new_tokens": 4, "dynatemp_range": 0.5,
        "dynatemp_exponent": 1.5, "top_n_sigma": 2.5, "top_k": 30, "typical_p": 0.95, "top_p": 0.98, "min_p": 0.01,
        "xtc_probability": 0.5, "xtc_threshold": 0.2, "repeat_penalty": 1.1, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "repeat_last_n": 32, "dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 1,
        "dry_penalty_last_n": 40, "dry_sequence_breakers": ["\n", "a"], "logit_bias": {2: 1.5, 3: -math.inf},
    }  # fmt: skip
    text = r"""-n 12 --temp 1.3 --seed 3 --min-new-tokens 4 --dynatemp-range 0.5 --dynatemp-exp 1.5 --top-nsigma 2.5
        --top-k 30 --typical 0.95 --top-p 0.98 --min-p 0.01 --xtc-probability 0.5 --xtc-threshold 0.2
        --repeat-penalty 1.1 --presence-penalty 0.1 --frequency-penalty 0.2 --repeat-last-n 32
        --dry-multiplier 0.8 --dry-base 1.5
        --dry-allowed-length 1 --dry-penalty-last-n 40 --dry-sequence-breaker \n --dry-sequence-breaker a
        --logit-bias 2+1.5 -l 3-inf --json"""
    result = fixmin("generate", "-m", letters_model.path, "-p", "the cat", *text.split())
    assert json.loads(result.stdout)["token_ids"] == letters_model.generate("the cat", **arguments).token_ids
    mirostat = ["--temp", 1, "--seed", 3, "--mirostat", 2, "--mirostat-ent", 3, "--mirostat-lr", 0.3, "-n", 9, "--json"]
    result = fixmin("generate", "-m", letters_model.path, "-p", "the cat", *mirostat)
    expected = letters_model.generate(
        "the cat", temperature=1.0, seed=3, mirostat=2, mirostat_tau=3.0, mirostat_eta=0.3, max_new_tokens=9
    )
    assert json.loads(result.stdout)["token_ids"] == expected.token_ids


def test_every_argument_of_generate_is_an_option():
    reached = {option.argument or name for name, option in OPTIONS.items()}
    # Other names of repeat_penalty, banned_ids and a temperature.
    other_names = {"repetition_penalty", "bad_ids", "do_sample"}
    assert reached == (set(GenerationArguments.__annotations__) | {"n", "best_of"}) - other_names


def test_ids_guesses_and_probabilities(letters_model):
    arguments = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3, "min_keep": 4, "timeout": 600.0}
    arguments |= {"stop_ids": [5, 6], "banned_ids": [7], "allowed_ids": list(range(3, 40)), "prefix_cache": False}
    arguments |= {"logprobs": 2, "prompt_logprobs": 0, "prompt_lookup_num_tokens": 3}
    expected = letters_model.generate("the cat", **arguments)
    text = """-n 8 --temp 1 -s 3 --min-keep 4 --timeout 600 --stop-id 5 --stop-id 6 --banned-id 7 --no-prefix-cache
        --logprobs 2 --prompt-logprobs 0 --prompt-lookup-num-tokens 3 --json"""
    allowed = [part for i in range(3, 40) for part in ("--allowed-id", i)]
    answer = json.loads(fixmin("generate", "-m", letters_model.path, "-p", "the cat", *text.split(), *allowed).stdout)
    assert answer["token_ids"] == expected.token_ids
    assert answer["logprobs"] == json.loads(json.dumps([dataclasses.asdict(t) for t in expected.logprobs]))
    assert [t["logprob"] for t in answer["prompt_logprobs"]] == [t.logprob for t in expected.prompt_logprobs]
    assert answer["candidates"] is None


def test_forms(model_path, tmp_path):
    pytest.importorskip("llguidance")
    (tmp_path / "schema").write_text('{"type": "boolean"}')
    (tmp_path / "grammar").write_text('start: "a" "b"+ "c"')
    forms = [
        (["--json-schema", '{"enum": [12]}'], "12"),
        (["--json-schema-file", tmp_path / "schema"], "(true|false)"),
        (["--regex", "[a-c]{4}"], "[a-c]{4}"),
        (["--grammar", 'root ::= "ba"'], "ba"),
        (["--grammar-file", tmp_path / "grammar"], "ab+c"),
        (["--choice", r"a\nb", "--choice", "b"], "(a\nb|b)"),
    ]
    for options, expected in forms:
        result = fixmin("generate", "-m", model_path, "-p", "the", "-q", "--temp", 1, "-s", 1, *options)
        assert re.fullmatch(expected + "\n", result.stdout.decode()), (options, result)


def test_several_completions(letters_model):
    arguments = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    everyone = letters_model.generate("the cat", n=3, **arguments).candidates
    best = letters_model.generate("the cat", best_of=3, **arguments)
    options = ["-m", letters_model.path, "-p", "the cat", "-n", 6, "--temp", 1, "-s", 3]
    result = fixmin("generate", *options, "--n", 3)
    assert result.stdout.decode() == "".join(candidate.text + "\n" for candidate in everyone)
    assert [line.split()[-1] for line in result.stderr.decode().splitlines()] == [str(c.seed) for c in everyone]
    answer = json.loads(fixmin("generate", *options, "--n", 3, "--json").stdout)
    assert [c["token_ids"] for c in answer["candidates"]] == [c.token_ids for c in everyone]
    assert fixmin("generate", *options, "--best-of", 3).stdout.decode() == best.text + "\n"
    assert fixmin("generate", *options, "--n", 1, "-q").stdout.decode() == everyone[0].text + "\n"


def test_stop_may_be_given_several_times(letters_model):
    text = letters_model.generate("the cat", max_new_tokens=20, ignore_eos=True).text
    escaped = text[6:8].replace("\\", "\\\\").replace("\n", "\\n")
    options = ["-p", "the cat", "-n", 20, "--ignore-eos", "--stop", "no such text", "--stop", escaped]
    result = fixmin("generate", "-m", letters_model.path, *options)
    assert result.stdout.decode() == text[: text.index(text[6:8])] + "\n"


def test_escapes_can_be_switched_off(letters_model):
    result = fixmin("generate", "-m", letters_model.path, "-p", r"a\nb", "--no-escape", "-n", 1, "--json")
    assert json.loads(result.stdout)["prompt"] == r"a\nb"
    result = fixmin("generate", "-m", letters_model.path, "-p", r"\q\\n\t", "-n", 1, "--json")
    assert json.loads(result.stdout)["prompt"] == "\\q\\n\t"


# arguments, exit code, part of stderr
WRONG = [
    ([], 2, "--model"),
    (["-m", "{model}", "-p", "a", "-f", "b"], 2, "not both"),
    (["-m", "{model}", "-p", "a", "-n", "many"], 2, "--max-new-tokens"),
    (["-m", "{model}", "-p", "a", "--unknown"], 2, "--unknown"),
    (["-m", "missing.gguf", "-p", "a"], 1, "missing.gguf"),
    (["-m", "{model}", "-p", ""], 1, "prompt is empty"),
    (["-m", "{model}"], 1, "prompt is empty"),
    (["-m", "{model}", "-f", "missing.txt"], 1, "missing.txt"),
    (["-m", "{model}", "-p", "a", "-n", "-5"], 1, "max_new_tokens must be at least 1, got -5"),
    (["-m", "{model}", "-p", "a", "--temperature", "nan"], 1, "temperature"),
    (["-m", "{model}", "-p", "a", "--min-p", "2"], 1, "min_p must be between 0 and 1, got 2"),
    (["-m", "{model}", "-p", "a", "--logit-bias", "5"], 2, "ID+BIAS"),
    (["-m", "{model}", "-p", "a", "--logit-bias", "5+x"], 2, "ID+BIAS"),
    (["-m", "{model}", "-p", "a", "--logit-bias", "9999+1"], 1, "token id 9999"),
    (["-m", "{model}", "-p", "a", "--n", "2"], 1, "n=2 needs a temperature above 0"),
    (["-m", "{model}", "-p", "a", "--logprobs", "2"], 2, "need --json"),
    (["-m", "{model}", "-p", "a", "--grammar", "a", "--grammar-file", "b"], 2, "give --grammar or --grammar-file"),
    (["-m", "{model}", "-p", "a", "--grammar-file", "missing.lark"], 1, "missing.lark"),
    (["-m", "{model}", "-p", "a", "--stop-id", "9999"], 1, "stop_ids[0] is 9999"),
    (["-m", "{model}", "-p", "a", "--stop", ""], 1, "stop[0] must not be empty"),
    (["-m", "{model}", "-p", "a", "--kv-type", "q1"], 1, "kv_type"),
    (["-m", "{model}", "-p", "a " * 500], 1, "the context holds"),
    (["-m", "{script}", "-p", "a"], 1, "error:"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_errors_are_one_line(model_path, arguments, code, message):
    filled = [str(a).format(model=model_path, script=__file__) for a in arguments]
    result = fixmin("generate", *filled)
    errors = result.stderr.decode()
    assert result.returncode == code
    assert result.stdout == b""
    assert message in errors
    assert "Traceback" not in errors
    if code == 1:
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1


def test_debug_shows_the_traceback(model_path):
    result = fixmin("generate", "-m", model_path, "-p", "", "--debug")
    assert result.returncode == 1
    assert b"Traceback" in result.stderr


def test_input_that_is_not_utf8(model_path):
    result = fixmin("generate", "-m", model_path, stdin=b"abc\xff")
    assert (result.returncode, result.stderr) == (1, b"error: stdin is not UTF-8: byte 0xff at offset 3\n")


def test_reader_that_goes_away(long_model_path):
    command = [*FIXMIN, "generate", "-m", str(long_model_path), "-p", "a", "-n", "1000000", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(TIMEOUT) == 141
    assert errors == b""


def test_ctrl_c_keeps_what_was_written(long_model_path):
    command = [*FIXMIN, "generate", "-m", str(long_model_path), "-p", "a", "-n", "1000000", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        start = process.stdout.read(1)
        process.send_signal(2)
        rest, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert start + rest
    assert errors == b"interrupted\n"


def test_on_a_terminal(letters_model):
    """Text and a note arrive on the terminal, and colours only there."""
    expected = letters_model.generate("the cat", max_new_tokens=5).text
    command = [*FIXMIN, "generate", "-m", letters_model.path, "-p", "the cat", "-n", "5"]
    text = on_terminal(command)
    assert expected in text
    assert "5 new" in text
    assert "\x1b[" in text


def test_terminal_without_a_prompt_is_asked_for_one(model_path):
    parent, child = pty.openpty()
    result = subprocess.run(
        [*FIXMIN, "generate", "-m", str(model_path)], stdin=child, capture_output=True, timeout=TIMEOUT, check=False
    )
    os.close(child)
    os.close(parent)
    assert result.returncode == 2
    assert b"no prompt" in result.stderr


def test_info():
    plain = dict(line.split(": ", 1) for line in fixmin("info").stdout.decode().splitlines())
    report = json.loads(fixmin("info", "--json").stdout)
    assert report.keys() == fixmin_cpp.system_info().keys() == plain.keys()
    assert plain["isa"] == report["isa"]


def test_inspect(letters_model):
    result = fixmin("inspect", letters_model.path, "--token", "0,3", "--json")
    description = json.loads(result.stdout)
    codes = letters_model.codes([0, 3])
    assert description["code"]["width"] == codes.shape[1]
    assert [token["id"] for token in description["tokens"]] == [0, 3]
    plain = fixmin("inspect", letters_model.path)
    assert plain.returncode == 0
    assert b"blk.0.attn_q.weight" in plain.stdout
    assert b"\x1b[" not in plain.stdout
    failed = fixmin("inspect", __file__)
    assert failed.returncode == 1
    assert failed.stderr.decode().startswith("error: ")


@pytest.mark.parametrize("command", ["bench", "quantize", "imatrix", "perplexity"])
def test_tools_have_help(command):
    helped = fixmin(command, "--help")
    assert helped.returncode == 0
    assert b"--json" in helped.stdout
    assert fixmin(command).returncode == 2


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_converter_is_reached(command):
    helped = fixmin(command, "--help")
    assert helped.returncode == 0
    assert b"trust-remote-code" in helped.stdout
    failed = fixmin(command, "no/such/checkpoint.gguf", "no/such/folder")
    assert failed.returncode != 0
    assert b"Traceback" not in failed.stderr
