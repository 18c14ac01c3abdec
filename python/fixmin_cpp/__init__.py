"""Native inference for language models without an input embedding table.

>>> import fixmin_cpp
>>> with fixmin_cpp.Model("model.gguf") as model:
...     print(model.generate("Question: What is the capital of France?\\nAnswer:", max_new_tokens=3).text)

Importing this package loads NumPy and the native module only; `tokenizers` is loaded with the first model and
PyTorch never (only `fixmin_cpp.convert()` and `fixmin_cpp.reference` use it).
"""

import logging
from typing import TYPE_CHECKING

from ._core import __version__
from .api import clear_cache, generate, quantize, system_info
from .beam import Beam
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    BusyError,
    CheckpointError,
    ContextLengthError,
    DeviceError,
    FixminError,
    GGUFError,
    UnsupportedError,
)
from .evaluate import Divergence, Perplexity, perplexity
from .generation import Completion, Piece, Timings, TokenLogprob
from .model import Model, Score
from .running import AsyncTextStream, TextStream
from .sampling_fields import GenerationArguments

if TYPE_CHECKING:
    from .api import convert
else:
    from . import convert  # the package, which can be called like api.convert()

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent until the program that uses it says otherwise

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "AsyncTextStream",
    "Beam",
    "BusyError",
    "CheckpointError",
    "Completion",
    "ContextLengthError",
    "DeviceError",
    "Divergence",
    "FixminError",
    "GGUFError",
    "GenerationArguments",
    "Model",
    "Perplexity",
    "Piece",
    "Score",
    "TextStream",
    "Timings",
    "TokenLogprob",
    "UnsupportedError",
    "__version__",
    "clear_cache",
    "convert",
    "generate",
    "perplexity",
    "quantize",
    "system_info",
]
