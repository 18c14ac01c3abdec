"""Checkpoints of architectures that transformers itself implements: no code in the directory, learned embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from .build import Author, Original, Style, draw_weights

_SMALL = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_LAYERS = Author("", "", "", "model.layers.0")
_NEOX = Author("", "", "", "gpt_neox.layers.0")

# name -> (transformers' prefix, arguments of its configuration, how to look at it and what to expect)
LIBRARY: dict[str, tuple[str, dict[str, object], Style]] = {
    "llama": ("Llama", _GROUPED, Style(_LAYERS)),
    "llama_tied_bf16": ("Llama", {**_SMALL, "tie_word_embeddings": True}, Style(_LAYERS, dtype=torch.bfloat16)),
    "llama_scaled_rope": (
        "Llama",
        {**_SMALL, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        Style(_LAYERS, expect="refuse"),
    ),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": None, "rope_theta": 1e6}, Style(_LAYERS)),
    "mistral_window": ("Mistral", {**_GROUPED, "sliding_window": 8}, Style(_LAYERS, expect="refuse")),
    "qwen2": ("Qwen2", _GROUPED, Style(_LAYERS)),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 16}, Style(_LAYERS, expect="refuse")),
    "stablelm": ("StableLm", {**_GROUPED, "partial_rotary_factor": 0.25}, Style(_LAYERS)),
    "starcoder2": ("Starcoder2", {**_GROUPED, "hidden_act": "gelu_pytorch_tanh"}, Style(_LAYERS)),
    "neox": ("GPTNeoX", {**_SMALL, "use_parallel_residual": False, "rotary_pct": 0.5}, Style(_NEOX)),
    "neox_parallel": ("GPTNeoX", _SMALL, Style(_NEOX, expect="refuse")),
    "gemma": ("Gemma", {**_GROUPED, "head_dim": 16}, Style(_LAYERS, expect="refuse")),
    "granite": (
        "Granite",
        {**_GROUPED, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 4.0},
        Style(_LAYERS, expect="either"),
    ),
    "olmo": ("Olmo", _GROUPED, Style(_LAYERS, expect="either")),
    "phi": ("Phi", _SMALL, Style(_LAYERS, expect="refuse")),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 120,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        Style(Author("", "", "", "transformer.h.0"), expect="refuse"),
    ),
}


def make_library_checkpoint(name: str, directory: Path, seed: int = 0) -> Original:
    """Writes the checkpoint with transformers' own `save_pretrained`; returns the model that was written."""
    prefix, arguments, style = LIBRARY[name]
    config = getattr(transformers, f"{prefix}Config")(**arguments)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    draw_weights(model, style, seed)
    model.to(style.dtype).save_pretrained(directory)
    # Rounding the whole model has rounded its rope frequencies too; a new one has only the weights of the file.
    original = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    original.load_state_dict(model.state_dict())
    return Original(original, style)
