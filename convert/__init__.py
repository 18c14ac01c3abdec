"""From a Hugging Face checkpoint to a certified GGUF file (DESIGN §4).

`resolve` finds out what function a checkpoint computes and returns it as a `ModelSpec`; writing and certifying the file
is built on top of that. torch is imported only by the modules that run a model, and only when they do.

The package itself can be called: `fixmin_cpp.convert(...)` is `fixmin_cpp.api.convert(...)`.
"""

import inspect
import sys
import types

from ..api import convert as _convert
from .spec import CodeSpec, ModelSpec, Resolved, TensorRecipe

__all__ = ["CodeSpec", "ModelSpec", "Resolved", "TensorRecipe"]


class _Callable(types.ModuleType):
    __call__ = staticmethod(_convert)


sys.modules[__name__].__class__ = _Callable
__signature__ = inspect.signature(_convert)  # what help() and editors show
