"""Runs the application under uvicorn, with limits on how long a connection may take."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from ..errors import FixminError
from .app import create_app
from .host import ModelHost
from .log_lines import never_waiting
from .protocol import protocol
from .settings import ServeSettings
from .sockets import listening

__all__ = ["run"]

_log = logging.getLogger(__name__)

_CUT_OFF = 2.0  # seconds after the shutdown's timeout in which clients may take what is left for them


def run(settings: ServeSettings) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; then nothing new is taken, and what runs gets settings.shutdown_timeout.

    A SIGINT after that ends what runs at once. Meanwhile log lines to stderr wait for nobody.

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
        http=protocol(settings, app.state.metrics),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=round(settings.keep_alive) or 1,
        forwarded_allow_ips=None if settings.uds is None else "*",  # who may connect is a proxy on this machine
    )
    server = _Server(config, settings, app.state.host)
    with never_waiting(), _signals_end_well(stop), listening(settings) as (listener, server.address):
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
        self._timers: list[asyncio.TimerHandle] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            prefix, n_keys = self._settings.prefix, len(self._settings.api_keys)
            _log.info("listening on %s%s", self.address, f" (a proxy shows it at {prefix})" if prefix else "")
            _log.info("API keys: %s", f"{n_keys} are known" if n_keys else "none, anybody may ask")
            if self.should_exit:  # asked for meanwhile: uvicorn 0.34 would leave without shutting down what has started
                self.should_exit = False
                asyncio.get_running_loop().call_soon(setattr, self, "should_exit", True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal, in the middle of anything."""
        if self.should_exit and sig == signal.SIGINT:  # uvicorn would leave, and answer nobody
            asyncio.get_running_loop().call_soon_threadsafe(self._end_in, 0.0)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_in(self._settings.shutdown_timeout)
        try:
            await super().shutdown(sockets)
        finally:
            for timer in self._timers:
                timer.cancel()

    def _end_in(self, seconds: float) -> None:
        """Those that run then are told that they come too late, and cut off if they do not take that."""
        loop = asyncio.get_running_loop()
        self._timers += [
            loop.call_later(seconds, self._host.stop),
            loop.call_later(seconds + _CUT_OFF, self._cut_off),
        ]

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
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # its terminal is closed; nohup has that ignored
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
