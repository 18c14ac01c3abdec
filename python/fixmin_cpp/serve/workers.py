"""Threads that prepare requests. Unlike those of concurrent.futures they do not keep a process alive."""

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Workers"]

_T = TypeVar("_T")
_Job = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Workers:
    """A fixed number of daemon threads. What waits is dropped when it is cancelled; what runs cannot be."""

    def __init__(self, name: str, n_threads: int) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._since: dict[int, float] = {}  # when each busy thread took its job
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"fixmin-{name}-{i}", daemon=True)
            for i in range(n_threads)
        ]
        self._started = False

    async def run(self, function: Callable[..., _T], *args: Any) -> _T:
        """`function(*args)` in one of the threads."""
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        future: Future[_T] = Future()
        self._jobs.put((future, function, args))
        try:
            return await asyncio.wrap_future(future)
        finally:
            del future  # which has the exception, which has this frame: its memory would stay until a collection

    @property
    def stuck_for(self) -> float:
        """Seconds for which every thread has been at the same job, 0 while one is free."""
        since = list(self._since.values())
        return time.monotonic() - max(since) if len(since) == len(self._threads) else 0.0

    def close(self) -> None:
        """The threads end when they have nothing to do."""
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self, number: int) -> None:
        while (job := self._jobs.get()) is not None:
            future, function, args = job
            if not future.set_running_or_notify_cancel():
                continue
            self._since[number] = time.monotonic()
            try:
                result = function(*args)
            except BaseException as error:
                self._since.pop(number)
                traceback.clear_frames(error.__traceback__)  # they hold the request's data
                future.set_exception(error)
            else:
                self._since.pop(number)
                future.set_result(result)
            del job, future, function, args
