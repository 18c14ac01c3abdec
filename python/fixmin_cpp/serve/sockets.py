"""Where a server listens: at an address, or at a Unix socket, whose file is there as long as the server is."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator

from .settings import ServeSettings

__all__ = ["listening"]

_PORT = 8000
_PATIENCE = 5.0  # seconds; a server that looks for another one needs at most one


@contextlib.contextmanager
def listening(settings: ServeSettings) -> Iterator[tuple[socket.socket, str]]:
    """A socket that is bound as the settings say, and the address under which it is reached.

    Raises:
        OSError: the address cannot be used; the message says why.
    """
    if settings.uds is not None:
        path = os.fspath(settings.uds)
        with _unix(path) as listener:
            yield listener, f"unix:{path}"
        return
    with _tcp(settings.host, _PORT if settings.port is None else settings.port) as listener:
        host, port = listener.getsockname()[:2]
        yield listener, f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _tcp(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _refusal(f"{host}:{port}", error) from None
    return listener


@contextlib.contextmanager
def _unix(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            with _alone(os.path.dirname(path) or "."):
                _make_way(path)
                listener.bind(path)
                own = os.lstat(path)
                listener.listen()  # at once: a file that nobody answers at is taken for that of a dead server
        except OSError as error:
            raise _refusal(path, error) from None
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.lstat(path), own):  # and not that of a server which has taken its place
                    os.unlink(path)


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    """One server at a time: of two that find a dead one's file, the second would remove that of the first."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # where that cannot be, all else works
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            end = time.monotonic() + _PATIENCE
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.01)
        yield


def _make_way(path: str) -> None:
    """Removes what a server has left that was killed. Raises OSError for anything else at `path`."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "something else than a socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except (BlockingIOError, TimeoutError):
            pass  # it is busy
    raise OSError(errno.EADDRINUSE, "another process is listening there")


def _refusal(where: str, error: OSError) -> OSError:
    return OSError(error.errno or errno.EINVAL, f"cannot listen on {where}: {error.strerror or error}")
