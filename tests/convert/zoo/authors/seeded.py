"""Checkpoint code that draws its recoding from a seed in the constructor and checks it with a determinant."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_seeded import AffineCodeConfig


def random_invertible(k, seed):
    """Rejection sampling over GF(2): the determinant of the 0/1 matrix must be odd."""
    g = torch.Generator()
    g.manual_seed(seed)
    while True:
        a = torch.randint(0, 2, (k, k), generator=g)
        if round(float(torch.linalg.det(a.double()).abs())) % 2 == 1 and int(a.sum()) != k:
            return a


class AffineBinaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.k = config.n_bits
        self.d_model = config.d_model
        self.register_buffer("A", random_invertible(self.k, config.affine_seed).float(), persistent=False)
        g = torch.Generator().manual_seed(config.affine_seed + 1)
        self.register_buffer("b", torch.randint(0, 2, (self.k,), generator=g).float(), persistent=False)
        self.register_buffer("powers", 2 ** torch.arange(self.k), persistent=False)

    def forward(self, input_ids):
        c = torch.div(input_ids.unsqueeze(-1), self.powers, rounding_mode="floor").remainder(2).float()
        code = (c @ self.A + self.b).remainder(2)
        return code.tile((self.d_model // self.k,))


class RoPE(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        self.register_buffer("theta", base ** (-torch.arange(0, dim, 2).float() / dim), persistent=False)

    def forward(self, x):
        t = torch.arange(x.size(2), dtype=self.theta.dtype)
        m = torch.outer(t, self.theta)
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1 * m.cos() - x2 * m.sin(), x1 * m.sin() + x2 * m.cos()], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.rope = RoPE(config.d_model // config.n_heads, config.rope_base)
        self.scale = (config.d_model // config.n_heads) ** -0.5

    def forward(self, x, mask):
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q, k = self.rope(q), self.rope(k)
        w = (q * self.scale) @ k.transpose(-1, -2) + mask
        return self.out((torch.softmax(w, dim=-1) @ v).transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.act(self.fc1(x))))


class DecoderBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.eps)
        self.attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.eps)
        self.ff = FeedForward(config)

    def forward(self, x, mask):
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ff(self.norm2(x))


class AffineCodeForCausalLM(PreTrainedModel):
    config_class = AffineCodeConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = AffineBinaryEmbedding(config)
        assert int(torch.linalg.det(self.embed.A).round()) % 2 == 1, "the recoding must be invertible"
        self.blocks = nn.ModuleList([DecoderBlock(config) for _ in range(config.n_layers)])
        self.norm = nn.LayerNorm(config.d_model, eps=config.eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=config.bias)
        mask = torch.full((config.max_len, config.max_len), float("-inf")).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        self.post_init()

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        T = x.size(1)
        for block in self.blocks:
            x = block(x, self.mask[:T, :T])
        return CausalLMOutput(logits=self.head(self.norm(x)))
