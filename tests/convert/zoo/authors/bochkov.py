"""Checkpoint code as the author of the published checkpoints is believed to write it: everything in one file."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BVVConfig(PretrainedConfig):
    model_type = "model_n_embed_binary"

    def __init__(
        self,
        vocab_size=256,
        n_embed=8,
        d_model=64,
        n_head=2,
        n_layer=2,
        block_size=64,
        pad_id=3,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.n_embed = n_embed
        self.d_model = d_model
        self.n_head = n_head
        self.n_layer = n_layer
        self.block_size = block_size
        self.pad_id = pad_id


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, base=10000):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x, seq_len):
        t = torch.arange(seq_len, device=x.device).type_as(self.inv_freq)
        freqs = torch.einsum("i,j->ij", t, self.inv_freq)
        emb = torch.cat([freqs, freqs], dim=-1)
        return emb.cos()[None, None, :, :], emb.sin()[None, None, :, :]


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([-x2, x1], dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin):
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


class MultiHeadSelfAttention(nn.Module):
    def __init__(self, d_model, n_head, block_size):
        super().__init__()
        self.n_head = n_head
        self.head_dim = d_model // n_head
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.rotary_emb = RotaryEmbedding(self.head_dim)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)).bool())
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        B, T, C = x.size()
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        cos, sin = self.rotary_emb(q, T)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        att = (q @ k.transpose(-2, -1)) * (self.head_dim**-0.5)
        att = att.masked_fill(~self.tril[:T, :T], float("-inf"))
        att = self.dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        return self.o_proj(y)


class TransformerBlock(nn.Module):
    def __init__(self, d_model, n_head, block_size):
        super().__init__()
        self.self_attn = MultiHeadSelfAttention(d_model, n_head, block_size)
        self.input_layernorm = nn.LayerNorm(d_model)
        self.post_attention_layernorm = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class BVVForCausalLM(PreTrainedModel):
    config_class = BVVConfig

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        self.token_embeddings = nn.Embedding(config.vocab_size, config.n_embed)
        ids = torch.arange(config.vocab_size).unsqueeze(1)
        with torch.no_grad():
            self.token_embeddings.weight.copy_(((ids >> torch.arange(config.n_embed)) & 1).float())
        self.token_embeddings.weight.requires_grad = False
        self.repeats = config.d_model // config.n_embed
        self.transformer_layers = nn.ModuleList(
            [TransformerBlock(config.d_model, config.n_head, config.block_size) for _ in range(config.n_layer)]
        )
        self.final_layernorm = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, input_ids, labels=None, **kwargs):
        x = self.token_embeddings(input_ids).repeat_interleave(self.repeats, dim=-1)
        for layer in self.transformer_layers:
            x = layer(x)
        logits = self.lm_head(self.final_layernorm(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=self.config.pad_id)
        return CausalLMOutput(loss=loss, logits=logits)
