"""GGUF files in other number formats: `requantize` (fixmin quantize), `imatrix`. Needs fixmin-cpp[quantize]."""
