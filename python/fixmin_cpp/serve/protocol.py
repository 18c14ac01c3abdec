"""uvicorn's HTTP/1.1, which by itself waits for ever for a request that comes byte by byte, or for a reader that takes
nothing, drops who has sent all it wants to, resets the connection of who is still sending when it is refused, and has a
form of its own for refusals."""

import asyncio
import http
import logging
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..logs import Facts
from .errors import APIError
from .metrics import Metrics
from .settings import ServeSettings

__all__ = ["protocol"]

_log = logging.getLogger(__name__)

_PROBES = 0.2, 5.0  # seconds until a client that ended its side is asked whether it is there (twice), and later
_FORGOTTEN = 8  # bodies of the largest size that are read after a refusal
_CLOSE = {"Connection": "close"}


def protocol(settings: ServeSettings, metrics: Metrics) -> type[asyncio.Protocol]:
    """The class of connections, for uvicorn's Config."""
    full = APIError(
        503,
        f"{settings.max_connections} connections are open, and no more are taken: try again later",
        code="too_many_connections",
        headers={**_CLOSE, "Retry-After": "1"},
    )
    return type("Protocol", (_Protocol,), {"settings": settings, "metrics": metrics, "full": full.response()})


class _Transport:
    """A connection's transport, whose close() asks the protocol how."""

    def __init__(self, transport: Any, close: Callable[[Any], None], closing: Callable[[], bool]) -> None:
        self._transport = transport
        self._close = close
        self._closing = closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._closing() or self._transport.is_closing()

    def close(self) -> None:
        self._close(self._transport)


class _Protocol(H11Protocol):
    settings: ClassVar[ServeSettings]
    metrics: ClassVar[Metrics]
    full: ClassVar[Any]  # the answer to one connection too many

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _probing: asyncio.TimerHandle | None = None
    _lingering: asyncio.TimerHandle | None = None
    _forgotten = 0  # bytes that came meanwhile
    _ended = False  # the client's side

    def connection_made(self, transport: Any) -> None:
        shown: Any = _Transport(transport, self._close, lambda: self._lingering is not None)
        super().connection_made(shown)
        n, limit = len(self.connections), self.settings.max_connections
        self.metrics.open_connections.set(n)
        if n > limit:
            self.metrics.refused_connections.inc()
            _log.warning("connection refused %s", Facts(connections=n - 1, max_connections=limit))
            self.app = self.full
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading()
        for timer in (self._probing, self._lingering):
            if timer is not None:
                timer.cancel()
        self.resume_writing()
        super().connection_lost(exc)
        self.metrics.open_connections.set(len(self.connections))

    # --- the end of a connection -------------------------------------------------------------------------------------

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's protocols may say so
        """Whether the connection stays open: a client may end its side once it has asked."""
        self._ended = True
        if self._lingering is not None or not self._answering():
            return False
        if self._probing is None:
            self._probing = self.loop.call_later(_PROBES[0], self._probe, _PROBES[0])
        return True

    def _answering(self) -> bool:
        """Whether a request that is wholly there waits for its answer."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _probe(self, then: float) -> None:
        """One that has gone altogether looks the same, until it is sent something."""
        cycle = self.cycle
        if self.transport.is_closing() or cycle.response_complete:
            return
        if cycle.response_started:  # an empty line means nothing between events, nor between JSON's numbers
            if not self.flow.write_paused:  # else it is being sent something
                self.transport.write(self.conn.send(h11.Data(data=b"\n")))
        elif cycle.scope["http_version"] == "1.1":  # RFC 9110, 15.2.1: a client that did not ask for it discards it
            still = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(still))
        self._probing = self.loop.call_later(then, self._probe, _PROBES[1] if then == _PROBES[0] else then)

    def _close(self, transport: Any) -> None:
        """At once only if the client has sent its request: what comes after that would have its system drop the answer
        that it has not yet read. Else our side ends, and what comes is forgotten for as long as a request may take."""
        sending = self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if not sending or self._ended or self._lingering is not None or transport.is_closing():
            transport.close()
            return
        self._stop_reading()
        self._lingering = self.loop.call_later(self.settings.read_timeout, transport.close)
        if self.cycle is not None and not self.cycle.response_complete:  # it shall wait for nothing
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        try:
            transport.write_eof()
        except OSError:  # the client has reset the connection
            transport.close()

    def shutdown(self) -> None:
        """Called when the server ends."""
        if self._lingering is not None:
            self.transport.close()
        else:
            super().shutdown()

    # --- requests ----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._lingering is not None:
            self._forgotten += len(data)
            if self._forgotten > _FORGOTTEN * self.settings.max_body_bytes:
                self.transport.close()
            return
        if self.conn.their_state in (h11.IDLE, h11.DONE) and not self.conn.trailing_data[0]:
            data = data.lstrip(b"\r\n")  # some clients end a body with a line that does not belong to it
        if data:  # for h11 nothing is the end, after which uvicorn would look for events for ever
            super().data_received(data)
        self._watch_request()

    def send_400_response(self, msg: str) -> None:
        """Called where h11's error is caught."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            self._refuse(APIError(431, "the headers are too long", headers=_CLOSE))
        else:
            self._refuse(APIError(400, "this is no HTTP that can be read", headers=_CLOSE))

    def _refuse(self, error: APIError) -> None:
        """Answers outside of a cycle, unless an answer has begun, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error.response()
            lines = [f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}".encode()]
            lines += [name + b": " + value for name, value in answer.raw_headers]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        self.transport.close()

    def on_response_complete(self) -> None:
        rest = self.conn.trailing_data[0]
        if lines := len(rest) - len(rest.lstrip(b"\r\n")):  # came with the body; h11 has no other way to drop them
            self.conn._receive_buffer.maybe_extract_at_most(lines)
        super().on_response_complete()
        if self._ended and not self._answering():  # nor has it sent another one behind it
            self.transport.close()
        self._watch_request()

    # --- patience ----------------------------------------------------------------------------------------------------

    def _watch_request(self) -> None:
        """A clock runs from a request's first byte (of the first one: from the connection) to its last."""
        state = self.conn.their_state
        begun = self.cycle is None or bool(self.conn.trailing_data[0]) or state is h11.SEND_BODY
        if not begun or state not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            self._stop_reading()
        elif self._reading is None:
            self._reading = self.loop.call_later(self.settings.read_timeout, self._too_slow)

    def _too_slow(self) -> None:
        seconds = self.settings.read_timeout
        self._refuse(APIError(408, f"the request has not arrived within {seconds:g} s", headers=_CLOSE))

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.settings.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
