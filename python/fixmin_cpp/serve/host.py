"""The model of a server: loaded while requests are already answered with 503, shared by all, closed at the end."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..errors import ArgumentError, BusyError, ContextLengthError, DeviceError, FixminError, UnsupportedError
from ..inspect import describe_code
from ..model import Model
from .errors import APIError
from .fairness import Turns
from .settings import ServeSettings
from .workers import Workers

__all__ = ["ModelHost"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Threads that tokenise, those that compile grammars, which may take 30 s each, and those that wait for what the engine
# computes, behind all that it was asked for before.
_N_THREADS = {"prepare": 4, "grammar": 4, "engine": 4}
_STUCK = 5.0  # seconds that every one of the first may be busy with one thing before /health says so


class ModelHost:
    """Loads a model in the background and counts what is asked of it. Used in one event loop."""

    def __init__(self, settings: ServeSettings, on_failure: Callable[[], None] | None = None) -> None:
        """`on_failure`: called in the event loop if the model cannot be loaded."""
        self.settings = settings
        self.progress = 0.0
        self.error: Exception | None = None  # of loading
        self._device_error: str | None = None
        self.code: dict[str, Any] = {}  # as `fixmin inspect` describes it
        self.n_sequences = 0  # generations that are waiting or running
        self.turns = Turns(settings.n_parallel)
        self._texts: dict[int, str] = {}  # of tokens that were asked for
        self._on_failure = on_failure
        self._model: Model | None = None
        self._closing = False
        self._stopped = asyncio.Event()
        self._closer: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._longest_token = 1  # characters
        self._workers = {name: Workers(name, n) for name, n in _N_THREADS.items()}

    def start(self) -> None:
        """Begins to load."""
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            self._model = await asyncio.to_thread(self._open)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception, and must not be waited out
            self.error = error if isinstance(error, Exception) else FixminError(f"{type(error).__name__}: {error}")
            if not self._closing:
                _log.error("the model cannot be loaded: %s", self.error)
                if self._on_failure is not None:
                    self._on_failure()

    async def loaded(self) -> None:
        """Waits until the model is there. Raises what went wrong."""
        assert self._loading is not None
        await self._loading
        if self.error is not None:
            raise self.error

    def _open(self) -> Model:
        def progress(fraction: float) -> bool:
            self.progress = fraction
            return not self._closing

        begin = time.monotonic()
        model = Model(self.settings.model, progress=progress, **self.settings.load_options().given())
        info = model.info
        _log.info(
            "loaded %s in %.1f s: %.1f MB in the file, KV cache of %d positions (%.1f MB; %d requests of %d fit), "
            "%s on %s, %d threads",
            self.settings.model,
            time.monotonic() - begin,
            info["bytes"]["file"] / 1e6,
            info["n_kv"],
            info["bytes"]["kv_cache"] / 1e6,
            info["n_kv"] // info["n_ctx"],
            info["n_ctx"],
            info["device"],
            info["device_name"],
            info["n_threads"],
        )
        self.code = describe_code(model.metadata)
        if model.info["tokenizer"]:
            model.encode("a")  # the first call builds tables
            self._longest_token = max(map(len, model.require_tokenizer().token_texts), default=1)
        return model

    async def close(self) -> None:
        """Ends the loading, or what is still running."""
        self.stop()
        if self._loading is not None:
            await self._loading
        if self._closer is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closer, _STUCK)
        for workers in self._workers.values():
            workers.close()

    def stop(self) -> None:
        """Requests that run or are prepared end with APIError 503, and others are refused."""
        self._closing = True
        self._stopped.set()
        if self._model is not None and self._closer is None:
            # In a thread that may be left behind: it waits for preparations that cannot be interrupted.
            self._closer = asyncio.ensure_future(Workers("close", 1).run(self._model.close))

    @staticmethod
    def _end() -> APIError:
        return APIError(503, "the server is shutting down", code="shutting_down")

    def told(self, error: Exception) -> Exception:
        """`error`, or what clients are told in its place: a closed model is no fault of theirs, nor of the server's."""
        if isinstance(error, DeviceError):
            self._device_error = str(error)
            _log.error("the device has failed, and no request can be answered any more: %s", error)
        mine = isinstance(error, ArgumentError | ContextLengthError | UnsupportedError | BusyError)
        return self._end() if self._closing and isinstance(error, FixminError) and not mine else error

    @property
    def model(self) -> Model:
        """The loaded model. Raises APIError 503 before and after."""
        if self._closing:
            raise self._end()
        if self.error is not None:
            raise APIError(503, "the model could not be loaded: the server's log says why", code="model_not_loaded")
        if self._model is None:
            headers = {"Retry-After": "1"}
            raise APIError(503, "the model is loading", code="model_loading", headers=headers, progress=self.progress)
        return self._model

    def require_room(self, n: int = 1) -> None:
        """Raises APIError 429 if n generations would have to wait behind too many others."""
        limit = self.settings.max_sequences
        if n > limit:
            raise ArgumentError(f"prompt asks for {n} generations, but this server takes {limit} at a time")
        if self.n_sequences + n > limit:
            raise APIError(
                429,
                f"{self.n_sequences} generations are waiting or running, of {limit} that are taken: try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    @contextmanager
    def admitted(self, n: int) -> Iterator[None]:
        """Counts n generations, if there is room for them: see require_room()."""
        self.require_room(n)
        self.n_sequences += n
        try:
            yield
        finally:
            self.n_sequences -= n

    async def compute(self, function: Callable[..., _T], *args: Any, by: str = "prepare", **kwargs: Any) -> _T:
        """`function` in another thread: for what takes longer than the event loop should stand still.

        `by`: which of the threads. Others do not wait for what those of "grammar" and "engine" do.
        """
        work = asyncio.ensure_future(self._workers[by].run(functools.partial(function, *args, **kwargs)))
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise self._end()
        except FixminError as error:
            raise self.told(error) from None
        finally:
            work.cancel()
            stopped.cancel()

    def check_texts(self, name: str, texts: Iterable[Any]) -> None:
        """Raises ContextLengthError for a text so long that no tokens of this model could fit the context.

        Tokenising takes 200 bytes of memory for a byte of text, so this comes before.
        """
        model = self.model
        if model.text_tokenizer is None:
            return
        n_ctx = model.info["n_ctx"]
        longest = max(1 << 16, n_ctx * self._longest_token)  # some tokenizers drop characters of short texts
        for text in texts:
            if isinstance(text, str) and len(text) > longest:
                raise ContextLengthError(f"{name} has {len(text)} characters, but the context holds {n_ctx} tokens")

    def require_health(self) -> None:
        """Raises APIError 503 if requests are not prepared any more, or their device has failed."""
        if self._device_error is not None:
            raise APIError(503, f"the device has failed: {self._device_error}", code="device_failed")
        seconds = self._workers["prepare"].stuck_for
        if seconds > _STUCK:
            raise APIError(503, f"requests have not been prepared for {seconds:.0f} s", code="not_preparing")

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself; special tokens spelled out."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.model.decode(token_id) if self.model.info["tokenizer"] else ""
        return text

    def check_open(self, finish_reason: str) -> None:
        """Raises APIError if a generation ended because the server does."""
        if finish_reason == "cancelled":
            raise self._end()
