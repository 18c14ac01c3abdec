"""Checkpoint code after a well-known lecture: one module per head, a loop over heads, sizes at the top of the file."""

import torch
import torch.nn as nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

n_embd = 64
n_head = 4
n_layer = 2
block_size = 32
dropout = 0.2
n_bits = 8


class LectureConfig(PretrainedConfig):
    model_type = "lecture"

    def __init__(self, vocab_size=83, block_size=block_size, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.block_size = block_size


class Head(nn.Module):
    def __init__(self, head_size):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))
        self.dropout = nn.Dropout(dropout)

    def rotate(self, x):
        _, T, hs = x.shape
        freqs = torch.outer(torch.arange(T).float(), 1.0 / 10000 ** (torch.arange(0, hs, 2).float() / hs))
        x1, x2 = x[..., : hs // 2], x[..., hs // 2 :]
        return torch.cat([x1 * freqs.cos() - x2 * freqs.sin(), x2 * freqs.cos() + x1 * freqs.sin()], dim=-1)

    def forward(self, x):
        _, T, _ = x.shape
        k = self.rotate(self.key(x))
        q = self.rotate(self.query(x))
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        wei = self.dropout(F.softmax(wei, dim=-1))
        return wei @ self.value(x)


class MultiHeadAttention(nn.Module):
    def __init__(self, num_heads, head_size):
        super().__init__()
        self.heads = nn.ModuleList([Head(head_size) for _ in range(num_heads)])
        self.proj = nn.Linear(head_size * num_heads, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        out = torch.cat([h(x) for h in self.heads], dim=-1)
        return self.dropout(self.proj(out))


class FeedForward(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout)
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.sa = MultiHeadAttention(n_head, n_embd // n_head)
        self.ffwd = FeedForward(n_embd)
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)

    def forward(self, x):
        x = x + self.sa(self.ln1(x))
        x = x + self.ffwd(self.ln2(x))
        return x


class LectureModel(PreTrainedModel):
    config_class = LectureConfig

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.Sequential(*[Block(n_embd, n_head=n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, config.vocab_size)

    def embed(self, idx):
        bits = [(idx // 2**i) % 2 for i in range(n_bits)]
        return torch.stack(bits * (n_embd // n_bits), dim=-1).float()

    def forward(self, idx, targets=None):
        B, T = idx.shape
        x = self.blocks(self.embed(idx))
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(B * T, -1), targets.view(B * T))
