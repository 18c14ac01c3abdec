"""Model.close() from everywhere, and the child of a fork: nothing waits for ever."""

import asyncio
import contextvars
import copy
import pickle
import subprocess
import sys
import threading

import pytest

from fixmin_cpp import FixminError, Model

LONG = {"max_new_tokens": 10**6, "ignore_eos": True}
TIMEOUT = 120  # seconds: not a measurement, only the end of a test that would hang


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]])
@pytest.mark.parametrize("how", ["generate", "agenerate"])
def test_in_on_token(long_model_path, how, prompt):
    model = Model(long_model_path)
    told = []

    def on_token(piece):
        told.append(piece)
        if len(told) == 3:
            model.close()

    if how == "generate":
        completions = model.generate(prompt, on_token=on_token, **LONG)
    else:
        completions = asyncio.run(model.agenerate(prompt, on_token=on_token, **LONG))
    completions = completions if isinstance(prompt, list) else [completions]
    assert {c.finish_reason for c in completions} == {"cancelled"}
    assert sum(len(c.token_ids) for c in completions) == len(told) >= 3
    assert model.closed
    with pytest.raises(FixminError, match="closed"):
        model.generate("a")


def clear_beside_a_stream(model):
    stream = model.stream("a", **LONG)
    next(stream, None)
    model.clear_prefix_cache()  # would wait for its end
    return stream


def test_beams_so_far(long_model_path):
    """Closed in the middle, a beam search gives what it has, as good as that of a search that was to end there."""
    model = Model(long_model_path)
    threading.Timer(0.3, model.close).start()
    beams = model.beam_search("a", num_beams=3, max_new_tokens=90_000, ignore_eos=True)
    length = len(beams[0].token_ids)
    assert 0 < length < 90_000
    with Model(long_model_path) as again:
        assert beams == again.beam_search("a", num_beams=3, max_new_tokens=length, ignore_eos=True)


CALLS = {
    "generate": lambda model: model.generate(["a", "b"], **LONG)[1].finish_reason,
    "stream": lambda model: len(list(model.stream("a", **LONG))),
    "beam": lambda model: model.beam_search("a", max_new_tokens=90_000, ignore_eos=True),
    "score": lambda model: model.score([1] * 99_000),
    "logits": lambda model: model.logits([1] * 99_000, last=True),
    "exclusive": lambda model: clear_beside_a_stream(model),
    "agenerate": lambda model: asyncio.run(model.agenerate("a", **LONG)).finish_reason,
}
RAISING = {"score", "logits", "exclusive"}


@pytest.mark.parametrize("call", CALLS)
def test_from_two_other_threads(long_model_path, call):
    model = Model(long_model_path, n_threads=1)
    outcome = []

    def run():
        try:
            outcome.append(CALLS[call](model))
        except FixminError as error:
            outcome.append(error)

    caller = threading.Thread(target=run)
    caller.start()
    while model.stats()["n_running"] == 0 and caller.is_alive():
        threading.Event().wait(0.001)
    closers = [threading.Thread(target=model.close) for _ in range(2)]
    for thread in closers:
        thread.start()
    for thread in (*closers, caller):
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert isinstance(outcome[0], FixminError) == (call in RAISING)
    if call in ("generate", "agenerate"):
        assert outcome == ["cancelled"]


def test_no_lock_of_a_callback_holds_it_up(long_model_path):
    """on_token waits for what the closing thread holds."""
    model = Model(long_model_path)
    mine, begun = threading.Lock(), threading.Event()

    def on_token(piece):
        begun.set()
        with mine:
            pass

    with mine:
        caller = threading.Thread(target=lambda: model.generate("a", on_token=on_token, **LONG))
        caller.start()
        begun.wait(TIMEOUT)
        model.close()
    caller.join(TIMEOUT)
    assert not caller.is_alive()


def test_on_token_may_call_the_model(model):
    inner = []
    model.generate("a", max_new_tokens=2, on_token=lambda piece: inner.append(model.generate("b", max_new_tokens=2)))
    assert inner[0].token_ids == model.generate("b", max_new_tokens=2).token_ids


def test_two_event_loops(long_model_path):
    model = Model(long_model_path)
    got, begun = [], threading.Event()

    async def other():
        async for _ in (stream := model.astream("a", **LONG)):
            begun.set()
        got.append(stream.completion.finish_reason)

    thread = threading.Thread(target=lambda: asyncio.run(other()))
    thread.start()
    begun.wait(TIMEOUT)

    async def close():
        model.close()

    asyncio.run(close())
    thread.join(TIMEOUT)
    assert got == ["cancelled"]


def test_left_by_an_exception_with_streams_open(long_model_path):
    model = Model(long_model_path)
    stream = model.stream("a", **LONG)

    def leave():
        with model:
            next(stream)
            raise LookupError

    with pytest.raises(LookupError):
        leave()
    rest = list(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert len(stream.completion.token_ids) == 1 + len(rest)


def test_a_model_that_never_opened(tmp_path):
    class Kept(Model):
        def __init__(self, path):
            kept.append(self)
            super().__init__(path)

    kept = []
    with pytest.raises(OSError, match="No such file"):
        Kept(tmp_path / "none.gguf")
    kept[0].close()
    assert kept[0].closed


SIGNAL = """
import signal, sys, fixmin_cpp
model = fixmin_cpp.Model(sys.argv[1], n_threads=1)
def close(*_):
    model.close()
    if sys.argv[3] == "raise":
        raise LookupError("mine")
signal.signal(signal.SIGALRM, close)
signal.setitimer(signal.ITIMER_REAL, 0.5)  # a busy machine takes a while to ask for all of it
more = {"max_new_tokens": 10**6, "ignore_eos": True}
try:
    if sys.argv[2] == "generate":
        ends = {c.finish_reason for c in model.generate(["a"] * 300, **more)}
    elif sys.argv[2] == "stream":
        stream = model.stream("a", **more)
        list(stream)
        ends = {stream.completion.finish_reason}
    elif sys.argv[2] == "exclusive":
        next(model.stream("a", **more))
        with model.native() as engine:
            engine.read_ceiling(1 << 20, 10**9)
    else:
        model.score([1] * 99_000)
except fixmin_cpp.FixminError as error:
    ends = {"closed"}
except LookupError:
    ends = {"raised"}
print(*ends)
"""


@pytest.mark.parametrize("then", ["return", "raise"])
@pytest.mark.parametrize("call", ["generate", "stream", "score", "exclusive"])
def test_in_a_signal_handler(long_model_path, call, then):
    result = python(SIGNAL, long_model_path, call, then)
    end = "raised" if then == "raise" else "cancelled" if call in ("generate", "stream") else "closed"
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, [end], "")


DAEMONS = """
import sys, threading, time, fixmin_cpp
model, call = fixmin_cpp.Model(sys.argv[1]), sys.argv[2]
ids = [[i % 7 for i in range(1000)]] * 8
calls = {
    "score": lambda: model.score(ids),
    "generate": lambda: model.generate(ids, max_new_tokens=3, ignore_eos=True),
    "stream": lambda: list(model.stream("a", max_new_tokens=20, ignore_eos=True)),
    "logits": lambda: model.logits(ids[0][:50]),
    "open": lambda: fixmin_cpp.Model(sys.argv[1]),
}
def work():
    while True:
        try:
            calls[call]()
        except fixmin_cpp.FixminError:
            pass  # it is closed at the end
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""


@pytest.mark.parametrize("call", ["score", "generate", "stream", "logits", "open"])
def test_daemon_threads_in_the_middle_of_calls_end_with_the_process(long_model_path, call):
    """CPython ends them when they ask for the GIL, which was an abort of the process, about every second time."""
    for _ in range(4):
        result = python(DAEMONS, long_model_path, call)
        assert (result.returncode, result.stdout) == (0, ""), result.stderr


FORK = """
import asyncio, os, sys, threading, warnings, fixmin_cpp
warnings.simplefilter("ignore")
model = fixmin_cpp.Model(sys.argv[1], device="cpu")  # CUDA does not work after a fork
more = {"max_new_tokens": 10**6, "ignore_eos": True}
stream = model.stream("a", **more)
next(stream)
while not stream._pieces:  # some come together, and were not yet read
    next(stream)
threading.Thread(target=lambda: list(model.stream("b", **more)), daemon=True).start()
def refused(f):
    try:
        f()
    except fixmin_cpp.FixminError as error:
        assert "parent" in str(error), error
    else:
        raise AssertionError("no error")
async def main():
    outer = model.astream("a", **more)
    await anext(outer)
    pid = os.fork()
    if pid:
        return pid, outer
    return 0, outer
pid, outer = asyncio.run(main())
if pid == 0:
    refused(lambda: next(stream))
    stream.close()
    async def child():
        try:
            async for _ in outer:
                pass
        except fixmin_cpp.FixminError:
            return (await model.agenerate("a", max_new_tokens=3, ignore_eos=True)).token_ids
    assert len(asyncio.run(child())) == 3
    del stream, outer
    model.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child"
next(stream)
def on_token(piece):
    global child
    if child is None:
        child = os.fork()
child = None
try:
    model.generate(["a", "b"], max_new_tokens=50, ignore_eos=True, on_token=on_token)
except fixmin_cpp.FixminError:
    os._exit(7 if child == 0 else 8)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, "forked in a callback"
model.close()
print("both")
"""


def test_a_forked_child_is_refused_what_stays_in_the_parent(long_model_path):
    result = python(FORK, long_model_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "both\n", "")


FORK_IN_SIGNAL_HANDLER = """
import os, signal, sys, threading, warnings, fixmin_cpp
warnings.simplefilter("ignore")
model = fixmin_cpp.Model(sys.argv[1], n_threads=1, device="cpu")
ids = [1] * 9000
calls = {
    "generate": lambda: model.generate("a", max_new_tokens=10**6, ignore_eos=True, timeout=2),
    "prompt": lambda: model.generate(ids, max_new_tokens=1),
    "score": lambda: model.score(ids),
    "logits": lambda: model.logits(ids, last=True),
    "save_state": lambda: model.save_state(sys.argv[3], ids),
}
child = None
def fork(*_):
    global child
    child = os.fork()
signal.signal(signal.SIGALRM, fork)
signal.setitimer(signal.ITIMER_REAL, 0.05)
stream = model.stream("b", max_new_tokens=10**6, ignore_eos=True, timeout=2)
next(stream)
try:
    calls[sys.argv[2]]()
except fixmin_cpp.FixminError as error:
    os._exit(7 if child == 0 and "parent" in str(error) else 8)
if child == 0:
    os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print("both")
"""


@pytest.mark.parametrize("call", ["generate", "prompt", "score", "logits", "save_state"])
def test_a_fork_in_a_signal_handler(long_model_path, tmp_path, call):
    """The child comes back into a call that waits for a thread which it does not have."""
    result = python(FORK_IN_SIGNAL_HANDLER, long_model_path, call, tmp_path / "state")
    assert (result.returncode, result.stdout, result.stderr) == (0, "both\n", "")


ENDS_IN_A_MASK = """
import gc, sys, threading, fixmin_cpp
from fixmin_cpp.constrain import Matcher
end, ends = threading.Event(), threading.Event()
how, accept = sys.argv[2], Matcher.accept
def accept_and_end(self, token_id):
    if end.is_set():
        ends.set()
        model.close() if how == "closed" else gc.collect()
    return accept(self, token_id)
Matcher.accept = accept_and_end
model = fixmin_cpp.Model(sys.argv[1], n_threads=1)
stream = model.stream("a", max_new_tokens=1000, regex="[a-z ]{1000}")
next(stream)
if how == "collected":
    gc.disable()
    model.of_its_own = stream, model
    del model, stream
end.set()
assert ends.wait(60)
"""


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_the_process_ends_while_a_mask_ends_the_model(long_model_path, how):
    for _ in range(5):
        result = python(ENDS_IN_A_MASK, long_model_path, how)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("how", ["stream", "astream"])
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_stream_is_not_copied(model, how, again):
    with pytest.raises(TypeError, match="a stream can neither be copied nor pickled"):
        again(getattr(model, how)("a", max_new_tokens=3))


@pytest.mark.parametrize("where", ["at once", "with the thread's state"])
def test_in_del_that_a_mask_collects(long_model_path, where):
    """Garbage may be collected in the engine's own thread, which cannot wait for itself."""
    model = Model(long_model_path)
    collected = threading.Event()
    kept = contextvars.ContextVar("kept")

    class Closing:
        def __del__(self):
            model.close()
            collected.set()

    class Mask:
        n = 0

        def allowed(self):
            import numpy as np

            self.n += 1
            if self.n == 3:
                closing = Closing()
                if where != "at once":
                    kept.set(closing)
                del closing
            return np.full((model.vocab_size + 31) // 32, 2**32 - 1, np.uint32)

        def accept(self, token_id):
            pass

        def finished(self):
            return False

    import numpy as np

    from fixmin_cpp import _core

    params = _core.SamplingParams(max_new_tokens=10**6)
    with model.native() as engine:
        request = engine.submit(np.array([1], np.uint32), params, mask=Mask())
        while not request.wait(2**62, 60.0):
            pass
    assert request.result()["finish_reason"] == "cancelled"
    assert collected.is_set()
