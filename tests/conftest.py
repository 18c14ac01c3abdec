"""Shared by all tests: the import path of helper modules, and hypothesis without its clock."""

import sys
from pathlib import Path

from hypothesis import settings

# Tests in subfolders can `import oracle` and `import gguf_factory`.
sys.path.insert(0, str(Path(__file__).parent))

# Tests never time anything: hypothesis would fail an example that is slow because the machine is busy.
settings.register_profile("fixmin", deadline=None)
settings.load_profile("fixmin")
