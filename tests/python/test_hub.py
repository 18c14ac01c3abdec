"""Models by their names: the hub (a stand-in of its HTTP interface), folders, the cache, the question about code."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixmin_cli import TIMEOUT, fixmin
from hub_server import Hub

import fixmin_cpp
from fixmin_cpp import ArgumentError, CheckpointError, hub
from fixmin_cpp.atomic_file import AtomicFile

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
CONFIG = b'{"architectures": ["M"]}'
# What a converter would be: takes half a second, notes that it ran, and writes a model that was made before.
FAKE = """
import os, shutil, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("-o") + 1])
with open({runs!r}, "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
partial = out.with_name("." + out.name + ".partial")
partial.write_bytes(b"GGUF")
time.sleep({seconds})
if "broken" in Path(sys.argv[2], "config.json").read_text():
    sys.exit("error: this model is broken")
shutil.copy({model!r}, out)
partial.unlink()
"""


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("FIXMIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Faked:
    """The command with a converter that is none, and what it was asked for."""

    def __init__(self, model: Path, runs: Path, seconds: float = 0.0) -> None:
        self.runs = runs
        self.converter = FAKE.format(runs=str(runs), model=str(model), seconds=seconds)
        code = f"from fixmin_cpp import hub; hub._CONVERT = {self.converter!r}; from fixmin_cpp.cli import main; main()"
        self.command = [sys.executable, "-c", code]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
        )

    def conversions(self) -> list[str]:
        return self.runs.read_text().splitlines() if self.runs.exists() else []


@pytest.fixture
def faked(model_path, tmp_path, cache) -> Faked:
    return Faked(model_path, tmp_path / "runs")


def left_in(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.parent.name != "locks")


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "revision", "dtype"),
    [
        ("owner/name", "owner/name", None, None),
        ("hf.co/owner/name:Q4_0", "owner/name", None, "Q4_0"),
        ("https://huggingface.co/owner/name", "owner/name", None, None),
        ("https:/huggingface.co/owner/name/", "owner/name", None, None),  # as pathlib writes it
        ("owner/name@v1.0:f16", "owner/name", "v1.0", "f16"),
        ("owner/na.me@refs/pr/3", "owner/na.me", "refs/pr/3", None),
        ("./owner/name", None, None, None),
        ("owner/name/more", None, None, None),
        ("name", None, None, None),
        ("owner/model.gguf", None, None, None),
        ("tests/nothing", None, None, None),  # a folder of that name is here
    ],
)
def test_names(text, name, revision, dtype, monkeypatch):
    monkeypatch.chdir(DEMO.parents[1])
    found, named = hub._split(text, None, None)
    assert found == name
    if name:
        assert named == {"revision": revision, "dtype": dtype}


def test_what_is_said_twice_must_agree():
    assert hub._split("a/b:q4_0", "Q4_0", "v1")[1] == {"dtype": "q4_0", "revision": "v1"}
    with pytest.raises(ArgumentError, match="dtype is 'f16' and 'a/b:q4_0' names 'q4_0'"):
        hub._split("a/b:q4_0", "f16", None)


def test_a_file_is_taken_as_it_is(model_path, cache):
    assert hub.find(model_path).path == model_path
    for argument in ("dtype", "revision"):
        with pytest.raises(ArgumentError, match=f"{argument} is 'q8_0'.*is a file"):
            hub.find(model_path, **{argument: "q8_0"})
    assert not cache.exists()


def test_what_is_nothing(tmp_path, cache):
    for wrong in (tmp_path / "none.gguf", tmp_path / "no" / "folder"):
        with pytest.raises(FileNotFoundError, match="No such file"):
            hub.find(wrong)
    with pytest.raises(CheckpointError, match=r"no checkpoint: it has no config\.json"):
        hub.find(tmp_path)
    for wrong in ("../../x", "nope"):  # before anything takes long
        with pytest.raises(ArgumentError, match=r"dtype must be one of f32, .*, got"):
            hub.find(tmp_path, dtype=wrong)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe or device"):
        hub.find(tmp_path / "pipe")


def test_types_are_those_of_quantize():
    from fixmin_cpp.quantization.requantize import TYPES

    assert sorted(hub.DTYPES) == sorted(TYPES)


def test_a_folder_hides_a_repository(tmp_path, cache, monkeypatch):
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a repository of the hub is hf\.co/owner/name"):
        hub.find("owner/name")


# --- the hub --------------------------------------------------------------------------------------------------------


def test_files_of_gguf(server, cache, model_path, long_model_path):
    small, large = model_path.read_bytes(), long_model_path.read_bytes()
    server.add("o/one", "main", {"README.md": b"", "x.gguf": small})
    server.add("o/two", "main", {"x-Q8_0.gguf": small, "x-F32.gguf": large})
    wanted = fixmin("generate", "-m", model_path, "-p", "ab", "-n", "4", "-q").stdout
    assert fixmin("run", "o/one", "ab", "-n", "4", "-q").stdout == wanted
    assert fixmin("generate", "-m", "o/two", "-p", "ab", "-n", "4", "-q").stdout == wanted
    assert not any("F32" in request for request in server.requests)
    assert Path(fixmin("pull", "o/two:f32", "-q").stdout.decode().strip()).read_bytes() == large
    failed = fixmin("run", "o/two:q4_0", "ab")
    assert failed.returncode == 1
    assert b"dtype is q4_0, and the files are x-F32.gguf, x-Q8_0.gguf" in failed.stderr
    assert Path(fixmin("pull", "o/two:x-F32.gguf", "-q").stdout.decode().strip()).read_bytes() == large
    server.add("o/odd", "main", {"x[1]*-Q8_0.gguf": small})
    assert fixmin("run", "o/odd", "ab", "-n", "4", "-q").stdout == wanted
    assert left_in(cache) == []


def test_what_the_hub_does_not_have(server, cache, monkeypatch):
    server.add("o/m", "main", {"README.md": b""})
    server.add("o/gated", "main", {"README.md": b""})
    server.gated.add("o/gated")
    for name, message in {
        "o/none": "the hub has no such repository; if it is private",
        "o/m@v9": "the hub has no revision 'v9'",
        "o/gated": "is gated: accept its conditions at",
        "o/m": "neither a config.json nor a GGUF file",
    }.items():
        failed = fixmin("run", name, "ab")
        assert (failed.returncode, failed.stdout) == (1, b"")
        assert message in failed.stderr.decode()
        assert failed.stderr.count(b"\n") == 1
    monkeypatch.setenv("HF_TOKEN", "let-me-in")
    assert b"neither a config.json" in fixmin("run", "o/gated", "ab").stderr


def test_converted_once(server, faked, cache):
    first = server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"1", "pytorch_model.bin": b"1"})
    done = faked("run", "o/m", "ab", "-n", "2")
    assert done.returncode == 0, done.stderr
    assert not any("pytorch_model" in request for request in server.requests)  # the same weights once more
    assert f"models/o--m/{first[:12]}/m-Q8_0.gguf" in faked.conversions()[0]
    assert "--trust-remote-code" not in faked.conversions()[0]  # there is no code
    again = faked("run", "o/m", "ab", "-n", "2")
    assert again.stdout == done.stdout
    assert faked("run", "o/m:q4_0", "ab", "-n", "2").stdout == done.stdout
    assert len(faked.conversions()) == 2
    assert left_in(cache) == ["m-Q4_0.gguf", "m-Q4_0.json", "m-Q8_0.gguf", "m-Q8_0.json"]

    # The branch goes on; what it was is still to be had, by its commit and by a tag.
    server.revisions["o/m", "v1"] = first
    second = server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"2"})
    paths = [faked("pull", f"o/m{at}", "-q").stdout.strip() for at in ("", f"@{first}", "@v1", "@main")]
    assert [Path(path).parent.name for path in paths] == [second[:12], first[:12], first[:12], second[:12]]
    assert len(faked.conversions()) == 3

    # Without a network: what the names meant when the hub was asked last.
    server.requests.clear()
    offline = [faked("pull", f"o/m{at}", "-q", "--offline").stdout.strip() for at in ("", f"@{first[:12]}", "@v1")]
    assert offline == paths[:3]
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    unreached = faked("pull", "o/m@v1")
    assert unreached.stdout.strip() == paths[2]
    assert "the hub could not be reached" in unreached.stderr
    failed = faked("pull", "o/m@v7", "--offline")
    assert "revision v7 is in no cache on this machine, and the hub gives no answer" in failed.stderr
    assert server.requests == []
    assert len(faked.conversions()) == 3


def test_serve_takes_a_name(server, faked, tmp_path):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fixmin_cpp.serve")
    server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"1"})
    address = tmp_path / "socket"
    with subprocess.Popen([*faked.command, "serve", "o/m", "--uds", address], stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + TIMEOUT
            while not address.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            transport = httpx.HTTPTransport(uds=str(address))
            with httpx.Client(transport=transport, base_url="http://x", timeout=30) as client:
                answer = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2})
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=TIMEOUT)[1].decode()
    assert (answer.status_code, process.returncode) == (200, 0), said
    assert answer.json()["usage"]["completion_tokens"] == 2
    assert len(faked.conversions()) == 1


def test_converted_without_a_network_from_what_was_downloaded(server, faked):
    server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"1"})
    faked("pull", "o/m", "-q")
    done = faked("pull", "o/m:f16", "-q", "--offline")
    assert done.returncode == 0, done.stderr
    assert len(faked.conversions()) == 2


def test_a_conversion_that_fails_leaves_nothing(server, faked, cache):
    server.add("o/m", "main", {"config.json": b'"broken"', "model.safetensors": b"1"})
    failed = faked("run", "o/m", "ab")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].endswith("the conversion failed (exit code 1): this model is broken")
    assert left_in(cache) == []
    assert fixmin("cache", "list").stdout == b""


@pytest.mark.slow
def test_killed_in_the_middle(server, model_path, tmp_path, cache):
    server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"1"})
    slow = Faked(model_path, tmp_path / "runs", seconds=60)
    with subprocess.Popen([*slow.command, "pull", "o/m"], start_new_session=True, stderr=subprocess.PIPE) as process:
        while not slow.conversions():
            time.sleep(0.05)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    assert left_in(cache) == [".m-Q8_0.gguf.partial"]
    assert fixmin("cache", "list").stdout == b""
    assert Faked(model_path, tmp_path / "more")("pull", "o/m").returncode == 0
    assert left_in(cache) == ["m-Q8_0.gguf", "m-Q8_0.json"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(server, model_path, tmp_path, cache, number):
    server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"1"})
    slow = Faked(model_path, tmp_path / "runs", seconds=60)
    with subprocess.Popen([*slow.command, "pull", "o/m"], start_new_session=True, stderr=subprocess.PIPE) as process:
        while not slow.conversions():
            time.sleep(0.05)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    assert left_in(cache) == []


@pytest.mark.slow
def test_two_at_once_convert_once(server, model_path, tmp_path, cache):
    server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"1"})
    slow = Faked(model_path, tmp_path / "runs", seconds=2)
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [threading.Thread(target=lambda: results.append(slow("pull", "o/m"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.returncode for r in results] == [0, 0]
    assert results[0].stdout == results[1].stdout
    assert len(slow.conversions()) == 1


@pytest.mark.slow
def test_a_download_that_breaks_goes_on(server, faked, cache):
    server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": bytes(300_000)})
    server.breaks_after = 1000
    failed = faked("pull", "o/m")
    assert failed.returncode == 1
    assert "the download failed" in failed.stderr
    assert "the same command goes on with it" in failed.stderr
    assert left_in(cache) == []
    server.breaks_after = None
    assert faked("pull", "o/m").returncode == 0


# --- code of a model ------------------------------------------------------------------------------------------------


def with_code(version: str) -> dict[str, bytes]:
    return {"config.json": CONFIG, "modeling_m.py": f"print({version!r})".encode(), "model.safetensors": b"1"}


def test_code_does_not_run_without_a_yes(server, faked, cache):
    server.add("o/m", "main", with_code("1"))
    failed = faked("run", "o/m", "ab")
    assert failed.returncode == 1
    assert "comes with Python code, which was not run: modeling_m.py" in failed.stderr
    assert faked.conversions() == []
    assert not any("safetensors" in request for request in server.requests)  # asked before much is downloaded
    assert left_in(cache) == []
    done = faked("run", "o/m", "ab", "-n", "2", "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert faked.conversions()[0].endswith("--trust-remote-code")
    assert faked("run", "o/m", "ab").returncode == 0  # nothing runs any more
    assert "was not run" in faked("run", "o/m:f16", "ab").stderr  # a yes for one conversion


def answered(command: list[str], answer: str) -> tuple[int, str]:
    """Exit code and screen of a command on a terminal on which someone answers its question."""
    pid, screen = pty.fork()
    if pid == 0:
        os.execve(command[0], command, {**os.environ, "TERM": "dumb"})
    shown, sent = b"", False
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            if select.select([screen], [], [], 1)[0]:
                shown += os.read(screen, 4096)
        except OSError:  # Linux: the program has ended
            break
        if b"[y/N]" in shown and not sent:
            sent = True
            os.write(screen, f"{answer}\n".encode())
    os.close(screen)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()


def test_a_yes_counts_for_nothing_else(tmp_path, cache, monkeypatch):
    """Whatever the name of a folder holds: a line feed and the digest of another checkpoint, say."""
    monkeypatch.setattr(hub, "_convert", lambda entry, *rest: entry.path.write_bytes(b"GGUF"))

    def checkpoint(name, code):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes(CONFIG)
        (folder / "modeling.py").write_text(code)
        return folder

    evil = checkpoint("evil", "evil")
    digest = hub.code_of(evil, "evil").digest
    for separator in ("\n", "\r", "\u2028", "\x85", "\udce9\n"):
        nice = checkpoint(f"nice{separator}{digest} x", "nice")
        hub.find(nice, trust_remote_code=lambda code: True)
        hub.find(nice)  # the yes is remembered
        with pytest.raises(CheckpointError, match="comes with Python code, which was not run"):
            hub.find(evil)


def test_a_note_that_another_process_writes(tmp_path, cache):
    entry = hub._Entry(tmp_path / "models", "m", "q8_0")
    entry.folder.mkdir()
    entry.path.write_bytes(b"GGUF")
    entry.finish("o/m", None, None)
    with AtomicFile(entry._facts):
        entry.note("main")
    assert entry.complete()
    entry.note("main")
    assert list(hub._facts(entry._facts)["seen"]) == ["main"]


def test_a_conversion_that_goes_on_is_not_removed(tmp_path, cache):
    """That of a folder as it is by now, or was; what is left of others goes."""
    entries = [hub._Entry(cache / "models" / "m--1" / key, "m", dtype) for key in "abc" for dtype in ("f32", "q4_k_m")]
    for entry in entries[::2]:
        entry.folder.mkdir(parents=True)
    with entries[1].writing(lambda line: None):
        hub._remove_older(entries[2], "m")
        assert [entry.folder.exists() for entry in entries[::2]] == [True, True, False]
    entries[0].folder.mkdir(exist_ok=True)
    hub._remove_older(entries[2], "m")
    assert [entry.folder.exists() for entry in entries[::2]] == [False, True, False]


def test_nobody_has_no_home(monkeypatch, cache):
    monkeypatch.delenv("FIXMIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(FileNotFoundError, match="there is no home directory: FIXMIN_CACHE"):
        hub.cache_folder()


def test_the_question(server, faked, cache):
    server.add("o/m", "main", with_code("1"))
    code, screen = answered([*faked.command, "pull", "o/m"], "n")
    assert code == 1
    assert "o/m at" in screen
    assert f"{hub._sha256_of(with_code('1')['modeling_m.py'])}  modeling_m.py" in screen
    assert faked.conversions() == []
    assert left_in(cache) == []
    code, screen = answered([*faked.command, "pull", "o/m"], "y")
    assert code == 0, screen
    assert len(faked.conversions()) == 1
    assert faked("pull", "o/m:f16").returncode == 0  # the same code needs no second yes
    server.add("o/m", "main", with_code("2"))
    assert "was not run: modeling_m.py" in faked("pull", "o/m").stderr  # other code does


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_is_converted_again_when_it_changes(faked, tmp_path, cache):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(b"1")
    first = faked("pull", str(folder)).stdout.strip()
    assert faked("pull", str(folder)).stdout.strip() == first
    assert len(faked.conversions()) == 1
    (folder / "model.safetensors").write_bytes(b"22")
    second = faked("pull", str(folder)).stdout.strip()
    assert second != first
    assert not Path(first).exists()
    assert len(faked.conversions()) == 2
    assert "is a folder, which has none" in faked("pull", str(folder), "--revision", "v1").stderr


def test_a_folder_and_a_type_in_every_command(faked, tmp_path, cache):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(b"1")
    for command in (["generate", "-n", "2", "-p", "ab", "-q", "-m"], ["score", "-p", "the cat", "-m"], ["inspect"]):
        done = faked(*command, f"{folder}:q4_0")
        assert done.returncode == 0, done.stderr
    assert len(faked.conversions()) == 1
    assert left_in(cache) == ["checkpoint-Q4_0.gguf", "checkpoint-Q4_0.json"]
    assert "dtype must be one of" in faked("inspect", f"{folder}:q17").stderr


def test_a_folder_of_gguf_files(tmp_path, model_path, cache):
    shutil.copy(model_path, tmp_path / "a-Q8_0.gguf")
    assert hub.find(tmp_path).path == tmp_path / "a-Q8_0.gguf"
    shutil.copy(model_path, tmp_path / "a-F32.gguf")
    assert hub.find(tmp_path, dtype="F32").path == tmp_path / "a-F32.gguf"
    with pytest.raises(ArgumentError, match="name one of them"):
        hub.find(tmp_path, dtype="q4_0")


def test_from_pretrained(tmp_path, model_path, cache, monkeypatch):
    faked = Faked(model_path, tmp_path / "runs")
    monkeypatch.setattr(hub, "_CONVERT", faked.converter)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, data in with_code("1").items():
        (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        fixmin_cpp.Model.from_pretrained(folder)
    with fixmin_cpp.Model.from_pretrained(folder, "f16", trust_remote_code=True, n_ctx=16) as model:
        assert model.n_ctx == 16
        assert "--outtype f16" in faked.conversions()[0]
    with fixmin_cpp.Model.from_pretrained(model_path) as model:
        assert model.path == str(model_path)
    with pytest.raises(fixmin_cpp.ArgumentTypeError):
        fixmin_cpp.Model.from_pretrained(folder, trust_remote_code="yes")


# --- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cache_commands(server, faked, cache):
    commits = [
        server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"1"}),
        server.add("o/n", "main", {"config.json": CONFIG, "model.safetensors": b"2"}),
    ]
    for name in ("o/m", "o/m:f16", "o/n"):
        assert faked("pull", name).returncode == 0
    listed = json.loads(fixmin("cache", "list", "--json").stdout)
    assert [(m["source"], m["commit"], m["dtype"]) for m in listed] == [
        ("o/m", commits[0], "q8_0"),
        ("o/m", commits[0], "f16"),
        ("o/n", commits[1], "q8_0"),
    ]
    assert all(m["n_bytes"] == Path(m["path"]).stat().st_size and m["revisions"] == ["main"] for m in listed)
    assert [line.split("  ")[0] for line in fixmin("cache", "list").stdout.decode().splitlines()] == [
        f"o/m@{commits[0][:12]}:q8_0",
        f"o/m@{commits[0][:12]}:f16",
        f"o/n@{commits[1][:12]}:q8_0",
    ]
    for wrong in ("o/none", "o/m@ai", f"o/m@{commits[0][:3]}", "o/m:f32"):
        failed = fixmin("cache", "rm", "o/m:f16", wrong)
        assert failed.returncode == 1
        assert f"'{wrong}' is not in the cache".encode() in failed.stderr
    assert len(hub.cached_models()) == 3
    assert fixmin("cache", "rm", "o/m:f16").returncode == 0
    assert fixmin("cache", "rm", f"hf.co/o/n@{commits[1][:8]}").returncode == 0
    assert [m.dtype for m in hub.cached_models()] == ["q8_0"]
    assert fixmin("cache", "rm").returncode == 1
    assert fixmin("cache", "rm", "--all").returncode == 0
    assert left_in(cache) == []
    assert list((cache / "models").iterdir()) == []


@pytest.mark.slow
def test_damaged_entries_are_made_again(server, faked, cache):
    server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"1"})
    path = Path(faked("pull", "o/m", "-q").stdout.strip())
    facts = path.with_suffix(".json")
    whole = json.loads(facts.read_text())
    for n, damage in enumerate(("", "[]", "null", json.dumps({**whole, "seen": {"main": "x"}}), None), 2):
        if damage is None:
            os.truncate(path, 100)
        else:
            facts.write_text(damage)
        assert fixmin("cache", "list").stdout == b""
        done = faked("pull", "o/m", "-q")
        assert done.returncode == 0, done.stderr
        assert len(faked.conversions()) == n
    facts.write_text("")
    assert fixmin("cache", "rm", "--all").returncode == 0
    assert not path.exists()
    (cache / "trusted").write_bytes(b"\xff\n")
    server.add("o/code", "main", with_code("1"))
    assert "was not run" in faked("pull", "o/code").stderr


@pytest.mark.slow
def test_who_waits_for_one_that_is_interrupted_converts(server, model_path, tmp_path, cache):
    server.add("o/m", "main", {"config.json": CONFIG, "model.safetensors": b"1"})
    slow = Faked(model_path, tmp_path / "runs", seconds=60)
    with subprocess.Popen([*slow.command, "pull", "o/m"], start_new_session=True, stderr=subprocess.PIPE) as first:
        while not slow.conversions():
            time.sleep(0.05)
        quick = Faked(model_path, tmp_path / "more")
        command = [*quick.command, "pull", "o/m"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second:
            assert "waiting for it" in second.stderr.readline()
            os.killpg(first.pid, signal.SIGINT)
            first.communicate(timeout=TIMEOUT)
            out, _ = second.communicate(timeout=TIMEOUT)
    assert second.returncode == 0
    assert Path(out.strip()).is_file()


@pytest.mark.parametrize(("status", "message"), [(401, "is the token right"), (403, "is the token right"), (503, "")])
def test_a_hub_that_refuses(server, cache, status, message):
    server.refuses = status
    failed = fixmin("run", "o/m", "ab")
    assert failed.returncode == 1
    assert f"HTTP status {status}" in failed.stderr.decode()
    assert message in failed.stderr.decode()


# --- all of it ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_nothing_to_paris(server, cache):
    server.add_folder("bochkov/affine", "main", DEMO / "affine")
    question = "Question: What is the capital of France?\\nAnswer:"
    done = fixmin("run", "bochkov/affine", question, "--trust-remote-code")
    assert (done.returncode, done.stdout) == (0, b" Paris\n"), done.stderr
    assert b"certified against the checkpoint's own code" in done.stderr
    server.requests.clear()
    again = fixmin("run", "bochkov/affine", question, "--offline", "-q")
    assert (again.stdout, again.stderr) == (b" Paris\n", b"")
    assert server.requests == []
    # A type that the converter does not write is made of float32.
    mixed = fixmin("run", "bochkov/affine:q4_k_m", question, "--trust-remote-code", "-q")
    assert (mixed.returncode, mixed.stdout) == (0, b" Paris\n"), mixed.stderr
    assert left_in(cache) == [f"affine-{t}.{s}" for t in ("Q4_K_M", "Q8_0") for s in ("gguf", "json")]
