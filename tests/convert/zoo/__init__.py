"""Small checkpoints by many imagined authors, to try the converter on code and files it was not written for."""

from .build import (
    Author,
    Original,
    Style,
    build_model,
    make_checkpoint,
    prompt,
    sampled_text,
    write_code,
)
from .library import LIBRARY, make_library_checkpoint
from .refused import REFUSED
from .styles import STYLES

__all__ = [
    "LIBRARY",
    "REFUSED",
    "STYLES",
    "Author",
    "Original",
    "Style",
    "build_model",
    "make_checkpoint",
    "make_library_checkpoint",
    "prompt",
    "sampled_text",
    "write_code",
]
