"""The command `fixmin` in a process of its own."""

import atexit
import functools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

FIXMIN = [sys.executable, "-m", "fixmin_cpp.cli"]
TIMEOUT = 300  # seconds: the end of a test that would hang

# Imports the command once; each request is then a fork, whose streams, folder and variables are those of the request,
# and which ends as any interpreter does. Starting an interpreter for each took five times as long.
_FORKS = """
import json, os, sys
from fixmin_cpp.cli import main
requests, answers = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")
for request in requests:
    arguments, streams, folder, variables = json.loads(request)
    if (child := os.fork()) == 0:
        for stream, path in enumerate(streams):
            os.dup2(os.open(path, os.O_RDWR), stream)
        requests.close(), answers.close()
        os.chdir(folder), os.environ.clear(), os.environ.update(variables)
        sys.argv = ["fixmin", *arguments]
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
else:
    sys.exit()
main()
"""


@functools.cache
def _forks() -> tuple[subprocess.Popen[bytes], int, int]:
    """The process that is forked, where it takes requests and where it gives exit codes."""
    (its_requests, requests), (answers, its_answers) = os.pipe(), os.pipe()
    command = [sys.executable, "-c", _FORKS, str(its_requests), str(its_answers)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, pass_fds=(its_requests, its_answers), start_new_session=True
    )
    os.close(its_requests), os.close(its_answers)
    atexit.register(lambda: (os.close(requests), process.wait(TIMEOUT)))
    return process, requests, answers


def fixmin(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    process, requests, answers = _forks()
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        for stream in streams:
            stream.write_bytes(stdin if stream.name == "stdin" else b"")
        request = [words, list(map(str, streams)), os.getcwd(), dict(os.environ)]
        os.write(requests, json.dumps(request).encode() + b"\n")
        if not select.select([answers], [], [], TIMEOUT)[0]:
            os.killpg(process.pid, signal.SIGKILL)
            _forks.cache_clear()
            raise subprocess.TimeoutExpired(words, TIMEOUT)
        code = int(os.read(answers, 16))
        return subprocess.CompletedProcess(words, code, streams[1].read_bytes(), streams[2].read_bytes())


def on_terminal(command: list[str], columns: int = 200, **variables: str) -> str:
    """What a program that succeeds writes to a terminal of so many columns."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **variables}
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment) as process:
        os.close(child)
        output = b""
        while True:
            try:
                block = os.read(parent, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not block:
                break
            output += block
    os.close(parent)
    assert process.returncode == 0, output
    return output.decode().replace("\r\n", "\n")
