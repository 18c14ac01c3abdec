"""Small checkpoints by many imagined authors, to try the converter on code and files it was not written for."""

from .build import Author, Original, Style, build_model, character_of, make_checkpoint, prompt, write_code
from .refused import REFUSED
from .styles import STYLES

__all__ = [
    "REFUSED",
    "STYLES",
    "Author",
    "Original",
    "Style",
    "build_model",
    "character_of",
    "make_checkpoint",
    "prompt",
    "write_code",
]
