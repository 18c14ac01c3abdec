"""The command `fixmin` in processes of its own: through pipes, on a terminal, with everything that goes wrong."""

import ast
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import typer.main
from fixmin_cli import FIXMIN, TIMEOUT, fixmin, on_terminal
from sampled import sampled
from typer.testing import CliRunner

import fixmin_cpp
from fixmin_cpp import GenerationArguments, cli_options
from fixmin_cpp.cli import app
from fixmin_cpp.cli_options import OPTIONS
from fixmin_cpp.cli_output import EXTRAS

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "fixed"
COMMANDS = typer.main.get_command(app).commands


def test_version_and_help():
    assert fixmin("--version").stdout.decode() == f"fixmin {fixmin_cpp.__version__}\n"
    shown = fixmin("--help").stdout.decode()
    assert re.findall(r"^  (\w+) ", shown, re.MULTILINE)[1:] == sorted(
        COMMANDS, key=lambda name: shown.index(f"\n  {name} ")
    )
    for extra in ("convert", "quantize", "serve"):
        assert f"fixmin-cpp[{extra}])" in shown
    assert fixmin("-h").stdout.decode() == shown


def test_as_a_module():
    """For environments whose scripts are not in PATH."""
    run = subprocess.run(
        [sys.executable, "-m", "fixmin_cpp", "info", "--json"], capture_output=True, timeout=TIMEOUT, check=True
    )
    assert json.loads(run.stdout) == json.loads(fixmin("info", "--json").stdout)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", ["generate", "batch", "serve", "bench"])
def test_help_has_headings_and_whole_names(name, terminal):
    """At 80 columns, where names of options must not be cut."""
    if terminal:
        shown = re.sub("\x1b\\[[0-9;]*m", "", on_terminal([*FIXMIN, name, "--help"], columns=80))
    else:
        shown = fixmin(name, "--help").stdout.decode()
    assert max(map(len, shown.splitlines())) <= 80
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option":
            joined = ", ".join(sorted(parameter.opts, key=lambda opt: len(opt) > 2))
            assert re.search(rf"^  {re.escape(joined)}( |$)", shown, re.MULTILINE), joined
            heading = getattr(parameter, "rich_help_panel", None) or "Other options"
            assert f"\n{heading}:\n" in shown
    assert shown.index("Other options:") > shown.rindex("\n\n", 0, shown.index("--help  "))


def test_every_row_of_the_table_has_a_heading_of_its_own():
    panels = {p.name: p.rich_help_panel for p in COMMANDS["generate"].params if p.name in OPTIONS}
    assert panels.keys() == OPTIONS.keys()
    assert len(set(panels.values())) > 5


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
    reached = {option.argument for option in OPTIONS.values()}
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
    assert result.stdout.decode() == "".join(
        f"--- {i + 1} of 3, seed {candidate.seed} ---\n{candidate.text}\n" for i, candidate in enumerate(everyone)
    )
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
    (
        ["-m", "{model}", "-p", "a", "-n", "-5"],
        1,
        "max_new_tokens must be at least 1, or -1: until the context ends, got -5",
    ),
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
        said = [line for line in errors.splitlines() if not line.endswith(" ...")]  # what takes a slow machine so long
        assert len(said) == 1
        assert said[0].startswith("error: ")


def test_debug_shows_the_traceback(model_path):
    result = fixmin("generate", "-m", model_path, "-p", "", "--debug")
    assert result.returncode == 1
    assert b"Traceback" in result.stderr


def test_text_that_never_ends(monkeypatch):
    monkeypatch.setattr(cli_options, "MOST_TEXT", 3_000_000)
    with pytest.raises(ValueError, match=r"^/dev/zero: the text has more than 3,000,000 bytes"):
        cli_options.read_text(Path("/dev/zero"))
    with open("/dev/zero", encoding="latin-1") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        with pytest.raises(ValueError, match=r"^stdin: the text has more than 3,000,000 bytes"):
            cli_options.read_stdin()


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


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2, 0.5])
def test_ctrl_c_while_it_starts(long_model_path, seconds):
    """From the first line of the script's own on; before that Python starts."""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fixmin")
    start = f"from {script.module} import {script.attr} as run; print(flush=True); run()"
    command = [sys.executable, "-c", start, "generate", "-m", str(long_model_path), "-p", "a", "-n", "1000000"]
    with subprocess.Popen([*command, "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert errors in (b"", b"interrupted\n")


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
    assert report.keys() == fixmin_cpp.system_info().keys() | {"cuda_driver", "gpus"} == plain.keys()
    assert re.match(r"CUDA \d+\.\d+( \(driver [\d.]+\))?$|none: .+", report["cuda_driver"])
    assert not (report["gpus"] and report["cuda_driver"].startswith("none"))
    for gpu in report["gpus"]:
        assert gpu["name"] in plain["gpus"]
    assert plain["isa"] == report["isa"]


def test_inspect(letters_model):
    result = fixmin("inspect", letters_model.path, "--token", "0,3", "--json")
    description = json.loads(result.stdout)
    codes = letters_model.codes([0, 3])
    assert description["code"]["width"] == codes.shape[1]
    assert [token["id"] for token in description["tokens"]] == [0, 3]
    plain = fixmin("inspect", letters_model.path)
    assert plain.returncode == 0
    assert re.search(rb" blk\.\*\.attn_q\.weight +\| +2 \| ", plain.stdout)
    assert b"blk.0.attn_q.weight" not in plain.stdout
    everything = fixmin("inspect", letters_model.path, "--all").stdout
    for name in (tensor["name"] for tensor in description["tensors"]):
        assert everything.count(f" {name} ".encode()) == 1
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


# --- what goes wrong around a command -----------------------------------------------------------------------------


def shell(command: str, **arguments: object) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which fixmin is a function; stdin is closed to nobody."""
    line = f'fixmin() {{ {shlex.join(FIXMIN)} "$@"; }}; set -o pipefail; {command}'
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=TIMEOUT, check=False, **arguments)  # type: ignore[call-overload]


# command, exit code, stderr
ENDS = [
    ("fixmin generate -qm $M -p a -n 2 >&-", 1, "error: stdout: Bad file descriptor\n"),
    ("fixmin generate -qm $M -p a -n 2 >/dev/full", 1, "error: stdout: No space left on device\n"),
    ("fixmin generate -m $M -p a -n 2 2>&- | cmp - $EXPECTED", 0, ""),
    ("fixmin generate -m $M -p a -n 2 2>/dev/full | cmp - $EXPECTED", 0, ""),
    ("fixmin generate -m $M -n 2 <&-", 2, "no prompt"),
    ("fixmin --help >/dev/full", 1, "error: stdout: No space left on device\n"),
    ("fixmin convert --help >/dev/full", 1, "error: stdout: No space left on device\n"),
    ("fixmin verify --help >&-", 1, "error: stdout: Bad file descriptor\n"),
    ("fixmin convert --help | true", 141, ""),
    ("fixmin --version >&-", 1, "error: stdout: Bad file descriptor\n"),
    ("fixmin info >/dev/full", 1, "error: stdout: No space left on device\n"),
    ("fixmin inspect $M >/dev/full", 1, "error: stdout: No space left on device\n"),
    ("fixmin inspect $M --json >&-", 1, "error: stdout: Bad file descriptor\n"),
    ("fixmin inspect $M --all | head -1", 141, ""),
    ("fixmin inspect $M --json | true", 141, ""),
    ("fixmin --help | true", 141, ""),
    ("fixmin tokenize -m $M -p a | true", 141, ""),
]


@pytest.mark.parametrize(("command", "code", "message"), ENDS, ids=[command for command, *_ in ENDS])
def test_streams_that_are_closed_or_full(model, model_path, tmp_path, command, code, message):
    expected = tmp_path / "expected"
    expected.write_text(model.generate("a", max_new_tokens=2).text + "\n")
    result = shell(command, env={**os.environ, "M": str(model_path), "EXPECTED": str(expected)})
    errors = result.stderr.decode()
    assert result.returncode == code
    assert errors == message or (code == 2 and message in errors)
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("kilobytes", "command"),
    [
        (1, "card $M -o $OUT"),
        (1, "perplexity -m $M -f $TEXT --save-logits $OUT"),
        (1, "imatrix -m $M -f $TEXT -o $OUT"),
        (30, "quantize $M $OUT q8_0"),  # enough for the header, which it makes elsewhere
    ],
)
def test_a_file_that_cannot_grow_is_named_and_gone(model_path, tmp_path, kilobytes, command):
    """As on a full disk. What Python would write of its own, bytecode, would be cut off too."""
    (tmp_path / "text").write_text("a cat sat on the mat " * 40)
    out = tmp_path / "made" / "out"
    out.parent.mkdir()
    env = {**os.environ, "M": str(model_path), "TEXT": str(tmp_path / "text"), "OUT": str(out)}
    result = shell(f"ulimit -f {kilobytes}; fixmin {command}", env=env | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert result.stderr.decode().splitlines()[-1] == f"error: {out}: File too large"
    assert (result.returncode, os.listdir(out.parent)) == (1, [])


def test_what_is_written_to_a_closed_stdout_does_not_land_in_a_file(model_path, tmp_path):
    """The number 1 is free then, and the first file that is opened would get it."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a", "max_new_tokens": 2}\n')
    result = shell(f"fixmin batch {source} {target} -m {model_path} >&- 2>&-")
    assert result.returncode == 1
    assert [json.loads(line)["line"] for line in target.read_text().splitlines()] == [1]


LOCALES = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("locale", sampled(LOCALES, 3), ids=str)
def test_text_is_utf8_whatever_the_locale(letters_model, locale):
    environment = {**os.environ, "M": letters_model.path, **locale}
    expected = letters_model.generate("日é", max_new_tokens=9, stop="é")
    result = shell("fixmin generate -m $M -p 日é -n 9 --stop é --json", env=environment)
    answer = json.loads(result.stdout.decode())
    assert (answer["prompt"], answer["token_ids"]) == ("日é", expected.token_ids)
    for command in ("tokenize -m $M -p 日é", "score -m $M -p 日é", "inspect $M -t 日é", "generate --help"):
        result = shell(f"fixmin {command}", env=environment)
        assert (result.returncode, b"Traceback" in result.stderr) == (0, False), command
    result = shell("fixmin tokenize -m $M --json -p 日é", env=environment)
    assert json.loads(result.stdout.decode())["pieces"] == ["日", "é"]


def test_an_argument_that_is_not_utf8(model_path):
    result = shell(rf"fixmin generate -m {model_path} -p $'a\xffb'")
    assert (result.returncode, result.stderr) == (1, b"error: the command line is not UTF-8: byte 0xff at offset 1\n")


def test_names_of_files_that_are_not_utf8(letters_model, tmp_path):
    name = tmp_path / os.fsdecode(b"a\xff b.gguf")
    name.write_bytes(Path(letters_model.path).read_bytes())
    with fixmin_cpp.Model(name) as loaded:
        assert loaded.generate("a", max_new_tokens=3).text == letters_model.generate("a", max_new_tokens=3).text
        assert loaded.save_state(tmp_path / os.fsdecode(b"state\xfe"), "the cat" * 8) > 0
    fixmin_cpp.quantize(name, tmp_path / os.fsdecode(b"q\xfe.gguf"), "q8_0", allow_requantize=True)
    name.write_bytes(name.read_bytes()[:100])
    for command in (["generate", "-m", name, "-p", "a"], ["inspect", name], ["tokenize", "-m", name, "-p", "a"]):
        code, errors = invoke(*command)
        assert (code, len(errors)) == (1, 1), errors
        assert "a\\udcff b.gguf:" in errors[0]
    with pytest.raises(fixmin_cpp.ArgumentError, match=r"path is not valid Unicode: lone surrogate '\\ud800'"):
        fixmin_cpp.Model("\ud800")


def test_a_narrow_terminal_and_one_without_colours(model_path):
    environment = {"COLUMNS": "20", "NO_COLOR": "1"}
    for command in (["inspect", str(model_path)], ["generate", "--help"], ["info"]):
        shown = on_terminal([*FIXMIN, *command], **environment)
        assert not re.search("\x1b\\[[0-9;]*3[0-9]m", shown)  # a colour
    assert " blk.*.attn_q.weight " in on_terminal([*FIXMIN, "inspect", str(model_path)], **environment)


def test_stdin_under_the_name_of_a_file(letters_model):
    expected = letters_model.generate("the cat", max_new_tokens=5).text + "\n"
    for option in ("-f", "-p"):
        result = fixmin("generate", "-m", letters_model.path, "-n", 5, option, "-", stdin=b"the cat\n")
        assert result.stdout.decode() == expected


def test_options_that_do_nothing_without_a_temperature(letters_model):
    options = ["-m", letters_model.path, "-p", "the", "-n", 2, "--top-k", 4, "-s", 1]
    assert b"--seed, --top-k had no effect: without --temp" in fixmin("generate", *options).stderr
    assert b"no effect" not in fixmin("generate", *options, "--temp", 0).stderr


@pytest.mark.parametrize("n", [0, -1])
def test_threads_left_to_the_machine(letters_model, n):
    """-1 is llama.cpp's default."""
    expected = fixmin("generate", "-m", letters_model.path, "-p", "the", "-n", 2)
    result = fixmin("generate", "-m", letters_model.path, "-p", "the", "-n", 2, "-t", n)
    assert (result.returncode, result.stdout) == (0, expected.stdout)
    assert fixmin("score", "-m", letters_model.path, "-p", "the cat", "-t", n).returncode == 0
    with fixmin_cpp.Model(letters_model.path, n_threads=n) as model:
        assert model.info["n_threads"] == letters_model.info["n_threads"]


@pytest.mark.parametrize("n", [-2, 1025])
def test_numbers_of_threads_that_are_none(letters_model, n):
    result = fixmin("generate", "-m", letters_model.path, "-p", "the", "-t", n)
    expected = f"error: n_threads must be between -1 and 1024, got {n}\n"
    assert (result.returncode, result.stderr.decode()) == (1, expected)


# --- tokenize and score -------------------------------------------------------------------------------------------


def test_tokenize(letters_model, model, model_path, bare_model_path, tmp_path):
    text = "the 日本\n cat"
    (tmp_path / "text").write_text(text + "\n")
    ids = letters_model.encode(text)
    for source in (["-p", text], ["-p", text.replace("\n", r"\n")], ["-f", tmp_path / "text"]):
        result = fixmin("tokenize", "-m", letters_model.path, *source)
        assert [int(line.split()[0]) for line in result.stdout.decode().splitlines()] == ids
        pieces = [ast.literal_eval(line.split(maxsplit=1)[1]) for line in result.stdout.decode().splitlines()]
        assert "".join(pieces) == text
        assert result.stderr.decode() == f"{len(ids)} tokens\n"
    result = fixmin("tokenize", "-m", letters_model.path, "--ids", stdin=text.encode())
    assert result.stdout.decode() == " ".join(map(str, ids)) + "\n"
    answer = json.loads(fixmin("tokenize", "-m", model_path, "--json", "-p", "éé").stdout)
    assert answer["token_ids"] == model.encode("éé")
    assert (answer["text"], answer["n_tokens"], len(answer["pieces"])) == (
        "éé",
        len(answer["token_ids"]),
        answer["n_tokens"],
    )
    assert b"".join(map(bytes, answer["bytes"])) == "éé".encode()
    for text in ("日€ü é", "\\x80 \x80 \x1b b'\\xe2'", "\N{REPLACEMENT CHARACTER}"):
        shown = fixmin("tokenize", "-m", model_path, "--no-escape", stdin=text.encode()).stdout.decode()
        parts = [ast.literal_eval(line.split(maxsplit=1)[1]) for line in shown.splitlines()]
        data = [part.encode() if isinstance(part, str) else part for part in parts]
        assert data == [model.text_tokenizer.token_bytes(i) for i in model.encode(text)]
        assert b"".join(data) == text.encode()
        assert "\N{REPLACEMENT CHARACTER}" not in shown
    failed = fixmin("tokenize", "-m", bare_model_path, "-p", "a")
    assert (failed.returncode, failed.stderr.count(b"\n")) == (1, 1)
    assert b"bare.gguf holds no tokenizer" in failed.stderr
    assert fixmin("tokenize", "-m", model_path, "-p", "").stdout == b""


def test_score(letters_model, model_path, tmp_path):
    text = "the 日本 cat"
    expected = letters_model.score(text)
    answer = json.loads(fixmin("score", "-m", letters_model.path, "-p", text, "--json").stdout)
    assert answer["text"] == text
    assert (answer["token_ids"], answer["ranks"]) == (expected.token_ids, expected.ranks.tolist())
    assert (answer["logprobs"], answer["nll"], answer["perplexity"]) == (
        expected.logprobs.tolist(),
        expected.nll,
        expected.perplexity,
    )
    assert "".join(answer["pieces"]) == text
    head, first, *rows, last = (
        fixmin("score", "-m", letters_model.path, stdin=text.encode()).stdout.decode().splitlines()
    )
    assert head.split() == ["id", "logprob", "p", "rank", "token"]
    assert int(first.split()[0]) == expected.token_ids[0]
    found = [(int(row.split()[0]), float(row.split()[1]), int(row.split()[3])) for row in rows]
    assert found == [
        (i, pytest.approx(p, abs=6e-4), r)
        for i, p, r in zip(expected.token_ids[1:], expected.logprobs.tolist(), expected.ranks, strict=True)
    ]
    assert last.startswith(f"{len(expected.token_ids)} tokens, perplexity {expected.perplexity:.6g}, ")
    answer = json.loads(fixmin("score", "-m", model_path, "-p", "a€日", "--json").stdout)
    assert b"".join(map(bytes, answer["bytes"])) == "a€日".encode()
    assert b"  b'\\xe2'\n" in fixmin("score", "-m", model_path, "-p", "a€日").stdout
    assert fixmin("score", "-qm", letters_model.path, "-p", text).stdout.decode() == last + "\n"
    failed = fixmin("score", "-m", letters_model.path, "-p", "a")
    assert (failed.returncode, b"at least 2 tokens" in failed.stderr) == (1, True)


# --- wrong files, wrong numbers, missing packages -----------------------------------------------------------------


def invoke(*arguments: object) -> tuple[int, list[str]]:
    """A command in this process: its exit code and the lines of stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr.splitlines()


@pytest.fixture
def bad_files(tmp_path, model_path):
    whole = model_path.read_bytes()
    (tmp_path / "folder").mkdir()
    for name, data in (
        ("empty", b""),
        ("text", b"hello\n" * 100),
        ("cut", whole[:3000]),
        ("changed", whole[:8] + bytes(16) + whole[24:]),
    ):
        (tmp_path / name).write_bytes(data)
    writer = gguf.GGUFWriter(tmp_path / "other", "llama")
    writer.add_tensor("output.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.symlink("nowhere", tmp_path / "dangling")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("name", ["missing", "folder", "empty", "text", "cut", "changed", "other", "dangling", "pipe"])
def test_files_that_are_no_model(bad_files, model_path, name):
    file, text, lines = bad_files / name, bad_files / "text", bad_files / "in.jsonl"
    lines.write_text('{"prompt": "a"}\n')
    commands = [
        ["generate", "-m", file, "-p", "a"],
        ["tokenize", "-m", file, "-p", "a"],
        ["score", "-m", file, "-p", "a b"],
        ["batch", lines, bad_files / "out.jsonl", "-m", file],
        ["bench", "-m", file],
        ["imatrix", "-m", file, "-f", text, "-o", bad_files / "out"],
        ["perplexity", "-m", file, "-f", text],
        ["perplexity", "-m", model_path, "-f", text, "--base-model", file],
        ["quantize", file, bad_files / "out", "q4_0"],
    ]
    for command in [*commands, *([["inspect", file]] if name not in ("other", "changed") else [])]:
        code, lines_of_errors = invoke(*command)
        assert (code, len(lines_of_errors)) == (1, 1), (command, lines_of_errors)
        assert lines_of_errors[0].startswith(f"error: {file}"), command
        assert not (bad_files / "out").exists()
        assert not (bad_files / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["missing", "folder", "empty"])
def test_files_that_are_no_text(bad_files, model_path, name):
    file = bad_files / name
    commands = [["generate"], ["score"], ["perplexity"], ["imatrix", "-o", bad_files / "out"]]
    for command in commands:
        code, errors = invoke(*command, "-m", model_path, "-f", file)
        assert (code, len(errors)) == (1, 1), (command, errors)
        assert "empty" in errors[0] or errors[0].startswith(f"error: {file}: ")


@pytest.mark.parametrize("what", ["model", "text"])
def test_the_output_is_none_of_the_inputs(model_path, tmp_path, what):
    """Through a link too; both are as they were."""
    model, text, link = tmp_path / "model", tmp_path / "text", tmp_path / "link"
    model.write_bytes(model_path.read_bytes())
    text.write_text('{"prompt": "a", "max_new_tokens": 2}\n' * 9)
    link.symlink_to(what)
    before = model.read_bytes(), text.read_bytes()
    for out in (tmp_path / what, link):
        for command in (
            ["imatrix", "-m", model, "-f", text, "-o", out],
            ["perplexity", "-m", model, "-f", text, "--save-logits", out],
            ["batch", text, out, "-m", model, "--overwrite"],
            *([["quantize", model, out, "q8_0"]] if what == "model" else []),
        ):
            code, errors = invoke(*command)
            assert (code, len(errors), "is an input" in errors[0]) == (1, 1, True), (command, errors)
            assert errors[0].count(str(tmp_path)) == (2 if out is link else 1)  # both names, if there are two
    with fixmin_cpp.Model(model) as loaded, pytest.raises(fixmin_cpp.ArgumentError, match="is an input"):
        loaded.save_state(model, "a cat")
    assert (model.read_bytes(), text.read_bytes()) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("folder", None, "a folder, not a GGUF file"),
        ("model.safetensors", b"", "weights of a checkpoint"),
        ("pointer.gguf", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("page.gguf", b"<!doctype html>", "an HTML page"),
        ("packed.gguf", b"\x1f\x8b\x08\0", "packed with gzip"),
        ("owner/name", b"", "owner/name: "),
    ],
)
def test_every_command_knows_what_was_given_instead_of_a_model(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    if content is None:
        Path(name).mkdir()
    elif "/" not in name:
        Path(name).write_bytes(content)
    Path("in").write_text('{"prompt": "a"}\n')
    for command in (
        ["generate", "-m", name, "-p", "a"],
        ["tokenize", "-m", name, "-p", "a"],
        ["inspect", name],
        ["quantize", name, "out", "q8_0"],
        ["batch", "in", "out", "-m", name],
    ):
        code, errors = invoke(*command)
        assert (code, len(errors)) == (1, 1), (command, errors)
        assert errors[0].startswith(f"error: {name}: "), errors
        assert message in errors[0], errors


NUMBERS = ["-1", "0", "-" + "9" * 30, "9" * 30, "9" * 5000, "nan", "inf", "-inf", "1e400", "0x10", "", "three"]
CALLS = {
    "generate": ["-m", "{model}", "-p", "a", "-q"],
    "score": ["-m", "{model}", "-p", "a cat", "-q"],
    "batch": ["{in}", "{out}", "-m", "{model}", "--overwrite", "-q"],
    "imatrix": ["-m", "{model}", "-f", "{text}", "-o", "{out}.gguf"],
    "perplexity": ["-m", "{model}", "-f", "{text}"],
}


def is_number(parameter) -> bool:
    kind = str(getattr(parameter, "type_descriptor", None) or parameter.type)
    return re.search("int|float|INTEGER|FLOAT", kind) is not None


def test_every_numeric_option_is_tried():
    assert sum(is_number(p) for p in COMMANDS["generate"].params) >= 35
    assert not any(is_number(p) for name in ("inspect", "tokenize") for p in COMMANDS[name].params)


@pytest.mark.parametrize("name", [pytest.param("generate", marks=pytest.mark.slow), *list(CALLS)[1:]])
def test_any_number_for_any_option(model, model_path, tmp_path, name, monkeypatch):
    """It works, or it is refused in one line that names what is wrong: usage (2), or the value (1)."""

    def loaded(path, *, quiet=False, **settings):  # once, where no setting asks for another one
        usual = {name: value for name, value in settings.items() if value not in (None, "f16")} == {}
        return contextlib.nullcontext(model) if usual else fixmin_cpp.Model(path, **settings)

    monkeypatch.setattr("fixmin_cpp.cli_output.load", loaded)
    files = {"model": model_path, "in": tmp_path / "in", "out": tmp_path / "out", "text": tmp_path / "text"}
    files["in"].write_text('{"prompt": "a", "max_new_tokens": 2}\n')
    files["text"].write_text("the cat " * 9)
    call = [part.format(**files) for part in CALLS[name]]
    for parameter in filter(is_number, COMMANDS[name].params):
        if name == "batch" and parameter.name in OPTIONS:
            continue  # as generate has them
        option = max(parameter.opts, key=len)
        for value in NUMBERS:
            code, errors = invoke(name, *call, f"{option}={value}")
            if code == 1:
                assert len(errors) == 1, (option, value[:40], errors)
                assert errors[0].startswith("error: "), (option, value[:40])
                assert "--debug" not in errors[0]
                assert len(errors[0]) < 400
            else:
                assert code in (0, 2), (option, value[:40], errors)


def test_wrong_usage_is_short_and_suggests():
    for arguments, meant in (
        (["generat"], "generate"),
        (["generate", "--temprature", "1"], "--temperature"),
        (["batch", "--fail-fats"], "--fail-fast"),
        (["generate", "-p", "a"], "--model"),
    ):
        code, errors = invoke(*arguments)
        assert (code, meant in errors[-1]) == (2, True), errors
        assert len(errors) <= 4


def test_options_given_twice_and_a_double_dash(letters_model):
    base = ["generate", "-m", letters_model.path, "-q", "-p", "ab"]
    result = fixmin(*base, "-p", "the cat", "-n", 1, "-n", 4)  # the last one counts, as everywhere
    assert result.stdout.decode() == letters_model.generate("the cat", max_new_tokens=4).text + "\n"
    assert invoke(*base, "--", "-n")[0] == 2
    assert invoke(*base[:-1], "-abc", "-n", 2)[0] == 0  # a prompt may begin with a dash


def test_very_long_and_binary_input(model_path):
    result = fixmin("generate", "-m", model_path, stdin=b"the cat " * 250_000)
    assert (result.returncode, result.stderr.count(b"\n")) == (1, 1)
    assert re.match(rb"error: prompt has \d+ tokens, but the context holds 64, ", result.stderr)
    result = fixmin("generate", "-m", model_path, stdin=bytes(range(256)) * 4096)
    assert result.stderr == b"error: stdin is not UTF-8: byte 0x80 at offset 128\n"


def test_extras_are_those_of_the_package():
    """Every package that an extra names is known under the name with which it is imported."""
    names = {"ggml-python": "ggml", "prometheus-client": "prometheus_client"}
    wanted: dict[str, set[str]] = {}
    for requirement in importlib.metadata.requires("fixmin-cpp"):
        match = re.fullmatch(r"([\w-]+).*extra == .(\w+)..*", requirement)
        if match and match[2] in EXTRAS and match[1] != "fixmin-cpp":  # which names another extra
            wanted.setdefault(match[2], set()).add(names.get(match[1], match[1]))
    assert wanted.keys() == EXTRAS.keys()
    for extra, packages in wanted.items():
        assert packages <= set(EXTRAS[extra]), extra


WITHOUT = [
    ("torch", "convert", ["convert", "{demo}", "-o", "{out}"]),
    ("transformers", "convert", ["convert", "{demo}", "-o", "{out}", "--trust-remote-code"]),
    ("safetensors", "convert", ["convert", "{demo}", "-o", "{out}", "--trust-remote-code"]),
    ("gguf", "convert", ["verify", "{model}", "{demo}"]),
    ("gguf", "quantize", ["quantize", "{model}", "{out}", "q8_0"]),
    ("ggml", "quantize", ["quantize", "{model}", "{out}", "q8_0"]),
    ("gguf", "quantize", ["imatrix", "-m", "{model}", "-f", __file__, "-o", "{out}"]),
    ("fastapi", "serve", ["serve", "{model}"]),
    ("uvicorn", "serve", ["serve", "{model}"]),
    ("prometheus_client", "serve", ["serve", "{model}"]),
    ("llguidance", "grammar", ["generate", "-m", "{model}", "-p", "a", "--regex", "a"]),
    ("ray", "ray", ["batch", "{in}", "{out}", "-m", "{model}", "--ray", "local"]),
]


@pytest.mark.parametrize(("package", "extra", "command"), WITHOUT)
def test_missing_package(model_path, tmp_path, package, extra, command):
    files = {"demo": DEMO, "out": tmp_path / "out", "model": model_path, "in": tmp_path / "in"}
    files["in"].write_text('{"prompt": "a"}\n')
    code = f"import sys; sys.modules[{package!r}] = None; from fixmin_cpp.cli import main; main()"
    filled = [part.format(**files) for part in command]
    result = subprocess.run([sys.executable, "-c", code, *filled], capture_output=True, timeout=TIMEOUT, check=False)
    *before, last = result.stderr.decode().splitlines()
    assert result.returncode == 1
    assert re.search(rf"needs (the Python package )?'?{package}'?: pip install 'fixmin-cpp\[{extra}\]'", last)
    assert [line for line in before if not line.startswith("starting the converter")] == []
    assert not files["out"].exists()
