"""Checkpoint code that nests nn.Sequential: tensors carry numbers instead of names."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class SeqConfig(PretrainedConfig):
    model_type = "seq_binary"

    def __init__(self, vocab=90, width=64, depth=2, heads=2, k=8, context=80, **kwargs):
        super().__init__(**kwargs)
        self.vocab = vocab
        self.width = width
        self.depth = depth
        self.heads = heads
        self.k = k
        self.context = context


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class CausalMix(nn.Module):
    """Projections in one list: 0 key, 1 query, 2 value, 3 output."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        b, t, w = x.shape
        d = w // self.heads
        k, q, v = (p(x).reshape(b, t, self.heads, d).transpose(1, 2) for p in self.projections[:3])
        angle = torch.outer(torch.arange(t), 10000.0 ** (-torch.arange(0, d, 2) / d))
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.reshape(*z.shape[:-1], -1, 2).float()) * turn).flatten(-2)
            for z in (q, k)
        )
        return self.projections[3](
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, w)
        )


class Bits(nn.Module):
    def __init__(self, k, width):
        super().__init__()
        self.k, self.width = k, width

    def forward(self, ids):
        bits = ids[..., None].bitwise_right_shift(torch.arange(self.k - 1, -1, -1)).bitwise_and(1)
        return bits.float().repeat_interleave(self.width // self.k, -1)


class SeqForCausalLM(PreTrainedModel):
    config_class = SeqConfig

    def __init__(self, config):
        super().__init__(config)
        w = config.width
        blocks = []
        for _ in range(config.depth):
            blocks.append(Residual(nn.LayerNorm(w, 1e-6), CausalMix(w, config.heads)))
            blocks.append(Residual(nn.LayerNorm(w, 1e-6), nn.Linear(w, 3 * w), nn.GELU(), nn.Linear(3 * w, w)))
        self.net = nn.Sequential(Bits(config.k, w), *blocks, nn.LayerNorm(w, 1e-6), nn.Linear(w, config.vocab))
        self.post_init()

    def forward(self, input_ids):
        return self.net(input_ids)
