"""Checkpoint code of someone who thinks in formulas: bare parameters with short names, einsum, no nn.Linear."""

import torch
import torch.nn as nn
from transformers import PretrainedConfig, PreTrainedModel

# The recoding, row by row: bit j of row i says whether output bit i takes input bit j.
A_ROWS = [0b0000011, 0b0100110, 0b0001100, 0b1011001, 0b0110010, 0b1100000, 0b1000100]
B_BITS = 0b0101101


class FormulaConfig(PretrainedConfig):
    model_type = "formula"

    def __init__(self, V=120, K=7, D=64, H=4, L=2, F=160, T=64, **kwargs):
        super().__init__(**kwargs)
        self.V, self.K, self.D, self.H, self.L, self.F, self.T = V, K, D, H, L, F, T


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H = c.H
        self.g = nn.Parameter(torch.ones(c.D))
        self.q = nn.Parameter(torch.empty(c.D, c.D))
        self.k = nn.Parameter(torch.empty(c.D, c.D))
        self.v = nn.Parameter(torch.empty(c.D, c.D))
        self.o = nn.Parameter(torch.empty(c.D, c.D))
        self.s = nn.Parameter(torch.ones(c.D))
        self.u = nn.Parameter(torch.empty(c.F, c.D))
        self.w = nn.Parameter(torch.empty(c.F, c.D))
        self.z = nn.Parameter(torch.empty(c.D, c.F))

    def forward(self, x):
        n = rms(x) * self.g
        q, k, v = (torch.einsum("btd,ed->bte", n, m).unflatten(-1, (self.H, -1)) for m in (self.q, self.k, self.v))
        q, k = spin(q), spin(k)
        a = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        t = x.shape[1]
        a = (a + torch.full((t, t), -torch.inf).triu(1)).softmax(-1)
        y = torch.einsum("bhij,bjhd->bihd", a, v).flatten(-2)
        x = x + torch.einsum("bte,de->btd", y, self.o)
        n = rms(x) * self.s
        h = torch.einsum("btd,fd->btf", n, self.u)
        h = h * torch.sigmoid(h) * torch.einsum("btd,fd->btf", n, self.w)
        return x + torch.einsum("btf,df->btd", h, self.z)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def spin(x):
    """Rotates neighbours (2i, 2i+1); x [b, t, h, d]."""
    d = x.shape[-1]
    f = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    c, s = f.cos()[:, None], f.sin()[:, None]
    e, o = x[..., ::2], x[..., 1::2]
    return torch.stack((e * c - o * s, e * s + o * c), -1).flatten(-2)


class Formula(PreTrainedModel):
    config_class = FormulaConfig

    def __init__(self, config):
        super().__init__(config)
        self.l = nn.ModuleList([Layer(config) for _ in range(config.L)])
        self.f = nn.Parameter(torch.ones(config.D))
        self.y = nn.Parameter(torch.empty(config.V, config.D))
        self.post_init()

    def code(self, t):
        rows = []
        for i in range(self.config.K):
            parity = t & A_ROWS[i]
            parity = parity ^ (parity >> 4)
            parity = parity ^ (parity >> 2)
            parity = parity ^ (parity >> 1)
            rows.append((parity & 1) ^ ((B_BITS >> i) & 1))
        c = torch.stack(rows, -1).to(torch.float32)
        return c[..., torch.arange(self.config.D) % self.config.K]

    def forward(self, input_ids, **_):
        x = self.code(input_ids)
        for l in self.l:
            x = l(x)
        return rms(x) * self.f @ self.y.T
