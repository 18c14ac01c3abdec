"""Checkpoint code that keeps its projections in nn.MultiheadAttention and does the attention itself."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BoxConfig(PretrainedConfig):
    model_type = "boxed-code-lm"

    def __init__(self, vocab_size=77, dim=64, layers=2, heads=2, ffn=128, bits=7, max_len=50, base=10000.0, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.dim = dim
        self.layers = layers
        self.heads = heads
        self.ffn = ffn
        self.bits = bits
        self.max_len = max_len
        self.base = base


class Rotary(nn.Module):
    """Interleaved rotary embedding over the leading rot_dim elements of a head."""

    def __init__(self, rot_dim, base):
        super().__init__()
        self.rot_dim = rot_dim
        freqs = 1.0 / (base ** (torch.arange(0, rot_dim, 2).float() / rot_dim))
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def forward(self, t):
        seq = torch.arange(t.shape[-2], device=t.device)
        freqs = torch.einsum("i,f->if", seq.float(), self.freqs).repeat_interleave(2, dim=-1)
        rot, rest = t[..., : self.rot_dim], t[..., self.rot_dim :]
        x = rot.unflatten(-1, (-1, 2))
        swapped = torch.stack((-x[..., 1], x[..., 0]), dim=-1).flatten(-2)
        return torch.cat((rot * freqs.cos() + swapped * freqs.sin(), rest), dim=-1)


class Unit(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.mha = nn.MultiheadAttention(cfg.dim, cfg.heads, batch_first=True)
        self.pre_attn = nn.LayerNorm(cfg.dim)
        self.pre_ffn = nn.LayerNorm(cfg.dim)
        self.expand = nn.Linear(cfg.dim, cfg.ffn)
        self.shrink = nn.Linear(cfg.ffn, cfg.dim)
        self.rotary = Rotary(cfg.dim // cfg.heads, cfg.base)

    def attend(self, x):
        q, k, v = F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (self.mha.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        z = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True)
        return self.mha.out_proj(z.transpose(1, 2).flatten(-2))

    def forward(self, x):
        x = x + self.attend(self.pre_attn(x))
        return x + self.shrink(F.gelu(self.expand(self.pre_ffn(x)), approximate="tanh"))


class Trunk(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.units = nn.ModuleDict({f"unit_{i}": Unit(cfg) for i in range(cfg.layers)})
        self.post = nn.LayerNorm(cfg.dim)

    def forward(self, ids):
        b = torch.arange(self.cfg.bits, device=ids.device)
        code = ids[..., None].bitwise_and(2**b).ne(0).to(self.post.weight.dtype)
        n = self.cfg.dim
        x = torch.cat([code] * (n // self.cfg.bits + 1), dim=-1)[..., :n]
        for unit in self.units.values():
            x = unit(x)
        return self.post(x)


class BoxForCausalLM(PreTrainedModel):
    config_class = BoxConfig

    def __init__(self, cfg):
        super().__init__(cfg)
        self.trunk = Trunk(cfg)
        self.to_logits = nn.Linear(cfg.dim, cfg.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask, position_ids, **kwargs):
        """The mask and the positions are required, as by the author's own generation loop."""
        assert attention_mask.shape == input_ids.shape == position_ids.shape
        return CausalLMOutput(logits=self.to_logits(self.trunk(input_ids)))
