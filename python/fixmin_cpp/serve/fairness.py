"""Which generations of large requests may run, so that they leave room for everybody else's."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

__all__ = ["Turns"]


class Turns:
    """Large requests share three quarters of the places, one at a time to who has fewest; each has at most half.

    The engine runs what comes first. A request with few generations goes straight to it; it finds a place, as large
    ones never take all of them.
    """

    def __init__(self, n_parallel: int) -> None:
        """`n_parallel`: generations that the engine runs at a time."""
        self._n_free = max(1, n_parallel * 3 // 4)
        self._most = max(1, n_parallel // 2)  # of one request
        self._n_few = max(1, n_parallel // 8)
        self._running: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}

    @property
    def n_waiting(self) -> int:
        """Generations that the engine has not yet been given."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def turn(self, request: Hashable, n_generations: int) -> AsyncIterator[None]:
        """Waits until one of the `n_generations` of a request may run. They begin in the order of their calls."""
        if n_generations <= self._n_few:
            yield
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(request, deque()).append(place)
        self._give()
        try:
            await place
            yield
        finally:
            if place.done() and not place.cancelled():
                self._n_free += 1
                self._running -= Counter({request: 1})
            else:
                self._forget(request, place)
            self._give()

    def _give(self) -> None:
        while self._n_free and self._waiting:
            request = min(self._waiting, key=self._running.__getitem__)
            if self._running[request] >= self._most:
                break
            place = self._waiting[request][0]
            self._forget(request, place)
            if not place.cancelled():
                self._n_free -= 1
                self._running[request] += 1
                place.set_result(None)

    def _forget(self, request: Hashable, place: "asyncio.Future[None]") -> None:
        places = self._waiting.get(request)
        if places is not None and place in places:
            places.remove(place)
            if not places:
                del self._waiting[request]
