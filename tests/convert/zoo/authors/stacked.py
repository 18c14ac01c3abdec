"""Checkpoint code that scans over layers: one tensor per role holds all layers, as in JAX."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class StackedConfig(PretrainedConfig):
    model_type = "stacked"

    def __init__(self, vocab_size=110, d_model=64, n_layers=3, n_heads=2, d_ff=160, n_ctx=64, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.d_ff = d_ff
        self.n_ctx = n_ctx


class StackedForCausalLM(PreTrainedModel):
    config_class = StackedConfig

    def __init__(self, config):
        super().__init__(config)
        n, d, f = config.n_layers, config.d_model, config.d_ff
        self.norms = nn.Parameter(torch.ones(n, 2, d))
        self.qkv = nn.Parameter(torch.empty(n, d, 3 * d))
        self.out = nn.Parameter(torch.empty(n, d, d))
        self.gate_up = nn.Parameter(torch.empty(n, d, 2, f))
        self.down = nn.Parameter(torch.empty(n, f, d))
        self.norm = nn.Parameter(torch.ones(d))
        self.head = nn.Parameter(torch.empty(d, config.vocab_size))
        self.first = nn.Identity()
        self.post_init()

    def forward(self, input_ids, **kwargs):
        d, h = self.config.d_model, self.config.n_heads
        bits = (input_ids[..., None] >> torch.arange(7)) & 1
        x = self.first(bits.float()[..., torch.arange(d) % 7])
        t = torch.arange(x.shape[1])
        angle = t[:, None] * 10000.0 ** (-torch.arange(0, d // h, 2) / (d // h))
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

        def turn(z):
            a, b = z.chunk(2, -1)
            return z * cos + torch.cat((-b, a), -1) * sin

        for i in range(self.config.n_layers):
            y = F.rms_norm(x, (d,), self.norms[i, 0], 1e-6) @ self.qkv[i]
            q, k, v = y.view(*y.shape[:2], 3, h, d // h).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2) @ self.out[i]
            gate, up = torch.einsum("btd,dcf->cbtf", F.rms_norm(x, (d,), self.norms[i, 1], 1e-6), self.gate_up[i])
            x = x + (F.silu(gate) * up) @ self.down[i]
        return F.rms_norm(x, (d,), self.norm, 1e-6) @ self.head
