"""Runs on an engine: all of a plan together, or one as a stream, for threads and for event loops."""

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import NoReturn

from . import _core
from .arguments import MAX_INT32
from .errors import FixminError
from .generation import Completion, Piece, Plan, Run

__all__ = ["AsyncTextStream", "Generations", "Runner", "TextStream", "wait_all"]


class Runner:
    """An engine that runs what it is given until it is closed. Safe to use from several threads, and after a fork.

    `lock` is for its owner too: a signal handler may come while it is held, and a forked child gets a new one.
    """

    def __init__(self, engine: _core.Engine, name: str) -> None:
        self._engine = engine
        self._name = name  # of the model, in errors
        self.closed = False
        self._reset()
        _runners.add(self)

    def _reset(self) -> None:
        """Also in the child of a fork, where a thread that held the lock does not exist."""
        self.lock = threading.RLock()
        self._dispatcher: Dispatcher | None = None

    def check_open(self) -> None:
        """Raises FixminError after close()."""
        if self.closed:
            raise FixminError(f"the model {self._name} is closed")

    @contextlib.contextmanager
    def lease(self) -> Iterator[_core.Engine]:
        """The engine, which stays usable inside the with block; close() ends the requests."""
        self.check_open()
        yield self._engine.lease()

    def start(self, run: Run) -> None:
        """Queues the request of a run."""
        with self.lease() as engine:
            run.start(engine)

    def start_async(self, run: Run, listener: Callable[[], None]) -> "Dispatcher":
        """The same; `listener` is called in the running event loop whenever there is news of it."""
        with self.lease() as engine:
            with self.lock:
                if self._dispatcher is None:
                    self._dispatcher = Dispatcher()
                dispatcher = self._dispatcher
            dispatcher.start(run, engine, listener)
            return dispatcher

    def close(self) -> bool:
        """Ends all requests within a layer; waits for no caller. True at the first call."""
        first, self.closed = not self.closed, True
        self._engine.close()
        if self._dispatcher is not None:
            self._dispatcher.close()  # passes on how the last requests ended
        return first

    def after_fork(self) -> None:
        """In the child: requests stay in the parent."""
        dispatcher = self._dispatcher
        self._reset()
        if dispatcher is not None:
            dispatcher.wake_all()


_runners: "weakref.WeakSet[Runner]" = weakref.WeakSet()


def _reset_after_fork() -> None:
    for runner in list(_runners):
        runner.after_fork()


os.register_at_fork(after_in_child=_reset_after_fork)


class Generations:
    """The runs of a plan: best_of for each prompt, those of one prompt next to each other; made by Model.prepare().

    They are started by run(), or each by stream() or astream(), in their order.
    """

    def __init__(self, plan: Plan, runner: Runner) -> None:
        self._plan = plan
        self._runner = runner
        self.runs: list[Run] = []
        for index in range(len(plan.prompts)):
            leader: Run | None = None
            for candidate in range(plan.best_of):
                self.runs.append(Run(plan, index, candidate, leader))
                leader = leader or self.runs[-1]

    def run(self, on_end: Callable[[int, int], object] | None = None) -> None:
        """Runs all together to their ends; `on_end` is told how many have got there, and of how many."""
        with self._runner.lease() as engine:
            _drive(self.runs, engine, on_end)

    def stream(self, number: int = 0) -> "TextStream":
        """A run piece by piece."""
        return TextStream(self.runs[number], self._runner.start)

    def astream(self, number: int = 0) -> "AsyncTextStream":
        """The same for an event loop."""
        return AsyncTextStream(self.runs[number], self._runner.start_async)

    def result(self) -> Completion | list[Completion]:
        """What generate() returns, once all runs have ended."""
        size = self._plan.best_of
        completions = [self._chosen(self.runs[i : i + size]) for i in range(0, len(self.runs), size)]
        return completions if self._plan.many else completions[0]

    def _chosen(self, runs: Sequence[Run]) -> Completion:
        """The completion of a prompt: its best candidate, or the first if none had to be left out."""
        prompt_logprobs = runs[0].finished.prompt_logprobs  # computed once
        n = self._plan.n
        if self._plan.best_of > n:
            runs = sorted(runs, key=lambda run: -run.mean_logprob)[:n]  # stable: equal ones stay in order
        completions = [replace(run.finished, prompt_logprobs=prompt_logprobs) for run in runs]
        return completions[0] if n == 1 else replace(completions[0], candidates=completions)


def _drive(runs: Sequence[Run], engine: _core.Engine, on_end: Callable[[int, int], object] | None = None) -> None:
    mailbox = _core.Mailbox() if len(runs) > 1 else None
    try:
        for run in runs:
            run.start(engine, mailbox)
        left = {run.number: run for run in runs}
        while left:
            if mailbox is None:
                runs[0].wait(for_end=not runs[0].watched)
                news = list(left)
            else:
                news = mailbox.wait(0.05)  # returns often: Ctrl-C is noticed in between
            for number in news:
                one = left.get(number)
                if one is None:
                    continue
                one.take()
                if one.completion is not None:
                    del left[number]
                    if on_end is not None:
                        on_end(len(runs) - len(left), len(runs))
    except BaseException:
        for run in runs:
            run.cancel()
        raise


def wait_all(requests: Sequence[_core.Request], on_end: Callable[[int, int], object] | None = None) -> None:
    """Until all have ended; Ctrl-C cancels them. `on_end` as in Generations.run()."""
    try:
        for i, request in enumerate(requests):
            while not request.wait(MAX_INT32, 3600.0):
                pass
            if on_end is not None:
                on_end(i + 1, len(requests))
    except BaseException:
        for request in requests:
            request.cancel()
        raise


class TextStream(Iterator[Piece]):
    """The pieces of one generation, in order; made by Model.stream(). A context manager: leaving it cancels the run.

    The engine does not wait for a slow reader. One thread may read while another one closes.
    """

    def __init__(self, run: Run, start: Callable[[Run], None]) -> None:
        self._run = run
        self._start = start
        self._lock = threading.Lock()  # guards what follows
        self._holder: int | None = None  # the thread that has it
        self._process = os.getpid()  # that it was started in
        self._pieces: deque[Piece] = deque()
        self._started = False
        self._closed = False

    @property
    def completion(self) -> Completion | None:
        """The whole result, once the last piece was given or the stream was closed after it had begun."""
        return None if self._pieces else self._run.completion

    def __iter__(self) -> "TextStream":
        return self

    def __next__(self) -> Piece:
        self._notice_fork()
        while True:
            with self._locked():
                if self._closed:
                    raise StopIteration
                try:
                    self._read()
                except BaseException:
                    self._closed = True
                    raise
                if self._pieces:
                    return self._pieces.popleft()
                if self._run.ended:
                    self._closed = True
                    raise StopIteration
            try:
                self._run.wait()
            except BaseException:  # Ctrl-C while waiting
                self.close()
                raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def _notice_fork(self) -> None:
        """A started run stays in the parent, as does a thread that may hold the lock."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._lock = threading.Lock()
            self._holder = None
            if not self._run.ended:  # no part of what will not be whole
                self._pieces.clear()

    def _read(self) -> None:
        if not self._started:
            self._start(self._run)
            self._started = True
        if not self._pieces:
            self._pieces.extend(self._run.take())

    def close(self) -> None:
        """Cancels the run, if it has not ended, and waits for its end. May be called again."""
        self._run.cancel()
        if self._holder == threading.get_ident():  # a signal handler in the midst of a read, which ends after it
            self._closed = True
            return
        self._notice_fork()
        with self._locked():
            self._closed = True
            self._pieces.clear()
            # What went wrong nobody wants to know any more; in a forked child nothing is there to wait for.
            with contextlib.suppress(FixminError):
                while self._started and not self._run.ended:
                    self._run.wait(for_end=True)
                    self._run.take()

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stream can neither be copied nor pickled: it is one run, where that was started")

    def __del__(self) -> None:
        self._run.cancel()  # does not wait: this may run in any thread


class Dispatcher:
    """The thread that tells event loops of news: one for all the asynchronous requests of a model."""

    def __init__(self) -> None:
        self._mailbox = _core.Mailbox()
        self._listeners: dict[int, tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self.closed = False
        # No daemon: Python would end it inside a native call when the interpreter ends, which ends the process.
        arguments = (weakref.ref(self), self._mailbox)
        threading.Thread(target=_dispatch, args=arguments, name="fixmin-async").start()

    def start(self, run: Run, engine: _core.Engine, listener: Callable[[], None]) -> None:
        """Starts a run; `listener` is called in the running event loop whenever there is news of it."""
        loop = asyncio.get_running_loop()
        with self._lock:  # news that come before the listener is known wait for it
            run.start(engine, self._mailbox)
            self._listeners[run.number] = (loop, listener)

    def forget(self, run: Run) -> None:
        """No further news are wanted."""
        with self._lock:
            self._listeners.pop(run.number, None)

    def wake_all(self) -> None:
        """In a forked child, without the lock: who waits for news there learns that none will come."""
        for loop, listener in list(self._listeners.values()):
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon(listener)

    def close(self) -> None:
        """Ends the thread."""
        self.closed = True
        self._mailbox.close()

    def tell(self, numbers: list[int] | None) -> None:
        """Passes news on to the event loops; None: there may be news of any."""
        with self._lock:
            all_numbers = list(self._listeners) if numbers is None else numbers
            known = [self._listeners[n] for n in all_numbers if n in self._listeners]
        for loop, listener in known:
            try:
                loop.call_soon_threadsafe(listener)
            except RuntimeError:  # the loop has been closed: nobody listens any more
                continue

    def __del__(self) -> None:
        self.close()


def _dispatch(dispatcher: "weakref.ref[Dispatcher]", mailbox: _core.Mailbox) -> None:
    while threading.main_thread().is_alive():  # else the interpreter waits for this thread before it ends
        try:
            numbers = mailbox.wait(0.2)
        except MemoryError:  # this thread has to go on: the others would wait for ever
            numbers = None
            time.sleep(0.01)
        target = dispatcher()
        if target is None or (target.closed and not numbers):
            return
        target.tell(numbers)
        del target  # else it would live as long as this waits


class AsyncTextStream(AsyncIterator[Piece]):
    """The pieces of one generation for `async for`; made by Model.astream(). Leaving `async with` cancels the run."""

    def __init__(self, run: Run, start: Callable[[Run, Callable[[], None]], Dispatcher]) -> None:
        self._run = run
        self._start = start
        self._dispatcher: Dispatcher | None = None
        self._news = asyncio.Event()
        self._process = os.getpid()  # that it was started in
        self._pieces: deque[Piece] = deque()
        self._closed = False

    @property
    def completion(self) -> Completion | None:
        """The whole result, once the last piece was given."""
        return None if self._pieces else self._run.completion

    @property
    def behind(self) -> bool:
        """Whether pieces are there that were not yet read: the next ones come without waiting."""
        return bool(self._pieces)

    def __aiter__(self) -> "AsyncTextStream":
        return self

    async def __anext__(self) -> Piece:
        while not self._closed:
            if self._dispatcher is None:
                self._process = os.getpid()
                self._dispatcher = self._start(self._run, self._news.set)
            if self._process != os.getpid() and not self._run.ended:
                self._pieces.clear()
            if self._pieces:
                return self._pieces.popleft()
            if self._run.ended:
                break
            try:
                if self._process == os.getpid():  # else the run stays in the parent, as take() says
                    await self._news.wait()
                self._news.clear()
                self._pieces.extend(self._run.take())
            except BaseException:  # the task was cancelled, or the run failed
                self._end()
                raise
        self._end()
        raise StopAsyncIteration

    async def complete(self) -> Completion:
        """Reads to the end."""
        async for _ in self:
            pass
        return self._run.finished

    def _end(self) -> None:
        self._closed = True
        self._run.cancel()
        if self._dispatcher is not None and self._process == os.getpid():
            self._dispatcher.forget(self._run)

    async def aclose(self) -> None:
        """Cancels the run, if it has not ended; the engine notices within one step."""
        self._end()

    async def __aenter__(self) -> "AsyncTextStream":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._end()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stream can neither be copied nor pickled: it is one run, where that was started")

    def __del__(self) -> None:
        self._run.cancel()
