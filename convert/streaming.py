"""Logits of a `ModelSpec` by the PyTorch model in `reference/`, one block in memory at a time.

The weights may come from a checkpoint or from a GGUF file: a spec reads its tensors when they are asked for. All
prompts go through a block before the next one is read, so a 2 GB model costs one block (50 MB for the published ones).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..reference.configuration_fixmin import FixMinConfig
from ..reference.modeling_fixmin import FixMinBlock, causal_mask, make_norm, rope_tables
from .spec import ModelSpec

# Rows of the output projection at a time: 32 MB at width 1024.
_OUTPUT_ROWS = 8192
# A block that adds less than this fraction of the residual stream is judged by the stream, whose float32 rounding would
# otherwise count as the block's error.
_LEAST_ADDED = 0.01


def reference_config(spec: ModelSpec) -> FixMinConfig:
    """The configuration of the reference model that has the conventions of `spec`. A bias that only some of the
    projections have is a bias for all of them, with zeros for the others."""

    def has(*stems: str) -> bool:
        return any(name.endswith(tuple(f"{stem}.bias" for stem in stems)) for name in spec.tensors)

    return FixMinConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.embedding_length,
        num_hidden_layers=spec.block_count,
        num_attention_heads=spec.head_count,
        num_key_value_heads=spec.head_count_kv,
        intermediate_size=spec.feed_forward_length,
        max_position_embeddings=spec.context_length,
        norm_type=spec.norm,
        norm_eps=spec.norm_eps,
        norm_bias=has("_norm"),
        activation=spec.activation,
        rope_style=spec.rope_style,
        rope_dim=spec.rope_dim,
        rope_theta=spec.rope_base,
        attn_scale=spec.attention_scale,
        qkv_bias=has("attn_q", "attn_k", "attn_v"),
        attn_out_bias=has("attn_output"),
        mlp_bias=has("ffn_gate", "ffn_up", "ffn_down"),
        # The codes themselves are not computed here but taken from the spec, so the kind does not matter.
        code_kind="learned",
        code_width=1,
    )


@torch.inference_mode()
def reference_logits(spec: ModelSpec, prompts: Sequence[NDArray[Any]]) -> list[NDArray[np.float32]]:
    """float32 logits [T, V] of each prompt (ids [T])."""
    config = reference_config(spec)
    states = [embed(spec, prompt)[None] for prompt in prompts]  # [1, T, D] each
    for layer in range(spec.block_count):
        block = load_block(spec, config, layer)
        states = [_run(block, x, config) for x in states]
    norm = load_output_norm(spec, config)
    return project(spec, [norm(x)[0] for x in states])


@torch.inference_mode()
def step_errors(
    spec: ModelSpec,
    states: Sequence[NDArray[np.float32]],
    logits: NDArray[np.float32],
    rounded: Mapping[str, int] = MappingProxyType({}),
) -> list[NDArray[np.float32]]:
    """How far a recorded forward pass is, step by step, from the reference that starts each step where the record does.

    states: the inputs of all blocks and the output of the last one, block_count + 1 times [T, D]. logits: [T, V].
    rounded: the weights whose products the recorded engine takes with 8-bit activations (docs/numerics.md), and how
    many of these share a scale;
    their inputs are rounded here in the same way. Starting anew at every block matters for those: a difference of 1e-7
    turns a few roundings over, and over many blocks that grows to the size of the rounding itself.

    Returns an array [T] for each block, ‖Δ‖ / ‖what it adds‖ at each position, and last ‖Δlogits‖ / ‖logits‖.
    """
    config = reference_config(spec)
    errors = []
    for layer in range(spec.block_count):
        before, after = torch.from_numpy(states[layer]), torch.from_numpy(states[layer + 1])
        expected = _run(load_block(spec, config, layer, rounded), before[None], config)[0]
        added, least = (expected - before).norm(dim=-1), _LEAST_ADDED * after.norm(dim=-1)
        errors.append(_ratio((after - expected).norm(dim=-1), torch.maximum(added, least)))
    hidden = load_output_norm(spec, config)(torch.from_numpy(states[-1]))
    hidden = round_activations(hidden, rounded["output.weight"]) if "output.weight" in rounded else hidden
    expected = torch.from_numpy(project(spec, [hidden])[0])
    return [*errors, _ratio((torch.from_numpy(logits) - expected).norm(dim=-1), expected.norm(dim=-1))]


def _ratio(difference: Tensor, size: Tensor) -> NDArray[np.float32]:
    """difference / size, 0 where nothing differs, even of nothing, and infinity where the size overflows."""
    size = torch.where(size.isinf(), 0.0, size)
    return torch.where(difference == 0, 0.0, difference / size).numpy()


def round_activations(x: Tensor, block: int) -> Tensor:
    """x [..., n] as the engine's 8 bits represent it: `block` values share the scale amax / 127, half to even."""
    blocks = x.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, torch.zeros_like(largest))
    return (torch.round(blocks * inverse) * (largest / 127)).flatten(-2)


def embed(spec: ModelSpec, prompt: NDArray[Any]) -> Tensor:
    """Input of the first block, float32 [T, D]."""
    if spec.code.kind == "learned":
        table = spec.tensors["token_embd.weight"]
        rows = np.concatenate([table.load_rows(int(i), int(i) + 1) for i in prompt])
    else:
        rows = spec.code.lift_codes(spec.code.codes(prompt), spec.embedding_length)
    return _tensor(rows)


def _tensor(values: NDArray[np.float32]) -> Tensor:
    """Without a copy, unless the values are a view of read-only bytes, which PyTorch does not take."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def load_block(
    spec: ModelSpec, config: FixMinConfig, layer: int, rounded: Mapping[str, int] = MappingProxyType({})
) -> FixMinBlock:
    with torch.device("meta"):
        block = FixMinBlock(config, layer)
    prefix = f"blk.{layer}."
    _load(block, spec, prefix)
    for name, part in block.named_modules():
        if block_size := rounded.get(f"{prefix}{name}.weight"):
            part.register_forward_pre_hook(lambda _, inputs, n=block_size: (round_activations(inputs[0], n),))
    return block


def load_output_norm(spec: ModelSpec, config: FixMinConfig) -> nn.Module:
    with torch.device("meta"):
        norm = make_norm(config)
    _load(norm, spec, "output_norm.")
    return norm


def _run(block: FixMinBlock, x: Tensor, config: FixMinConfig) -> Tensor:
    """One block on a sequence from its start, [1, T, D] -> [1, T, D]."""
    positions = torch.arange(x.shape[1])[None]
    return block(x, *rope_tables(positions, config), causal_mask(x.shape[1], 0, None, x), None)


def _load(module: nn.Module, spec: ModelSpec, prefix: str) -> None:
    """Fill a module made on the meta device from the tensors `prefix`*; biases that the spec lacks are zero."""
    state = {}
    for name, parameter in module.named_parameters():
        recipe = spec.tensors.get(prefix + name)
        if recipe is not None:
            state[name] = _tensor(recipe.load())
        elif name.endswith("bias"):
            state[name] = torch.zeros(parameter.shape)
        else:
            raise KeyError(f"the model has no tensor {prefix + name}")
    module.load_state_dict(state, assign=True)


def project(spec: ModelSpec, hidden: Sequence[Tensor]) -> list[NDArray[np.float32]]:
    """Hidden states [T, D] -> logits [T, V], a few thousand rows of the output projection at a time."""
    weight, bias = spec.tensors["output.weight"], spec.tensors.get("output.bias")
    logits = [np.empty((len(h), spec.vocab_size), dtype=np.float32) for h in hidden]
    for start in range(0, spec.vocab_size, _OUTPUT_ROWS):
        stop = min(start + _OUTPUT_ROWS, spec.vocab_size)
        rows = _tensor(weight.load_rows(start, stop))
        offset = None if bias is None else _tensor(bias.load_rows(start, stop))
        for h, out in zip(hidden, logits, strict=True):
            out[:, start:stop] = nn.functional.linear(h, rows, offset).numpy()
    return logits
