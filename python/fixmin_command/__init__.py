"""Entry point of the script `fixmin`: Ctrl-C ends it quietly, also while its modules are imported.

A package of its own, since `import fixmin_cpp.cli` imports all of fixmin_cpp first.
"""

import os
import signal


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # No KeyboardInterrupt: in an import it may become another error, or be ignored.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from fixmin_cpp.cli import main as run

    run()
