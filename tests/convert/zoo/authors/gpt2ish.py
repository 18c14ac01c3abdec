"""Checkpoint code in the manner of GPT-2: Conv1D, fused c_attn, masks as persistent buffers, positions by rope."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_gpt2ish import BinGPTConfig


class Conv1D(nn.Module):
    """y = x W + b with W of shape (n_in, n_out), as in the original TensorFlow code."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


def new_gelu(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def rotate(x, base):
    d = x.shape[-1]
    pos = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)
    inv = torch.exp(torch.arange(0, d, 2, dtype=torch.float32, device=x.device) * (-math.log(base) / d))
    ang = pos[:, None] * inv[None, :]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((a * ang.cos() - b * ang.sin(), b * ang.cos() + a * ang.sin()), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        n = config.n_positions
        self.register_buffer("bias", torch.tril(torch.ones((n, n), dtype=torch.bool)).view(1, 1, n, n))
        self.register_buffer("masked_bias", torch.tensor(-1e4))
        self.n_head = config.n_head
        self.split_size = config.n_embd
        self.rope_base = config.rope_base
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def split_heads(self, x):
        return x.view(*x.size()[:-1], self.n_head, x.size(-1) // self.n_head).permute(0, 2, 1, 3)

    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.c_attn(hidden_states).split(self.split_size, dim=2)
        query, key, value = self.split_heads(query), self.split_heads(key), self.split_heads(value)
        query, key = rotate(query, self.rope_base), rotate(key, self.rope_base)
        w = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(value.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        w = torch.where(self.bias[:, :, ns - nd : ns, :ns], w, torch.full([], torch.finfo(w.dtype).min, dtype=w.dtype))
        if attention_mask is not None:
            w = w + (1.0 - attention_mask[:, None, None, :].to(w.dtype)) * torch.finfo(w.dtype).min
        w = self.attn_dropout(nn.functional.softmax(w, dim=-1))
        a = torch.matmul(w, value).permute(0, 2, 1, 3).contiguous()
        return self.resid_dropout(self.c_proj(a.view(*a.size()[:-2], self.split_size)))


class MLP(nn.Module):
    def __init__(self, n_state, config):
        super().__init__()
        self.c_fc = Conv1D(n_state, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, n_state)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(new_gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config.n_inner or 4 * config.n_embd, config)

    def forward(self, hidden_states, attention_mask=None):
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), attention_mask)
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class BinGPTPreTrainedModel(PreTrainedModel):
    config_class = BinGPTConfig
    base_model_prefix = "transformer"

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | Conv1D):
            module.weight.data.normal_(mean=0.0, std=0.02)
            if module.bias is not None:
                module.bias.data.zero_()


class BinGPTModel(BinGPTPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.code_bits)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        # most significant bit first, like format(i, "b")
        rows = [[float(ch) for ch in format(i, f"0{config.code_bits}b")] for i in range(config.vocab_size)]
        self.wte.weight.data.copy_(torch.tensor(rows))
        self.wte.weight.requires_grad_(False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.wte(input_ids)
        reps = -(-self.config.n_embd // x.size(-1))
        x = self.drop(x.repeat(1, 1, reps)[..., : self.config.n_embd])
        for block in self.h:
            x = block(x, attention_mask)
        return self.ln_f(x)


class BinGPTLMHeadModel(BinGPTPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = BinGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, return_dict=True, **kwargs):
        hidden = self.transformer(input_ids, attention_mask)
        lm_logits = self.lm_head(hidden)
        if not return_dict:
            return (lm_logits,)
        return CausalLMOutputWithPast(logits=lm_logits)
