"""Checkpoint code in the manner of LLaMA: RMSNorm by hand, SwiGLU, grouped queries, SDPA, code matrix in a buffer."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llamaish import BitLlamaConfig


class BitLlamaRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class BitLlamaRotaryEmbedding(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        self.dim = dim
        self.base = base

    def forward(self, x, position_ids):
        inv_freq = 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim))
        freqs = position_ids[:, :, None].float() * inv_freq[None, None, :]
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def apply_rotary(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class BitLlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class BitLlamaAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states, position_embeddings, attention_mask=None):
        bsz, q_len, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(bsz, q_len, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(hidden_states).view(bsz, q_len, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(hidden_states).view(bsz, q_len, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = apply_rotary(q, k, *position_embeddings)
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q_len > 1)
        return self.o_proj(out.transpose(1, 2).reshape(bsz, q_len, -1))


class BitLlamaDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = BitLlamaAttention(config, layer_idx)
        self.mlp = BitLlamaMLP(config)
        self.input_layernorm = BitLlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = BitLlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None):
        residual = hidden_states
        hidden_states = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, attention_mask)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        return (residual + hidden_states,)


class BinaryCode(nn.Module):
    """c~ = A c + b over GF(2), lifted to the hidden size."""

    def __init__(self, config):
        super().__init__()
        k = config.code_width
        gen = torch.Generator().manual_seed(config.code_seed)
        lower = torch.tril(torch.randint(0, 2, (k, k), generator=gen), -1) + torch.eye(k, dtype=torch.long)
        upper = torch.triu(torch.randint(0, 2, (k, k), generator=gen), 1) + torch.eye(k, dtype=torch.long)
        perm = torch.randperm(k, generator=gen)
        self.register_buffer("code_matrix", ((lower @ upper) % 2)[perm].to(torch.uint8))
        self.register_buffer("code_shift", torch.randint(0, 2, (k,), generator=gen).to(torch.uint8))
        self.k = k
        self.hidden_size = config.hidden_size

    def forward(self, input_ids):
        bits = (input_ids.unsqueeze(-1) >> torch.arange(self.k, device=input_ids.device)) & 1
        code = (bits @ self.code_matrix.long().T + self.code_shift.long()) % 2
        return code.to(torch.get_default_dtype()).repeat_interleave(self.hidden_size // self.k, dim=-1)


class BitLlamaModel(PreTrainedModel):
    config_class = BitLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_code = BinaryCode(config)
        self.layers = nn.ModuleList([BitLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = BitLlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = BitLlamaRotaryEmbedding(config.hidden_size // config.num_attention_heads, config.rope_theta)
        self.post_init()

    def forward(self, input_ids, position_ids=None, attention_mask=None):
        hidden_states = self.embed_code(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings)[0]
        return self.norm(hidden_states)


class BitLlamaForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BitLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = BitLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        hidden_states = self.model(input_ids, position_ids, attention_mask)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))
