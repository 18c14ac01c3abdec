"""From a Hugging Face checkpoint to a certified GGUF file (DESIGN §4).

`resolve` finds out what function a checkpoint computes and returns it as a `ModelSpec`; writing and certifying the file
is built on top of that. torch is imported only by the modules that run a model, and only when they do.
"""

from .spec import CodeSpec, ModelSpec, Resolved, TensorRecipe

__all__ = ["CodeSpec", "ModelSpec", "Resolved", "TensorRecipe"]
