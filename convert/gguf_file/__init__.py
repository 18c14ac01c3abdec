"""A `ModelSpec` as a GGUF file: number formats, writing, reading back. Used by `fixmin quantize` too."""
