#!/usr/bin/env python3
"""Convert a Hugging Face checkpoint to GGUF:

    python convert/hf_to_gguf.py CHECKPOINT_DIR -o OUT.gguf --outtype q8_0 --trust-remote-code

The same as `fixmin convert`; `--help` lists the options. Needs the package: pip install '.[convert]'
"""

import sys
from pathlib import Path


def main() -> None:
    """Run `fixmin convert` with the arguments of this process; does not return."""
    # Python put this folder first on the path, where spec.py and others would hide modules of a checkpoint.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    try:
        from fixmin_cpp.cli import app
    except ModuleNotFoundError as error:
        if error.name == "fixmin_cpp":
            sys.exit(f"fixmin_cpp is not installed for {sys.executable}: run  pip install '{here.parent}[convert]'")
        sys.exit(f"the Python package {error.name!r} is missing: run  pip install 'fixmin-cpp[convert]'")
    app(["convert", *sys.argv[1:]], prog_name="fixmin")


if __name__ == "__main__":
    main()
