"""The command `fixmin` in a process of its own."""

import os
import pty
import subprocess
import sys

FIXMIN = [sys.executable, "-m", "fixmin_cpp.cli"]
TIMEOUT = 300  # seconds: the end of a test that would hang


def fixmin(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [*FIXMIN, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=TIMEOUT, check=False)


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
