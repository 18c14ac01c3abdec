"""The helpers that write GGUF bytes and compile with sanitizers live beside the reader's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gguf"))
