"""Checkpoint code in the manner of GPT-NeoX: query_key_value per head, rotary on a quarter of each head."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class NeoBitConfig(PretrainedConfig):
    model_type = "neobit"

    def __init__(
        self,
        vocab_size=100,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        rotary_pct=0.25,
        rotary_emb_base=7777,
        layer_norm_eps=1e-5,
        max_position_embeddings=96,
        bits=8,
        code_low=-1.0,
        code_high=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.rotary_pct = rotary_pct
        self.rotary_emb_base = rotary_emb_base
        self.layer_norm_eps = layer_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.bits = bits
        self.code_low = code_low
        self.code_high = code_high


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, max_seq_len, base):
        super().__init__()
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))
        self.register_buffer("inv_freq", inv_freq)
        freqs = torch.einsum("i,j->ij", torch.arange(max_seq_len).float(), inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        self.register_buffer("cos_cached", emb.cos()[None, None], persistent=False)
        self.register_buffer("sin_cached", emb.sin()[None, None], persistent=False)

    def forward(self, seq_len):
        return self.cos_cached[:, :, :seq_len], self.sin_cached[:, :, :seq_len]


class NeoBitAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.rotary_ndims = int(self.head_size * config.rotary_pct)
        self.rotary_emb = RotaryEmbedding(self.rotary_ndims, config.max_position_embeddings, config.rotary_emb_base)
        self.norm_factor = self.head_size**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    @staticmethod
    def rotate(x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def forward(self, hidden_states):
        batch, seq, _ = hidden_states.shape
        qkv = self.query_key_value(hidden_states).view(batch, seq, self.num_attention_heads, 3 * self.head_size)
        query, key, value = qkv.permute(0, 2, 1, 3).chunk(3, dim=-1)
        n = self.rotary_ndims
        cos, sin = self.rotary_emb(seq)
        query = torch.cat((self.rotate(query[..., :n], cos, sin), query[..., n:]), dim=-1)
        key = torch.cat((self.rotate(key[..., :n], cos, sin), key[..., n:]), dim=-1)
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.norm_factor
        causal = torch.ones(seq, seq, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(causal, torch.finfo(scores.dtype).min)
        out = torch.matmul(scores.softmax(-1), value)
        return self.dense(out.permute(0, 2, 1, 3).reshape(batch, seq, -1))


class NeoBitMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states)))


class NeoBitLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = NeoBitAttention(config)
        self.mlp = NeoBitMLP(config)

    def forward(self, hidden_states):
        attention_output = self.attention(self.input_layernorm(hidden_states)) + hidden_states
        return self.mlp(self.post_attention_layernorm(attention_output)) + attention_output


class NeoBitModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([NeoBitLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def embed_in(self, input_ids):
        config = self.config
        bits = torch.stack([(input_ids >> i) & 1 for i in range(config.bits)], dim=-1).to(torch.float32)
        values = config.code_low + (config.code_high - config.code_low) * bits
        return torch.cat([values] * (config.hidden_size // config.bits), dim=-1)

    def forward(self, input_ids):
        hidden_states = self.embed_in(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.final_layer_norm(hidden_states)


class NeoBitForCausalLM(PreTrainedModel):
    config_class = NeoBitConfig

    def __init__(self, config):
        super().__init__(config)
        self.gpt_neox = NeoBitModel(config)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return (self.embed_out(self.gpt_neox(input_ids)),)
