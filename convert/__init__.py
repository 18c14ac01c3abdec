"""From a Hugging Face checkpoint to a certified GGUF file.

The rooms in the order of work; each imports only from those above it:

    spec        what a model computes, as numbers and lazily read tensors: the interface of everything below
    overrides   what a user may state: one table of options
    streaming   logits of a spec by the PyTorch model in reference/, block by block
    checkpoint  what lies in the folder: config.json, tensors and their roles, codes, tokenizer, which code
    observed    the checkpoint's own code, run and watched: conventions read off what it computes
    stated      without code: what files and options say, and what the loss on a text decides
    resolve     one of the two, and its checks: a checkpoint -> a spec with the origin of every convention
    gguf_file   a spec -> a GGUF file, and back; number formats
    certify     the proof that the file computes the function of the checkpoint
    convert     all of it in one call, and the command line (hf_to_gguf.py is a script for it)

torch is imported only by the modules that run a model, and only when they do.

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
