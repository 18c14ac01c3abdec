"""The command `fixmin` in a process of its own."""

import subprocess
import sys

FIXMIN = [sys.executable, "-m", "fixmin_cpp.cli"]
TIMEOUT = 300  # seconds: the end of a test that would hang


def fixmin(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [*FIXMIN, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=TIMEOUT, check=False)
