"""Checkpoint code with one three-dimensional parameter per role and head: W_Q[h, d_model, d_head]."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class LensConfig(PretrainedConfig):
    model_type = "lens"

    def __init__(self, d_vocab=96, d_model=64, d_head=16, n_heads=4, n_layers=2, d_mlp=128, n_ctx=64, **kwargs):
        super().__init__(**kwargs)
        self.d_vocab = d_vocab
        self.d_model = d_model
        self.d_head = d_head
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.d_mlp = d_mlp
        self.n_ctx = n_ctx


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w = nn.Parameter(torch.ones(n))
        self.b = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * self.w + self.b


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.ln1, self.ln2 = Norm(c.d_model), Norm(c.d_model)
        self.W_Q = nn.Parameter(torch.empty(c.n_heads, c.d_model, c.d_head))
        self.W_K = nn.Parameter(torch.empty(c.n_heads, c.d_model, c.d_head))
        self.W_V = nn.Parameter(torch.empty(c.n_heads, c.d_model, c.d_head))
        self.W_O = nn.Parameter(torch.empty(c.n_heads, c.d_head, c.d_model))
        self.b_Q = nn.Parameter(torch.zeros(c.n_heads, c.d_head))
        self.b_K = nn.Parameter(torch.zeros(c.n_heads, c.d_head))
        self.b_V = nn.Parameter(torch.zeros(c.n_heads, c.d_head))
        self.b_O = nn.Parameter(torch.zeros(c.d_model))
        self.W_in = nn.Parameter(torch.empty(c.d_model, c.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(c.d_mlp))
        self.W_out = nn.Parameter(torch.empty(c.d_mlp, c.d_model))
        self.b_out = nn.Parameter(torch.zeros(c.d_model))

    def forward(self, x):
        n = self.ln1(x)
        q = turn(torch.einsum("btm,hmd->bhtd", n, self.W_Q) + self.b_Q[:, None])
        k = turn(torch.einsum("btm,hmd->bhtd", n, self.W_K) + self.b_K[:, None])
        v = torch.einsum("btm,hmd->bhtd", n, self.W_V) + self.b_V[:, None]
        a = q @ k.mT / self.c.d_head**0.5
        a = a.masked_fill(torch.ones_like(a, dtype=torch.bool).triu(1), -1e5).softmax(-1)
        x = x + torch.einsum("bhtd,hdm->btm", a @ v, self.W_O) + self.b_O
        return x + nn.functional.gelu(self.ln2(x) @ self.W_in + self.b_in) @ self.W_out + self.b_out


def turn(x):
    d = x.shape[-1] // 2
    ang = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(d) / d)
    return torch.cat(
        (x[..., :d] * ang.cos() - x[..., d:] * ang.sin(), x[..., d:] * ang.cos() + x[..., :d] * ang.sin()), -1
    )


class LensForCausalLM(PreTrainedModel):
    config_class = LensConfig

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.ln_final = Norm(config.d_model)
        self.W_U = nn.Parameter(torch.empty(config.d_model, config.d_vocab))
        self.b_U = nn.Parameter(torch.zeros(config.d_vocab))
        k = (config.d_vocab - 1).bit_length()
        self.register_buffer("bits", ((torch.arange(config.d_vocab)[:, None] >> torch.arange(k)) & 1).bool())
        self.post_init()

    def forward(self, tokens, **kwargs):
        x = self.bits[tokens].float()
        x = x[..., torch.arange(self.config.d_model) % x.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x) @ self.W_U + self.b_U
