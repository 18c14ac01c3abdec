"""What shows only in a process of its own: imports, silence, signals, threads at exit, fork."""

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fixmin_cli import on_terminal

TIMEOUT = 300  # seconds: not a measurement, only the end of a test that would hang


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_import_loads_nothing_heavy():
    result = python("import sys, fixmin_cpp; print(*sys.modules, sep='\\n')")
    modules = set(result.stdout.split())
    assert "fixmin_cpp.model" in modules
    heavy = {"torch", "transformers", "tokenizers", "typer", "rich", "gguf", "safetensors", "matplotlib"}
    assert not heavy & modules


def test_nothing_is_printed(model_path):
    code = """
import sys, fixmin_cpp
with fixmin_cpp.Model(sys.argv[1]) as model:
    model.generate("the cat", max_new_tokens=5)
    list(model.stream("the cat", max_new_tokens=5))
    model.score("the cat")
"""
    result = python(code, model_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_logging_says_what_happens(model_path):
    """To those who ask."""
    code = """
import logging, sys, fixmin_cpp
logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s")
with fixmin_cpp.Model(sys.argv[1], n_threads=1) as model:
    model.generate(["the cat", "a"], max_new_tokens=5, ignore_eos=True)
"""
    lines = python(code, model_path).stderr.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"fixmin_cpp.model DEBUG loaded {model_path} in ")
    assert sorted(line[:44] for line in lines[1:3]) == [
        f"fixmin_cpp.generation DEBUG request {i} ended:" for i in range(2)
    ]
    assert all("length" in line and "n_generated=5" in line for line in lines[1:3])
    assert lines[3] == f"fixmin_cpp.model DEBUG closed {model_path}"


def test_progress_bar(model_path):
    """On a terminal, if asked for; elsewhere nothing."""
    code = """
import sys, fixmin_cpp
with fixmin_cpp.Model(sys.argv[1]) as model:
    model.generate(["a"] * 9, n=2, temperature=1.0, max_new_tokens=5, progress=True)
    model.score(["the cat"] * 9, progress=True)
    if sys.argv[2:]:
        print("more")
        model.generate(["a"] * 9, max_new_tokens=5)
        model.score(["the cat"] * 9)
"""
    shown, more = on_terminal([sys.executable, "-c", code, str(model_path), "more"]).split("more")
    assert shown.index("generating") < shown.index("100%") < shown.index("scoring") < shown.rindex("100%")
    assert more == "\n"
    result = python(code, model_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("close", ["", "model.close()"])
@pytest.mark.parametrize("use", ["asynchronous", "stream", "form"])
def test_the_end_of_the_process_is_clean(long_model_path, use, close):
    """While a request runs, with threads that wait for news, or masks to be made."""
    code = f"""
import asyncio, sys, fixmin_cpp
model = fixmin_cpp.Model(sys.argv[1])
more = {{"max_new_tokens": 10**6, "ignore_eos": True}}
async def first(stream):
    return await anext(stream)
if "{use}" == "asynchronous":
    stream = model.astream("a", **more)
    asyncio.run(first(stream))
elif "{use}" == "form":
    next(model.stream("a", regex="[a-z]*", **more))
else:
    next(stream := model.stream("a", **more))
{close}
"""
    if use == "form":
        pytest.importorskip("llguidance")
    result = python(code, long_model_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_threads_get_what_they_would_get_alone(model):
    prompts = ["a", "the cat", "日本 é", "Question: Who?\nAnswer:"] * 4

    def answer(i: int) -> tuple[list[int], str, float]:
        arguments = {"max_new_tokens": 10, "temperature": 0.8, "seed": i}
        if i % 3 == 0:
            stream = model.stream(prompts[i], **arguments)
            text = "".join(piece.text for piece in stream)
            return stream.completion.token_ids, text, model.score(prompts[i] + " b b").nll
        completion = model.generate(prompts[i], **arguments)
        return completion.token_ids, completion.text, model.score(prompts[i] + " b b").nll

    alone = [answer(i) for i in range(len(prompts))]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, range(len(prompts))))
    assert together == alone


def test_other_threads_run_during_a_computation(long_model_path):
    """The GIL is not held: this thread counts while the other one reads a long prompt."""
    import fixmin_cpp

    with fixmin_cpp.Model(long_model_path) as slow:
        stream = slow.stream([1] * 90_000)
        reader = threading.Thread(target=lambda: list(stream))
        reader.start()
        count = sum(1 for _ in range(100_000))
        stream.close()
        reader.join()
        assert count == 100_000
        assert stream.completion.finish_reason == "cancelled"


INTERRUPTED = {
    "generate": "model.generate('a', max_new_tokens=10**6, ignore_eos=True)",
    "prompt": "model.generate([1] * 99_000)",
    "stream": "for piece in model.stream('a', max_new_tokens=10**6, ignore_eos=True): pass",
    "stream_prompt": "list(model.stream([1] * 99_000))",
    "logits": "model.logits([1] * 99_000, last=True)",
    "score": "model.score([1] * 99_000)",
}


@pytest.mark.parametrize("call", INTERRUPTED)
def test_ctrl_c(call, long_model_path):
    """SIGINT ends the call with KeyboardInterrupt, leaves no thread behind, and the model goes on working."""
    code = f"""
import sys, threading, fixmin_cpp
model = fixmin_cpp.Model(sys.argv[1], n_threads=1)
try:
    print("ready", flush=True)
    {INTERRUPTED[call]}
except KeyboardInterrupt:
    pass
else:
    sys.exit("the call came to its end")
for thread in threading.enumerate():
    if thread.name == "fixmin-stream":
        thread.join()
print(threading.active_count(), len(model.generate("a", max_new_tokens=2, ignore_eos=True).token_ids))
"""
    command = [sys.executable, "-c", code, str(long_model_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        threading.Event().wait(0.3)  # so that the signal finds the call at work; too early would only test less
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, output, errors) == (0, "1 2\n", "")


def test_a_stream_left_open_does_not_keep_the_process(long_model_path):
    code = """
import sys, fixmin_cpp
model = fixmin_cpp.Model(sys.argv[1])
stream = model.stream("a", max_new_tokens=10**6, ignore_eos=True)
print(next(stream).token_id)
"""
    result = python(code, long_model_path)
    assert result.returncode == 0
    assert result.stdout.strip().isdigit()
    assert result.stderr == ""


FORKED = """
import os, sys, warnings, fixmin_cpp
warnings.simplefilter("ignore")  # Python 3.12 warns of fork in a process with threads, which is what is tested
os.environ["FIXMIN_DEVICE"] = "cpu"  # CUDA does not work after a fork
model = fixmin_cpp.Model(sys.argv[1])
expected = fixmin_cpp.generate(sys.argv[1], "the cat", max_new_tokens=5).token_ids
assert model.generate("the cat", max_new_tokens=5).token_ids == expected
stream = model.stream("the cat", max_new_tokens=50, ignore_eos=True) if sys.argv[2] == "streaming" else None
if stream:
    next(stream)
    if sys.argv[3] == "finished":
        list(stream)
pid = os.fork()
if pid == 0:
    ok = model.generate("the cat", max_new_tokens=5).token_ids == expected
    ok = ok and fixmin_cpp.generate(sys.argv[1], "the cat", max_new_tokens=5).token_ids == expected
    ok = ok and [p.token_id for p in model.stream("the cat", max_new_tokens=5)] == expected
    model.close()
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child"
assert model.generate("the cat", max_new_tokens=5).token_ids == expected
print("both")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("state", [("idle", ""), ("streaming", "finished")], ids=" ".join)
def test_a_forked_child_can_use_the_model(state, model_path):
    result = python(FORKED, model_path, *state)
    assert (result.returncode, result.stdout, result.stderr) == (0, "both\n", "")


FORKS = """
import os, sys, threading, time, warnings, fixmin_cpp
warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from CPython 3.12
stop = threading.Event()
def work(model):
    while not stop.is_set():
        model.generate("the cat", max_new_tokens=100, regex="[a-z ]{99,100}")
models = [fixmin_cpp.Model(sys.argv[1], n_threads=1) for _ in range(4)]
threads = [threading.Thread(target=work, args=(model,), daemon=True) for model in models]
for thread in threads:
    thread.start()
hangs = 0
for _ in range(2000):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    deadline = time.monotonic() + 10
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            hangs += 1
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            break
        time.sleep(0.0005)
    if hangs:
        break
stop.set()
for thread in threads:
    thread.join()
print(hangs)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_comes_out_of_fork(model_path):
    """Up to CPython 3.11 it waits for ever if another thread enters a new thread state at that moment.

    The engine's thread does so for every mask; one fork in a few hundred met it. From 3.13 on os.fork itself waits for
    such threads, and must not be waited for.
    """
    result = python(FORKS, model_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


def test_installed_package_has_its_types():
    import fixmin_cpp

    folder = Path(fixmin_cpp.__file__).parent
    assert (folder / "py.typed").exists()
    assert (folder / "_core.pyi").exists()


THREADS = """
import resource, sys
import fixmin_cpp
path = sys.argv[1]
fixmin_cpp.Model(path, n_threads=1).close()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), hard))  # the stacks of 1,024 threads need 8 GiB
try:
    fixmin_cpp.Model(path, n_threads=1024)
except fixmin_cpp.FixminError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
with fixmin_cpp.Model(path, n_threads=2) as model:
    print(len(model.generate([1, 2], max_new_tokens=3, ignore_eos=True).token_ids))
"""


def test_threads_that_the_system_refuses(model_path):
    result = python(THREADS, model_path)
    assert result.returncode == 0, result.stderr
    refused, n = result.stdout.splitlines()
    assert re.match(r"the system refuses thread \d+ of 1024 \(.*\): use fewer threads", refused)
    assert n == "3"
