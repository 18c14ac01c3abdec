"""Runs the application under uvicorn, with limits on how long a connection may take."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import FixminError
from ..logs import Facts
from .app import create_app
from .errors import APIError
from .host import ModelHost
from .metrics import Metrics
from .settings import ServeSettings
from .sockets import listening

__all__ = ["run"]

_log = logging.getLogger(__name__)

_PROBES = 0.2, 5.0  # seconds until a client that ended its side is asked whether it is there, and between later times
_CUT_OFF = 2.0  # seconds after the shutdown's timeout in which clients may take what is left for them
_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def run(settings: ServeSettings) -> None:
    """Serves until SIGINT or SIGTERM; then nothing new is taken and what runs gets settings.shutdown_timeout to end.

    Raises:
        ArgumentError: settings.root_path cannot be told from the server's own paths, or chat_template is no template.
        FixminError: the model could not be loaded. OSError: the address cannot be used.
    """
    server: _Server

    def stop() -> None:
        server.should_exit = True

    app = create_app(settings, on_failure=stop, hosts=settings.hosts)
    config = uvicorn.Config(
        app,
        http=_protocol(settings, app.state.metrics),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=round(settings.keep_alive) or 1,
        forwarded_allow_ips=None if settings.uds is None else "*",  # who may connect is a proxy on this machine
    )
    server = _Server(config, settings, app.state.host)
    with _signals_end_well(stop), listening(settings) as (listener, server.address):
        server.run(sockets=[listener])
    error = app.state.host.error
    if error is not None:
        raise FixminError(f"{settings.model} could not be loaded: {error}") from error


class _Server(uvicorn.Server):
    """Past the shutdown's timeout requests are answered that they come too late. uvicorn would only cancel them."""

    address = ""  # for the log

    def __init__(self, config: uvicorn.Config, settings: ServeSettings, host: ModelHost) -> None:
        super().__init__(config)
        self._settings = settings
        self._host = host

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            prefix, n_keys = self._settings.prefix, len(self._settings.api_keys)
            _log.info("listening on %s%s", self.address, f" (a proxy shows it at {prefix})" if prefix else "")
            _log.info("API keys: %s", f"{n_keys} are known" if n_keys else "none, anybody may ask")
            if self.should_exit:  # asked for meanwhile: uvicorn 0.34 would leave without shutting down what has started
                self.should_exit = False
                asyncio.get_running_loop().call_soon(setattr, self, "should_exit", True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(self._settings.shutdown_timeout, self._host.stop),
            loop.call_later(self._settings.shutdown_timeout + _CUT_OFF, self._cut_off),
        ]
        try:
            await super().shutdown(sockets)
        finally:
            for timer in timers:
                timer.cancel()

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


@contextlib.contextmanager
def _signals_end_well(stop: Callable[[], None]) -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it has shut down: that is no failure here. Before it
    listens to them they stop it too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _protocol(settings: ServeSettings, metrics: Metrics) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1, which by itself waits for ever for a request that comes byte by byte, or for a reader that
    takes nothing, drops who has sent all it wants to, and has a form of its own for refusals."""
    read_timeout, write_timeout = settings.read_timeout, settings.write_timeout
    full = APIError(
        503,
        f"{settings.max_connections} connections are open, and no more are taken: try again later",
        code="too_many_connections",
        headers={"Connection": "close", "Retry-After": "1"},
    ).response()

    class Protocol(H11Protocol):
        _reading: asyncio.TimerHandle | None = None
        _writing: asyncio.TimerHandle | None = None
        _probing: asyncio.Handle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            metrics.open_connections.set(len(self.connections))
            if len(self.connections) > settings.max_connections:
                metrics.refused_connections.inc()
                _log.warning(
                    "connection refused %s",
                    Facts(connections=len(self.connections) - 1, max_connections=settings.max_connections),
                )
                self.app = full
            self._watch_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_reading()
            if self._probing is not None:
                self._probing.cancel()
            self.resume_writing()
            super().connection_lost(exc)
            metrics.open_connections.set(len(self.connections))

        def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's protocols may say so
            """Whether the connection stays open: a client may end its side once it has asked."""
            cycle = self.cycle
            if cycle is None or cycle.response_complete or cycle.more_body:
                return False
            cycle.keep_alive = False
            self._probing = self.loop.call_soon(self._probe, _PROBES[0])
            return True

        def _probe(self, then: float) -> None:
            """One that has gone altogether looks the same, until it is sent something."""
            cycle = self.cycle
            if self.transport.is_closing() or cycle.response_complete:
                return
            if cycle.response_started:  # an empty line means nothing between events, nor between JSON's numbers
                self.transport.write(self.conn.send(h11.Data(data=b"\n")))
            elif cycle.scope["http_version"] == "1.1":
                self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])))
            self._probing = self.loop.call_later(then, self._probe, _PROBES[1] if then == _PROBES[0] else then)

        def data_received(self, data: bytes) -> None:
            if self.conn.their_state in (h11.IDLE, h11.DONE) and not self.conn.trailing_data[0]:
                data = data.lstrip(b"\r\n")  # some clients end a body with a line that does not belong to it
            if data:  # for h11 nothing is the end, after which uvicorn would look for events for ever
                super().data_received(data)
            self._watch_request()

        def send_400_response(self, msg: str) -> None:
            answer = APIError(400, "this is no HTTP that can be read", headers={"Connection": "close"}).response()
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(
                    self.conn.send(h11.Response(status_code=400, headers=answer.raw_headers, reason=b"Bad Request"))
                )
                self.transport.write(self.conn.send(h11.Data(data=bytes(answer.body))))
            self.transport.close()

        def on_response_complete(self) -> None:
            rest = self.conn.trailing_data[0]
            if lines := len(rest) - len(rest.lstrip(b"\r\n")):  # came with the body; h11 has no other way to drop them
                self.conn._receive_buffer.maybe_extract_at_most(lines)
            super().on_response_complete()
            self._watch_request()

        def _watch_request(self) -> None:
            """A clock runs from a request's first byte (of the first one: from the connection) to its last."""
            state = self.conn.their_state
            begun = self.cycle is None or bool(self.conn.trailing_data[0]) or state is h11.SEND_BODY
            if not begun or state not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
                self._stop_reading()
            elif self._reading is None:
                self._reading = self.loop.call_later(read_timeout, self._too_slow)

        def _too_slow(self) -> None:
            if self.cycle is None or not self.cycle.response_started:
                self.transport.write(_TIMEOUT)
            self.transport.close()

        def _stop_reading(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._writing is None:
                self._writing = self.loop.call_later(write_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._writing is not None:
                self._writing.cancel()
                self._writing = None

    return Protocol
