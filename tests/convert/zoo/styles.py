"""The checkpoints of the zoo that hold a function GGUF can express: which author, which configuration, which habit.

An edit names the shortest fragment of the author's file that says what to change.
"""

from __future__ import annotations

import torch

from .build import Author, Edits, Style

BOCHKOV = Author("bochkov", "BVVConfig", "BVVForCausalLM", "transformer_layers.0", context_key="block_size")
GPT2 = Author(
    "gpt2ish", "BinGPTConfig", "BinGPTLMHeadModel", "transformer.h.0",
    config_file="configuration_gpt2ish", context_key="n_positions",
)  # fmt: skip
LLAMA = Author(
    "llamaish", "BitLlamaConfig", "BitLlamaForCausalLM", "model.layers.0", config_file="configuration_llamaish"
)
NEOX = Author("neoxish", "NeoBitConfig", "NeoBitForCausalLM", "gpt_neox.layers.0", head="embed_out")
NUMBERED = Author("numbered", "SeqConfig", "SeqForCausalLM", "net.1.0", vocab_key="vocab", context_key="context")
LETTERS = Author("letters", "FormulaConfig", "Formula", "l.0", vocab_key="V", context_key="T")
SEEDED = Author(
    "seeded", "AffineCodeConfig", "AffineCodeForCausalLM", "blocks.0", head=r"^head",
    config_file="configuration_seeded", context_key="max_len",
)  # fmt: skip
NANO = Author("nano", "GPTConfig", "GPT", "transformer.h.0", context_key="block_size")
BOXED = Author(
    "boxed", "BoxConfig", "BoxForCausalLM", "trunk.units.unit_0", head="to_logits", context_key="max_len",
    call=lambda model, ids: model(ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)),
)  # fmt: skip
LECTURE = Author("lecture", "LectureConfig", "LectureModel", "blocks.0", context_key="block_size")
STACKED = Author("stacked", "StackedConfig", "StackedForCausalLM", "first", context_key="n_ctx")
LENS = Author("lens", "LensConfig", "LensForCausalLM", "blocks.0", vocab_key="d_vocab", context_key="n_ctx")


# --- frozen tables ---------------------------------------------------------------------------------------------


def scrambled(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Distinct codes in random order: no affine map gives them."""
    table = model.token_embeddings.weight
    rows, width = table.shape
    codes = torch.randperm(2**width, generator=generator)[:rows]
    table.copy_((codes[:, None] >> torch.arange(width)) & 1)


def permuted_bits(model: torch.nn.Module, generator: torch.Generator) -> None:
    table = model.token_embeddings.weight
    table.copy_(table[:, torch.randperm(table.shape[1], generator=generator)])


def half(model: torch.nn.Module, generator: torch.Generator) -> None:
    model.token_embeddings.weight.mul_(0.5)


def signs(model: torch.nn.Module, generator: torch.Generator) -> None:
    model.token_embeddings.weight.mul_(2).sub_(1)


def small(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Inputs so small that the epsilon of the first norm decides the size of what follows."""
    model.token_embeddings.weight.mul_(0.02)


def real_numbers(model: torch.nn.Module, generator: torch.Generator) -> None:
    """A frozen table as narrow as a code that is none."""
    table = model.token_embeddings.weight
    table.copy_(torch.randn(table.shape, generator=generator))


# --- habits ----------------------------------------------------------------------------------------------------


def gelu_matters(up: str, down: str) -> dict[str, tuple[tuple[str, float], ...]]:
    """Hidden units around -2, where the two GELUs differ by a percent, and MLPs that dominate the residual stream."""
    return {"shift": ((rf"{up}.*bias", -2.0),), "scale": ((rf"{up}.*weight", 0.2), (rf"{down}.*weight", 12.0))}


def replace(*pairs: str) -> Edits:
    """replace(old, new, old, new, ...)"""
    return tuple(zip(pairs[::2], pairs[1::2], strict=True))


BOCHKOV_FIELDS = {
    "vocab_size": 256, "n_embd": 64, "d_model": 64, "n_layer": 2, "n_head": 2, "block_size": 64, "pad_id": 5,
    "bos_token": "<s>", "eos_token": "</s>",
}  # fmt: skip
BOCHKOV_16 = {"vocab_size": 65536, "n_embed": 16, "d_model": 64, "n_layer": 1, "n_head": 2, "block_size": 64}
BOCHKOV_GELU = gelu_matters(r"mlp\.0", r"mlp\.2")
TILE = replace("repeat_interleave(self.repeats, dim=-1)", "repeat(1, 1, self.repeats)")
TANH = replace("nn.GELU()", 'nn.GELU(approximate="tanh")')
LEARNED = replace(
    "nn.Embedding(config.vocab_size, config.n_embed)", "nn.Embedding(config.vocab_size, config.d_model)",
    "        self.token_embeddings.weight.requires_grad = False\n", "",
    "self.token_embeddings.weight.copy_(((ids >> torch.arange(config.n_embed)) & 1).float())", "pass",
    ".repeat_interleave(self.repeats, dim=-1)", "",
)  # fmt: skip
TIED = replace(
    "nn.Linear(config.d_model, config.vocab_size)",
    "nn.Linear(config.d_model, config.vocab_size, bias=False)\n"
    "        self.lm_head.weight = self.token_embeddings.weight",
)


def bochkov_eps(eps: str) -> Edits:
    return replace("nn.LayerNorm(d_model)", f"nn.LayerNorm(d_model, {eps})")


ERF_BY_HAND = """class Act(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))


class TransformerBlock("""

STYLES: dict[str, Style] = {}

# The published checkpoints, as far as they are known, and what else their author may have done.
STYLES |= {
    "bochkov": Style(
        BOCHKOV, BOCHKOV_FIELDS, module_name="model_n_embed_8_binary_n_layer_2", tokenizer=True, **BOCHKOV_GELU,
        alternatives=(
            TILE,
            TANH,
            replace("base=10000", "base=20000"),
            replace("torch.cat([freqs, freqs], dim=-1)", "freqs.repeat_interleave(2, dim=-1)",
                    "x1, x2 = x.chunk(2, dim=-1)", "",
                    "torch.cat([-x2, x1], dim=-1)", "torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)"),
        ),
    ),
    "bochkov_tile": Style(BOCHKOV, BOCHKOV_FIELDS, edits=TILE, tokenizer=True),
    "bochkov_65536": Style(BOCHKOV, BOCHKOV_16, edits=TILE, module_name="model_n_embed_16_binary_n_layer_1"),
    "bochkov_65536_scrambled": Style(BOCHKOV, BOCHKOV_16, tables=scrambled),
    "bochkov_tanh": Style(
        BOCHKOV, BOCHKOV_FIELDS, edits=TANH, **BOCHKOV_GELU, alternatives=(replace('"tanh"', '"none"'),)
    ),
    "bochkov_erf_by_hand": Style(
        BOCHKOV, BOCHKOV_FIELDS, edits=replace("nn.GELU()", "Act()", "class TransformerBlock(", ERF_BY_HAND),
        **BOCHKOV_GELU, alternatives=(replace("Act(),", 'nn.GELU("tanh"),'),),
    ),
    # x - mean gives the same norm as x: it is tempting to take it for what enters the block
    "bochkov_layernorm_by_hand": Style(
        BOCHKOV, BOCHKOV_FIELDS,
        edits=replace("nn.LayerNorm", "Norm", "class TransformerBlock(",
                      "class Norm(nn.LayerNorm):\n    def forward(self, x):\n        u = x.mean(-1, keepdim=True)\n"
                      "        s = (x - u).pow(2).mean(-1, keepdim=True)\n"
                      "        return self.weight * ((x - u) / torch.sqrt(s + 1e-12)) + self.bias\n\n\n"
                      "class TransformerBlock("),
    ),
    "bochkov_config_empty": Style(BOCHKOV, {}),
    "bochkov_repository_in_auto_map": Style(
        BOCHKOV, {**BOCHKOV_FIELDS, "auto_map": {"AutoModelForCausalLM": "who/bvv--modeling_bochkov.BVVForCausalLM"}}
    ),
    "bochkov_no_auto_map": Style(BOCHKOV, {**BOCHKOV_FIELDS, "auto_map": {}}),
    # n_embd is the width of the code here; the width of the model is a default of the .py file
    "bochkov_n_embd": Style(BOCHKOV, {"n_embd": 8, "vocab_size": 256}, edits=replace("n_embed", "n_embd")),
    # the code and its complement: a code of twice the width
    "bochkov_complement": Style(
        BOCHKOV, BOCHKOV_FIELDS,
        edits=replace("self.token_embeddings(input_ids).repeat_interleave(self.repeats, dim=-1)",
                      "self.token_embeddings(input_ids)\n        x = torch.cat([x, 1 - x], dim=-1).repeat(1, 1, 4)"),
    ),
    "bochkov_trained_scale": Style(
        BOCHKOV, BOCHKOV_FIELDS,
        edits=replace("self.repeats = config",
                      "self.gain = nn.Parameter(torch.tensor([0.6]))\n        self.repeats = config",
                      "repeat_interleave(self.repeats, dim=-1)", "repeat_interleave(self.repeats, dim=-1) * self.gain"),
    ),
    "bochkov_v_equals_d": Style(BOCHKOV, {**BOCHKOV_FIELDS, "vocab_size": 64}),
    # 7 bits nine times make 63 columns, the 64th is zero: no lift of docs/design.md
    "bochkov_zero_padded": Style(
        BOCHKOV, {**BOCHKOV_FIELDS, "n_embed": 7, "vocab_size": 128}, expect="either",
        edits=replace(".repeat_interleave(self.repeats, dim=-1)", ".repeat(1, 1, 9)\n        x = F.pad(x, (0, 1))"),
    ),
    "bochkov_scrambled": Style(BOCHKOV, BOCHKOV_FIELDS, tables=scrambled, tokenizer=True),
    "bochkov_permuted_bits": Style(BOCHKOV, BOCHKOV_FIELDS, edits=TILE, tables=permuted_bits),
    "bochkov_half": Style(BOCHKOV, BOCHKOV_FIELDS, tables=half),
    "bochkov_signs": Style(BOCHKOV, BOCHKOV_FIELDS, edits=TILE, tables=signs),
    "bochkov_eps": Style(
        BOCHKOV, BOCHKOV_FIELDS, edits=bochkov_eps("1e-6"), tables=small,
        alternatives=(replace("1e-6", "1e-5"), replace("1e-6", "2e-6")),
    ),
    "bochkov_eps_odd": Style(
        BOCHKOV, BOCHKOV_FIELDS, edits=bochkov_eps("3e-4"), tables=half, alternatives=(replace("3e-4", "1e-5"),)
    ),
    "bochkov_learned": Style(
        BOCHKOV, BOCHKOV_FIELDS, edits=LEARNED, tokenizer=True,
        alternatives=(replace("nn.LayerNorm(d_model)", "nn.LayerNorm(d_model, 1e-6)"),),
    ),
    "bochkov_learned_tied": Style(BOCHKOV, BOCHKOV_FIELDS, edits=LEARNED + TIED, drop=r"lm_head\.weight"),
    "bochkov_learned_tied_bin": Style(BOCHKOV, BOCHKOV_FIELDS, edits=LEARNED + TIED, layout="bin"),
    "bochkov_real_numbers": Style(BOCHKOV, BOCHKOV_FIELDS, tables=real_numbers, expect="either"),
    "bochkov_bf16": Style(BOCHKOV, BOCHKOV_FIELDS, dtype=torch.bfloat16),
    "bochkov_fp16_sharded_bin": Style(BOCHKOV, BOCHKOV_FIELDS, dtype=torch.float16, layout="sharded_bin"),
    "bochkov_ddp": Style(BOCHKOV, BOCHKOV_FIELDS, layout="bin", prefix="module."),
    "bochkov_compiled": Style(BOCHKOV, BOCHKOV_FIELDS, layout="sharded", prefix="_orig_mod."),
    # The names lie: the matrix called q makes the values, the one called v the queries.
    "bochkov_qv_swapped": Style(
        BOCHKOV, BOCHKOV_FIELDS,
        edits=replace("q = self.q_proj(x)", "q = self.TEMP(x)", "self.v_proj(x)", "self.q_proj(x)", "TEMP", "v_proj"),
    ),
    "bochkov_qk_swapped": Style(
        BOCHKOV, BOCHKOV_FIELDS,
        edits=replace("q = self.q_proj(x)", "q = self.TEMP(x)", "self.k_proj(x)", "self.q_proj(x)", "TEMP", "k_proj"),
    ),
    "bochkov_norms_swapped": Style(
        BOCHKOV, BOCHKOV_FIELDS,
        edits=replace("self.self_attn(self.input_layernorm(x))", "self.self_attn(self.TEMP(x))",
                      "self.mlp(self.post_attention_layernorm(x))", "self.mlp(self.input_layernorm(x))",
                      "TEMP", "post_attention_layernorm"),
    ),
    "bochkov_dict": Style(
        BOCHKOV, BOCHKOV_FIELDS,
        edits=replace("return CausalLMOutput(loss=loss, logits=logits)", 'return {"loss": loss, "logits": logits}'),
    ),
    "bochkov_loss_first": Style(
        BOCHKOV, BOCHKOV_FIELDS,
        edits=replace("return CausalLMOutput(loss=loss, logits=logits)", "return loss, logits"),
    ),
    # matrices are stored as direction and magnitude
    "bochkov_weight_norm": Style(
        BOCHKOV, BOCHKOV_FIELDS,
        edits=replace("nn.Linear(4 * d_model, d_model)",
                      "nn.utils.parametrizations.weight_norm(nn.Linear(4 * d_model, d_model))"),
    ),
    # annotated-transformer norm: unbiased deviation, epsilon outside of the root
    "bochkov_std_norm": Style(
        BOCHKOV, BOCHKOV_FIELDS, expect="either",
        edits=replace("nn.LayerNorm", "Norm", "class TransformerBlock(",
                      "class Norm(nn.LayerNorm):\n    def forward(self, x):\n        std = x.std(-1, keepdim=True)\n"
                      "        return self.weight * (x - x.mean(-1, keepdim=True)) / (std + 1e-6) + self.bias\n\n\n"
                      "class TransformerBlock("),
    ),
    "bochkov_dropout": Style(
        BOCHKOV, BOCHKOV_FIELDS, edits=replace("x = layer(x)", "x = F.dropout(layer(x), 0.5, self.training)")
    ),
}  # fmt: skip

GPT2_FIELDS = {"n_layer": 2, "vocab_size": 200}
GPT2_GELU = gelu_matters("c_fc", r"mlp\.c_proj")
QKV = "query, key, value = self.c_attn"
SHARED_NORM = replace("self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)", "self.ln_2 = self.ln_1")
STYLES |= {
    "gpt2": Style(
        GPT2, {"vocab_size": 300, "n_embd": 96, "n_head": 3, "n_layer": 2, "code_bits": 9, "n_positions": 80},
        tokenizer=True, **GPT2_GELU,
        alternatives=(
            replace("new_gelu(self.c_fc(x))", "nn.functional.gelu(self.c_fc(x))"),
            replace(QKV, "value, key, query = self.c_attn"),
        ),
    ),
    "gpt2_truncated_tile": Style(GPT2, {**GPT2_FIELDS, "code_bits": 11}),
    "gpt2_sharded": Style(GPT2, {"vocab_size": 200, "n_layer": 3}, layout="sharded"),
    "gpt2_f64_sharded_bin": Style(GPT2, GPT2_FIELDS, layout="sharded_bin", dtype=torch.float64),
    "gpt2_bf16": Style(GPT2, GPT2_FIELDS, dtype=torch.bfloat16),  # rounds masked_bias too, which has no dimension
    "gpt2_kqv": Style(GPT2, GPT2_FIELDS, edits=replace(QKV, "key, query, value = self.c_attn")),
    "gpt2_vkq": Style(GPT2, GPT2_FIELDS, edits=replace(QKV, "value, key, query = self.c_attn")),
    "gpt2_scale_1_over_d": Style(
        GPT2, GPT2_FIELDS, edits=replace("/ math.sqrt(value.size(-1))", "/ value.size(-1)"),
        alternatives=(replace("/ value.size(-1)", "/ math.sqrt(value.size(-1))"),),
    ),
    "gpt2_scale_1": Style(
        GPT2, GPT2_FIELDS, edits=replace(" / math.sqrt(value.size(-1))", ""), scale=((r"c_attn.*weight", 0.4),)
    ),
    "gpt2_scale_declared": Style(
        GPT2, GPT2_FIELDS,
        edits=replace("/ math.sqrt(value.size(-1))", "* self.scale", "self.n_head = config.n_head",
                      "self.n_head = config.n_head\n        self.scale = 0.1337"),
    ),
    "gpt2_scale_hidden": Style(
        GPT2, GPT2_FIELDS, edits=replace("/ math.sqrt(value.size(-1))", "* 0.1337")
    ),
    "gpt2_act2fn": Style(
        GPT2, GPT2_FIELDS, **GPT2_GELU,
        edits=replace("new_gelu(self.c_fc(x))", 'ACT2FN["gelu_new"](self.c_fc(x))', "import PreTrainedModel",
                      "import PreTrainedModel\nfrom transformers.activations import ACT2FN"),
    ),
    "gpt2_shared_norm": Style(GPT2, GPT2_FIELDS, edits=SHARED_NORM, drop="ln_2"),
    "gpt2_shared_norm_bin": Style(GPT2, GPT2_FIELDS, edits=SHARED_NORM, layout="bin"),
    "gpt2_12_layers": Style(GPT2, {"n_layer": 12, "n_embd": 32, "n_head": 2, "vocab_size": 100}),
    "gpt2_square_mlp": Style(GPT2, {**GPT2_FIELDS, "n_inner": 64}),  # shapes do not tell which way a matrix goes
    "gpt2_return_dict_false": Style(GPT2, GPT2_FIELDS, edits=replace("return_dict=True", "return_dict=False")),
}  # fmt: skip

INTERLEAVE = ".repeat_interleave(self.hidden_size // self.k, dim=-1)"
GATE = "nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)"
FUSED_GATE = "nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)"
GATED = "self.act_fn(self.gate_proj(x)) * self.up_proj(x)"


def fused_mlp(name: str, order: str) -> Edits:
    return replace(
        f"self.gate_proj = {GATE}", f"self.{name} = {FUSED_GATE}", f"        self.up_proj = {GATE}\n", "",
        f"return self.down_proj({GATED})",
        f"{order} = self.{name}(x).chunk(2, dim=-1)\n        return self.down_proj(self.act_fn(gate) * up)",
    )  # fmt: skip


def tiled_heads(name: str) -> Edits:
    return replace(
        f"{name} = {name}.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)",
        f"{name} = {name}.repeat(1, self.num_heads // self.num_kv_heads, 1, 1)",
    )


STYLES |= {
    "llama": Style(
        LLAMA, {"vocab_size": 250, "rope_theta": 500000.0},
        alternatives=(
            replace("self.code_matrix.long().T", "self.code_matrix.long()"),
            replace(INTERLEAVE, ".repeat(1, 1, self.hidden_size // self.k)"),
            replace("self.base = base", "self.base = 10000.0"),
        ),
    ),
    "llama_bf16_sharded": Style(LLAMA, {"num_hidden_layers": 3}, layout="sharded", dtype=torch.bfloat16),
    "llama_theta_7777": Style(LLAMA, {"rope_theta": 7777.0}),
    "llama_theta_in_code": Style(LLAMA, {}, edits=replace("self.base = base", "self.base = 7777.0")),
    "llama_gqa": Style(LLAMA, {"num_key_value_heads": 2}),
    "llama_mqa": Style(LLAMA, {"num_key_value_heads": 1, "attention_bias": True}),
    "llama_gqa_in_code": Style(LLAMA, {}, edits=replace("num_key_value_heads=4", "num_key_value_heads=2")),
    # Key head j serves query heads j, j + 2: expressible only by permuting query heads.
    "llama_gqa_tiled": Style(
        LLAMA, {"num_key_value_heads": 2}, edits=tiled_heads("k") + tiled_heads("v")
    ),
    "llama_biases": Style(LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "llama_q_bias_only": Style(
        LLAMA, {},
        edits=replace("self.num_heads * self.head_dim, bias=config.attention_bias",
                      "self.num_heads * self.head_dim, bias=True"),
    ),
    "llama_qkv_bias_only": Style(
        LLAMA, {"attention_bias": True},
        edits=replace("self.head_dim, config.hidden_size, bias=config.attention_bias",
                      "self.head_dim, config.hidden_size, bias=False"),
    ),
    "llama_eps": Style(
        LLAMA, {"rms_norm_eps": 1e-5}, edits=replace(INTERLEAVE, INTERLEAVE + " * 0.02"),
        alternatives=(replace("self.variance_epsilon = eps", "self.variance_epsilon = 1e-6"),),
    ),
    "llama_sqrt_d": Style(
        LLAMA, {}, edits=replace("self.embed_code(input_ids)", "self.embed_code(input_ids) * 64**0.5")
    ),
    "llama_one_plus_weight": Style(
        LLAMA, {},
        edits=replace("torch.ones(hidden_size)", "torch.zeros(hidden_size)", "self.weight *", "(1.0 + self.weight) *"),
    ),
    "llama_gate_up": Style(LLAMA, {}, edits=fused_mlp("gate_up_proj", "gate, up")),
    "llama_w12": Style(LLAMA, {"mlp_bias": True}, edits=fused_mlp("w12", "up, gate")),
    "llama_gate_swapped": Style(
        LLAMA, {}, edits=replace(GATED, "self.act_fn(self.up_proj(x)) * self.gate_proj(x)")
    ),
    "llama_w1_w2_w3": Style(LLAMA, {}, edits=replace("gate_proj", "w1", "down_proj", "w2", "up_proj", "w3")),
    "llama_nn_rmsnorm": Style(
        # eps of nn.RMSNorm is None, which means the machine epsilon of the input
        LLAMA, {},
        edits=replace("BitLlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)", "nn.RMSNorm(config.hidden_size)",
                      INTERLEAVE, INTERLEAVE + " * 0.001"),
        alternatives=(replace("nn.RMSNorm(config.hidden_size)", "nn.RMSNorm(config.hidden_size, 1e-6)"),),
    ),
    "llama_unit_norm": Style(
        LLAMA, {},
        edits=replace("hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)",
                      "hidden_states = F.normalize(hidden_states, dim=-1) * hidden_states.shape[-1] ** 0.5"),
    ),
    "llama_wrapped": Style(
        LLAMA, {}, first_block="model.inner.layers.0",
        edits=replace("self.model = BitLlamaModel(config)",
                      "self.model = nn.ModuleDict({'inner': BitLlamaModel(config)})",
                      "self.model(input_ids", "self.model['inner'](input_ids"),
    ),
    "llama_padded_head": Style(
        LLAMA, {"vocab_size": 250},
        edits=replace("nn.Linear(config.hidden_size, config.vocab_size, bias=False)",
                      "nn.Linear(config.hidden_size, 256, bias=False)",
                      "logits=self.lm_head(hidden_states)", "logits=self.lm_head(hidden_states)[..., :250]"),
    ),
    "llama_residual_multiplier": Style(
        LLAMA, {}, edits=replace("(residual + hidden_states,)", "(residual + 0.5 * hidden_states,)")
    ),
    "llama_logit_scale": Style(
        LLAMA, {}, edits=replace("logits=self.lm_head(hidden_states)", "logits=self.lm_head(hidden_states) / 8"),
    ),
    "llama_identity_shift": Style(
        LLAMA, {}, edits=replace("((lower @ upper) % 2)[perm].to(torch.uint8)", "torch.eye(k, dtype=torch.uint8)")
    ),
    # Two ids share a code: not a code of minimal length, though a table can hold it.
    "llama_singular": Style(
        LLAMA, {}, expect="either",
        edits=replace("[perm].to(torch.uint8)", "[perm].to(torch.uint8).index_fill(0, torch.tensor([3]), 0)"),
    ),
}  # fmt: skip

ROTATE_PART = "torch.cat((self.rotate({0}[..., :n], cos, sin), {0}[..., n:]), dim=-1)"
ROTATE_LAST = "torch.cat(({0}[..., :-n], self.rotate({0}[..., -n:], cos, sin)), dim=-1)"
STYLES |= {
    "neox": Style(
        NEOX, {},
        alternatives=(
            replace("query, key, value = qkv", "key, query, value = qkv"),
            replace("max_seq_len, base):", "max_seq_len, base):\n        base = 10000"),
        ),
    ),
    "neox_full_rope": Style(NEOX, {"rotary_pct": 1.0}),
    "neox_half_rope_f64": Style(NEOX, {"rotary_pct": 0.5, "rotary_emb_base": 500000}, dtype=torch.float64),
    "neox_two_values": Style(NEOX, {"code_low": -0.3, "code_high": 0.7}),
    "neox_values_swapped": Style(NEOX, {"code_low": 1.0, "code_high": 0.0}),
    "neox_wide_code": Style(NEOX, {"bits": 12}),
    "neox_50_ids": Style(NEOX, {"vocab_size": 50}),
    "neox_gray_code": Style(NEOX, {}, edits=replace("(input_ids >> i)", "((input_ids ^ (input_ids >> 1)) >> i)")),
    "neox_multiplied_ids": Style(NEOX, {}, edits=replace("(input_ids >> i)", "((input_ids * 37 % 256) >> i)")),
    "neox_stored_rope_tables": Style(NEOX, {}, edits=replace("[None, None], persistent=False", "[None, None]")),
    "neox_pairs": Style(
        NEOX, {},
        edits=replace("torch.cat((-x[..., half:], x[..., :half]), dim=-1)",
                      "torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)",
                      "torch.cat((freqs, freqs), dim=-1)", "freqs.repeat_interleave(2, dim=-1)"),
    ),
    # outputs of the fused projection: q, k and v of one element side by side
    "neox_qkv_innermost": Style(
        NEOX, {},
        edits=replace("self.num_attention_heads, 3 * self.head_size)", "self.num_attention_heads, self.head_size, 3)",
                      "qkv.permute(0, 2, 1, 3).chunk(3, dim=-1)", "qkv.transpose(1, 2).unbind(-1)"),
    ),
    # outputs of the fused projection: the head runs fastest, in the input of the output projection too
    "neox_head_innermost": Style(
        NEOX, {},
        edits=replace("self.num_attention_heads, 3 * self.head_size)", "3, self.head_size, self.num_attention_heads)",
                      "qkv.permute(0, 2, 1, 3).chunk(3, dim=-1)", "qkv.permute(2, 0, 4, 1, 3)",
                      "out.permute(0, 2, 1, 3)", "out.permute(0, 2, 3, 1)"),
    ),
    "neox_layers_reversed": Style(
        NEOX, {}, first_block="gpt_neox.layers.1",
        edits=replace("for layer in self.layers", "for layer in reversed(self.layers)"),
    ),
    "neox_time_first": Style(
        NEOX, {}, first_block="gpt_neox.first",
        edits=replace("hidden_states = self.embed_in(input_ids)",
                      "hidden_states = self.first(self.embed_in(input_ids)).transpose(0, 1)",
                      "self.final_layer_norm = ", "self.first = nn.Identity()\n        self.final_layer_norm = ",
                      "return self.final_layer_norm(hidden_states)",
                      "return self.final_layer_norm(hidden_states).transpose(0, 1)",
                      "batch, seq, _ = hidden_states.shape",
                      "hidden_states = hidden_states.transpose(0, 1)\n        batch, seq, _ = hidden_states.shape",
                      "reshape(batch, seq, -1))", "reshape(batch, seq, -1)).transpose(0, 1)"),
    ),
    "neox_baddbmm": Style(
        NEOX, {},
        edits=replace("scores = torch.matmul(query, key.transpose(-1, -2)) * self.norm_factor",
                      "scores = torch.baddbmm(query.new_zeros(1, 1, 1), query.flatten(0, 1), key.flatten(0, 1).mT,\n"
                      "                               beta=0.0, alpha=self.norm_factor).unflatten(0, (batch, -1))"),
    ),
    "neox_kvq": Style(NEOX, {}, edits=replace("query, key, value = qkv", "key, value, query = qkv")),
    # The last quarter of a head is rotated: expressible only by permuting the rows of q and k.
    "neox_rope_last": Style(
        NEOX, {}, expect="either",
        edits=replace(ROTATE_PART.format("query"), ROTATE_LAST.format("query"),
                      ROTATE_PART.format("key"), ROTATE_LAST.format("key")),
    ),
    "neox_no_rope": Style(
        NEOX, {}, edits=replace(ROTATE_PART.format("query"), "query", ROTATE_PART.format("key"), "key"),
        expect="either",
    ),
}  # fmt: skip

LETTERS_OUT = replace('"btd,ed->bte"', '"btd,de->bte"', '"bte,de->btd"', '"bte,ed->btd"')
STYLES |= {
    "numbered": Style(
        NUMBERED, {}, tokenizer=True,
        alternatives=(replace("torch.arange(self.k - 1, -1, -1)", "torch.arange(self.k)"),
                      replace("k, q, v = (p(x)", "q, k, v = (p(x)")),
    ),
    "numbered_bin": Style(NUMBERED, {"depth": 3}, layout="bin"),
    "numbered_freqs_cis": Style(
        NUMBERED, {},
        edits=replace("self.heads = heads\n        self.proj", "self.heads = heads\n        d = width // heads\n"
                      "        angle = torch.outer(torch.arange(80), 10000.0 ** (-torch.arange(0, d, 2) / d))\n"
                      '        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angle), angle))\n'
                      "        self.proj",
                      "turn = torch.polar(torch.ones_like(angle), angle)", "turn = self.freqs_cis[:t]"),
    ),
    "numbered_square_mlp": Style(NUMBERED, {}, edits=replace("3 * w", "w")),  # every matrix is square
    "letters": Style(LETTERS, {}),
    "letters_gate_second": Style(
        LETTERS, {}, edits=replace('n, self.u)', "n, self.TEMP)", "n, self.w)", "n, self.u)", "TEMP", "w")
    ),
    "letters_transposed": Style(LETTERS, {}, edits=LETTERS_OUT),
    "letters_all_transposed": Style(
        LETTERS, {},
        edits=LETTERS_OUT + replace(
            '"btd,fd->btf"', '"btd,df->btf"', '"btf,df->btd"', '"btf,fd->btd"',
            "torch.empty(c.F, c.D)", "TEMP", "torch.empty(c.D, c.F)", "torch.empty(c.F, c.D)",
            "TEMP", "torch.empty(c.D, c.F)",
            "torch.empty(config.V, config.D)", "torch.empty(config.D, config.V)", "@ self.y.T", "@ self.y"),
    ),
    "letters_eps": Style(
        LETTERS, {}, edits=replace("-1).to(torch.float32)", "-1).to(torch.float32) * 0.01"),
        alternatives=(replace("1e-6", "1e-5"),),
    ),
    "letters_greek": Style(LETTERS, {}, edits=replace("self.u", "self.φ", "self.w", "self.ψ")),
    "lecture": Style(LECTURE, {}),
    "lecture_bin": Style(LECTURE, {}, layout="bin", prefix="module."),
    "lens": Style(LENS, {}),
    "stacked": Style(STACKED, {}),
}  # fmt: skip

SEEDED_FIELDS = {"vocab_size": 256}
STYLES |= {
    "seeded": Style(
        SEEDED, SEEDED_FIELDS, **gelu_matters("fc1", "fc2"),
        alternatives=(
            replace("c @ self.A", "c @ self.A.T"),
            TANH,
            replace("code.tile((self.d_model // self.k,))", "code.repeat_interleave(self.d_model // self.k, -1)"),
        ),
    ),
    "seeded_left": Style(SEEDED, {"affine_seed": 7}, edits=replace("c @ self.A", "c @ self.A.T")),
    "seeded_stored": Style(
        SEEDED, {"vocab_size": 200, "affine_seed": 8}, edits=replace(").float(), persistent=False", ").float()"),
        tokenizer=True,
    ),
    "seeded_stored_left_bf16": Style(
        SEEDED, {"vocab_size": 256, "affine_seed": 9}, dtype=torch.bfloat16,
        edits=replace(").float(), persistent=False", ").float()", "c @ self.A", "c @ self.A.T"), tokenizer=True,
    ),
    "seeded_stored_mask": Style(SEEDED, SEEDED_FIELDS, edits=replace('"mask", mask, persistent=False', '"mask", mask')),
    "seeded_no_bias": Style(SEEDED, {"bias": False, "vocab_size": 131}),
    "seeded_global_seed": Style(
        SEEDED, SEEDED_FIELDS,
        edits=replace("g = torch.Generator()\n    g.manual_seed(seed)", "torch.manual_seed(seed)",
                      "(k, k), generator=g)", "(k, k))"),
    ),
    "seeded_numpy": Style(
        SEEDED, SEEDED_FIELDS,
        edits=replace("import torch\n", "import numpy as np\nimport torch\n",
                      'c = torch.div(input_ids.unsqueeze(-1), self.powers, rounding_mode="floor").remainder(2).float()',
                      "c = np.unpackbits(input_ids.cpu().numpy().astype(np.uint8)[..., None], axis=-1)\n"
                      "        c = torch.from_numpy(c).float()"),
    ),
    "nano": Style(NANO, {}, alternatives=(replace("manual_seed(1337)", "manual_seed(1338)"),)),
    "nano_bias": Style(NANO, {"bias": True, "vocab_size": 100}, **gelu_matters("c_fc", r"mlp\.c_proj")),
    "nano_stored": Style(NANO, {}, edits=replace("table.float(), persistent=False", "table.float()"), tokenizer=True),
    "nano_last_only": Style(
        NANO, {}, call=lambda model, ids: model(ids, ids)[0],
        edits=replace("logits = self.lm_head(x)", "logits = self.lm_head(x if targets is not None else x[:, [-1]])"),
    ),
    "nano_12_tokens": Style(NANO, {"block_size": 12}),
    "boxed": Style(
        BOXED, {}, **gelu_matters("expand", "shrink"), alternatives=(replace('"tanh"', '"none"'),)
    ),
    # The file holds the rotary frequencies, rounded: what the code computes has no base.
    "boxed_bf16": Style(BOXED, {}, dtype=torch.bfloat16, expect="either", words=(r"freqs",)),
    "boxed_partial": Style(
        BOXED, {"base": 500000.0}, edits=replace("Rotary(cfg.dim // cfg.heads,", "Rotary(cfg.dim // cfg.heads // 2,")
    ),
}  # fmt: skip
