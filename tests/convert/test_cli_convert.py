"""Conversion from the command line: output, exit codes, and that interrupted or failed runs leave nothing behind."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from spec_factory import make_reference, save_checkpoint

import fixmin_cpp
from fixmin_cpp import _core
from fixmin_cpp.convert import command_line as module
from fixmin_cpp.convert import convert as converter
from fixmin_cpp.convert.certify import open_engine
from fixmin_cpp.convert.command_line import main, verify_main
from fixmin_cpp.convert.convert import CertificationError, ConsoleReporter, Reporter, convert
from fixmin_cpp.convert.gguf_file.formats import OUT_TYPES
from fixmin_cpp.errors import ArgumentError, CheckpointError

SCRIPT = Path(module.__file__).with_name("hf_to_gguf.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint that no test may change."""
    folder = save_checkpoint(make_reference(code_kind="affine"), tmp_path_factory.mktemp("cli") / "tiny")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    yield folder
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != "__pycache__"} == before


pytestmark = pytest.mark.usefixtures("one_thread")


def wrong_engine(path, n_ctx):
    """An engine whose logits are 10 % too large."""

    class Wrong:
        def __init__(self):
            self.engine = open_engine(path, n_ctx)
            self.codes, self.hidden_states, self.close = self.engine.codes, self.engine.hidden_states, self.engine.close

        def logits(self, ids):
            return self.engine.logits(ids) * 1.1

    return Wrong()


@pytest.mark.parametrize("outtype", OUT_TYPES)
def test_conversion(checkpoint, tmp_path, capsys, outtype):
    out = tmp_path / "m.gguf"
    assert main([str(checkpoint), "-o", str(out), "--outtype", outtype, "--trust-remote-code"]) == 0
    text = capsys.readouterr().out
    assert "rope_style = half (" in text, "every convention with where it came from"
    assert re.search(r"ok +codes +0 \(limit 0\) mismatches in all 100 token ids", text)
    assert f"wrote {out}" in text
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    metadata = _core.GgufFile(str(out)).metadata
    assert metadata["fixmin.convert.certificate.passed"] is True
    assert metadata["fixmin.convert.source"] == "tiny"
    assert any(line.startswith("rope_style = half (") for line in metadata["fixmin.convert.conventions"])
    assert verify_main([str(out), str(checkpoint), "--trust-remote-code"]) == 0
    assert "m.gguf: certified" in capsys.readouterr().out


def test_report(checkpoint, tmp_path):
    report = convert(checkpoint, tmp_path / "m.gguf", "q4_0", trust_remote_code=True)
    assert report.path == tmp_path / "m.gguf"
    assert report.n_bytes == report.path.stat().st_size
    assert report.n_weights == report.certificate.weights
    assert report.types == {"F32": 15, "Q8_0": 3, "Q4_0": 10}
    assert sorted(report.notes) == [
        f"blk.0.attn_{name}.weight is stored as Q8_0: layer 0 is folded at load" for name in "kqv"
    ]
    assert report.certificate.passed
    assert report.quantise_s > 0


def test_the_package_is_called(checkpoint, tmp_path):
    """fixmin_cpp.convert() as its docstring shows it: what it writes computes what the checkpoint computes."""
    lines = []
    out = tmp_path / "m.gguf"
    report = fixmin_cpp.convert(checkpoint, out, "F32", trust_remote_code=True, log=lines.append, n_threads=-1)
    assert (report.path, report.outtype, report.certificate.passed) == (out, "f32", True)
    assert any(line.startswith("rope_style = half (") for line in lines)
    ids = [5, 17, 99, 0]
    with torch.no_grad():
        expected = make_reference(code_kind="affine")(torch.tensor([ids])).logits[0].numpy()
    with fixmin_cpp.Model(out, kv_type="f32") as model:
        np.testing.assert_allclose(model.logits(ids), expected, atol=1e-3 * np.abs(expected).max())
    with pytest.raises(fixmin_cpp.ArgumentError, match="n_threads must be between -1 and 1024, got -2"):
        fixmin_cpp.convert(checkpoint, tmp_path / "other.gguf", trust_remote_code=True, n_threads=-2)
    assert fixmin_cpp.convert(checkpoint, tmp_path / "b.gguf", trust_remote_code=True).outtype == "q8_0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.gguf", "m.gguf"]


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        convert(checkpoint, tmp_path / name, "q8_0", trust_remote_code=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_default_names(checkpoint, tmp_path, monkeypatch):
    report = convert(checkpoint, tmp_path, "f16", trust_remote_code=True)
    assert report.path == tmp_path / "tiny-F16.gguf"
    beside = save_checkpoint(make_reference(), tmp_path / "beside")
    assert convert(beside, None, "q8_0", trust_remote_code=True).path == beside / "beside-Q8_0.gguf"
    monkeypatch.chdir(tmp_path)
    assert convert(beside, "here.gguf", "q8_0", trust_remote_code=True).path == Path("here.gguf")


# --- what must not happen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_an_uncertified_file_never_has_the_name(checkpoint, tmp_path, monkeypatch, capsys, keep):
    out = tmp_path / "m.gguf"
    out.write_bytes(b"what was there")
    convert_ = lambda *args, **options: convert(*args, open_runner=wrong_engine, **options)  # noqa: E731
    monkeypatch.setattr(module, "convert", convert_)
    arguments = [str(checkpoint), "-o", str(out), "--trust-remote-code"]
    assert main([*arguments, "--keep-uncertified"] if keep else arguments) == 1
    captured = capsys.readouterr()
    assert re.search(r"FAILED logits", captured.out)
    assert "certification failed" in captured.err
    assert out.read_bytes() == b"what was there"
    kept = [p for p in tmp_path.iterdir() if p != out]
    assert [p.name for p in kept] == (["m.gguf.uncertified"] if keep else [])
    if keep:
        assert "m.gguf.uncertified" in captured.err
        assert _core.GgufFile(str(kept[0])).metadata["fixmin.convert.certificate.passed"] is False


def test_the_error_carries_the_certificate(checkpoint, tmp_path):
    with pytest.raises(CertificationError) as caught:
        convert(checkpoint, tmp_path / "m.gguf", "q8_0", trust_remote_code=True, open_runner=wrong_engine)
    assert not caught.value.certificate.passed
    assert caught.value.certificate.code_mismatches == 0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "modeling_fixmin.py"])
def test_an_input_is_not_overwritten(checkpoint, tmp_path, name):
    link = tmp_path / "link"
    link.symlink_to(checkpoint / name)
    for out in (checkpoint / name, link):
        with pytest.raises(CheckpointError, match="part of the checkpoint"):
            convert(checkpoint, out, trust_remote_code=True)


def test_weights_are_not_overwritten_through_a_link_with_the_name_of_a_model(checkpoint, tmp_path):
    weights = (checkpoint / "model.safetensors").read_bytes()
    for link in (tmp_path / "link.gguf", tmp_path / "other.gguf.uncertified", checkpoint / "inside.gguf"):
        link.symlink_to(checkpoint / "model.safetensors")
        with pytest.raises(CheckpointError, match="part of the checkpoint"):
            convert(checkpoint, str(link).removesuffix(".uncertified"), trust_remote_code=True)
        link.unlink()
    assert (checkpoint / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["calibrate", "map_file", "affine"])
@pytest.mark.parametrize("out", ["given", "given.uncertified", ".given.partial"])
def test_other_inputs_are_not_overwritten(checkpoint, tmp_path, name, out):
    given = tmp_path / out
    given.write_bytes(b"mine")
    others = {"overrides": {"affine": (str(given), "b.npy")}} if name == "affine" else {name: given}
    with pytest.raises(ArgumentError, match=re.escape(out)):
        convert(checkpoint, tmp_path / "given", **others)
    assert given.read_bytes() == b"mine"
    assert os.listdir(tmp_path) == [out]


def test_a_checkpoint_that_changes_meanwhile(checkpoint, tmp_path):
    class Changing(Reporter):
        @contextlib.contextmanager
        def progress(self, title):
            os.utime(checkpoint / "model.safetensors", (1, 1))
            yield lambda *done: None

    with pytest.raises(CheckpointError, match=r"model.safetensors: was changed while it was converted"):
        convert(checkpoint, tmp_path / "m.gguf", trust_remote_code=True, reporter=Changing())
    assert os.listdir(tmp_path) == []


def test_bad_paths(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        convert(tmp_path / "missing", tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="no such folder"):
        convert(checkpoint, tmp_path / "missing" / "m.gguf")
    with pytest.raises(CheckpointError, match="outtype"):
        convert(checkpoint, tmp_path / "m.gguf", "q3_k")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        convert(tmp_path / "empty", tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(checkpoint, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            convert(checkpoint, tmp_path / "m.gguf", trust_remote_code=True)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("command", [main, verify_main])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: .*checkpoint_dir"),
        (["x", "y", "z"], "unexpected argument '[yz]'"),
        (["x", "y", "--outtpye", "q8_0"], "no such option: --outtpye"),
        (["x", "y", "--alow-missing=z"], r"no such option: --alow-missing=z \(did you mean --allow-missing\?\)"),
        (["x", "y", "--lift", "sideways"], "--lift: invalid choice: 'sideways'"),
        (["x", "y", "--rope-dim", "many"], "--rope-dim: invalid int value: 'many'"),
        (["x", "y", "--affine", "a.npy"], "--affine: expected 2 arguments"),
        (["x", "y", "--lift", "\x1b[31m"], r"\\x1b\[31m"),
    ],
)
def test_wrong_usage(command, arguments, message, capsys):
    """Two lines: what is wrong, and where to read more."""
    with pytest.raises(SystemExit) as caught:
        command(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert re.search(message, first), first
    assert first.startswith("error: ")
    assert re.fullmatch(r"fixmin (convert|verify) --help shows how to use it", second)
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--outtype", "q9"], "q9"),
        (["x", "--threads", "-2"], "between -1 and 1024"),
        (["x", "--outtpye", "f32"], "--outtype"),
    ],
)
def test_wrong_usage_of_convert(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert (caught.value.code, message in capsys.readouterr().err) == (2, True)


def test_options_reach_resolve(checkpoint, tmp_path, monkeypatch):
    seen = {}

    def stop(folder, **options):
        seen.update(options)
        raise CheckpointError("seen")

    monkeypatch.setattr(converter, "resolve", stop)
    arguments = [
        "--lift",
        "tile",
        "--values",
        "-1",
        "1",
        "--affine",
        "a.npy",
        "b.npy",
        "--rope-base",
        "500",
        "--no-transposed",
        "--map",
        "m.json",
    ]
    with pytest.raises(CheckpointError, match="seen"):
        main([str(checkpoint), "-o", str(tmp_path / "m.gguf"), "--calibrate", "text.txt", *arguments])
    assert seen["trust_remote_code"] is False
    assert seen["map_file"] == Path("m.json")
    assert seen["calibrate"] == Path("text.txt")
    assert seen["overrides"] == {
        "lift": "tile",
        "values": (-1.0, 1.0),
        "affine": ("a.npy", "b.npy"),
        "rope_base": 500.0,
        "transposed": False,
    }


# --- processes --------------------------------------------------------------------------------------------------


def start(checkpoint: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, checkpoint, "-o", out, "--outtype", "q8_0", "--trust-remote-code", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_script_in_a_pipe(checkpoint, tmp_path):
    process = start(checkpoint, tmp_path / "m.gguf")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert err in ("", "starting the converter: PyTorch and transformers take some seconds ...\n")  # if they do
    assert "\x1b" not in out
    assert "\r" not in out
    assert "writing q8_0 ..." in out
    assert out.rstrip().splitlines()[-1].startswith(f"wrote {tmp_path / 'm.gguf'}")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["hashing the weights", "writing q8_0", "comparing weights", "own code"])
def test_killed_at_any_step_there_is_no_output(checkpoint, tmp_path, step):
    out = tmp_path / "m.gguf"
    process = start(checkpoint, out)
    for line in process.stdout:
        if step in line and line.endswith("...\n"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it was still running"
    assert not out.exists()
    assert {p.name for p in tmp_path.iterdir()} <= {".m.gguf.partial"}
    convert(checkpoint, out, "q8_0", trust_remote_code=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_there_is_nothing(checkpoint, tmp_path, number, code):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests below nohup would hand on that it is ignored
    try:
        process = start(checkpoint, tmp_path / "m.gguf")
    finally:
        signal.signal(signal.SIGHUP, before)
    for line in process.stdout:
        if "running the engine" in line:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_verify_of_a_wrong_file_exits_with_one(checkpoint, tmp_path, capsys):
    other = save_checkpoint(make_reference(seed=1, code_kind="affine"), tmp_path / "other")
    out = convert(other, tmp_path / "m.gguf", trust_remote_code=True).path
    assert verify_main([str(out), str(checkpoint), "--trust-remote-code"]) == 1
    text = capsys.readouterr().out
    assert "NOT certified" in text
    assert "SHA-256" in text


def test_script_without_the_package():
    """-I -S: an interpreter without site-packages, and so without fixmin_cpp."""
    command = [sys.executable, "-I", "-S", str(SCRIPT), "x"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "fixmin_cpp is not installed" in result.stderr
    assert "pip install" in result.stderr
    assert "Traceback" not in result.stderr


def test_reporter_escapes_what_a_checkpoint_says():
    stream = io.StringIO()
    ConsoleReporter(Console(file=stream)).line("tensor \x1b[31mred\n[bold]x[/bold]")
    assert stream.getvalue() == "tensor \\x1b[31mred\\n[bold]x[/bold]\n"


def test_progress_bar_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, highlight=False)
    with ConsoleReporter(console).progress("writing q8_0") as progress:
        for done in range(1, 4):
            progress(done, 3, "blk.0.[red]attn_q.weight")
            time.sleep(0.01)
    text = stream.getvalue()
    assert "writing q8_0" in text
    assert "100%" in text
    assert "[red]" in text
