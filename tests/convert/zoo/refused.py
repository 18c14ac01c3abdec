"""Checkpoints whose function GGUF cannot express: each must be refused, and the message must say where it differs."""

from __future__ import annotations

import dataclasses

from .build import Style
from .styles import BOCHKOV, BOCHKOV_FIELDS, GPT2, GPT2_FIELDS, LLAMA, NEOX, SEEDED, replace

BLOCK_0 = (r"(?i)(block|layer) 0|first block|blk\.0",)
BLOCK_1 = (r"(?i)(block|layer) 1|blk\.1",)
INPUT = (r"(?i)input|embed|code|position",)
HEAD = (r"(?i)head|logits|output",)
SDPA = "F.scaled_dot_product_attention(q, k, v, is_causal=q_len > 1)"


def llama_scores(change: str) -> tuple[tuple[str, str], ...]:
    """Spells out the attention and changes its scores `s`, [b, h, t, t], before the softmax."""
    return replace(
        f"out = {SDPA}",
        "s = q @ k.transpose(-1, -2) / self.head_dim**0.5\n"
        "        i = torch.arange(q_len)\n"
        f"        {change}\n"
        "        s = s.masked_fill(i[None, :] > i[:, None], float('-inf'))\n"
        "        out = s.softmax(-1) @ v",
    )


_STYLES: dict[str, Style] = {
    "learned_positions": Style(
        GPT2, GPT2_FIELDS,
        edits=replace("self.drop = nn.Dropout(config.embd_pdrop)",
                      "self.wpe = nn.Embedding(config.n_positions, config.n_embd)\n"
                      "        self.drop = nn.Dropout(config.embd_pdrop)",
                      "for block in self.h:",
                      "x = x + self.wpe(torch.arange(x.shape[1]))\n        for block in self.h:"),
        scale=(("wpe", 20.0),), words=INPUT,
    ),
    "alibi": Style(
        LLAMA, {}, words=BLOCK_0,
        edits=llama_scores("s = s - (i[:, None] - i[None, :]) * 2.0 ** -torch.arange(1, 5)[:, None, None]"),
    ),
    "alibi_without_rope": Style(
        LLAMA, {}, words=BLOCK_0,
        edits=llama_scores("s = s - (i[:, None] - i[None, :]) * 2.0 ** -torch.arange(1, 5)[:, None, None]")
        + replace("q, k = apply_rotary(q, k, *position_embeddings)", ""),
    ),
    "attention_softcap": Style(LLAMA, {}, edits=llama_scores("s = 5 * torch.tanh(s / 5)"), words=BLOCK_0),
    "sliding_window": Style(
        LLAMA, {}, words=BLOCK_0,
        edits=llama_scores("s = s.masked_fill(i[None, :] <= i[:, None] - 6, float('-inf'))"),
    ),
    "sliding_window_24_odd_layers": Style(
        LLAMA, {}, words=BLOCK_1,
        edits=llama_scores("far = (i[None, :] <= i[:, None] - 24) & (self.layer_idx == 1)\n"
                           "        s = s.masked_fill(far, float('-inf'))"),
    ),
    "sliding_window_200": Style(
        # prompts of up to 200 tokens do not notice
        LLAMA, {"max_position_embeddings": 256}, words=BLOCK_0, notice_at=256,
        edits=llama_scores("s = s.masked_fill(i[None, :] <= i[:, None] - 200, float('-inf'))"),
    ),
    "attention_sink": Style(
        LLAMA, {}, words=BLOCK_0,
        edits=replace(f"out = {SDPA}", f"out = {SDPA} * 0.9 + v[:, :, :1] * 0.1"),
    ),
    "logit_softcap": Style(
        LLAMA, {}, words=HEAD,
        edits=replace("logits=self.lm_head(hidden_states)", "logits=5 * torch.tanh(self.lm_head(hidden_states) / 5)"),
    ),
    "log_softmax": Style(
        LLAMA, {}, words=HEAD,
        edits=replace("logits=self.lm_head(hidden_states)", "logits=self.lm_head(hidden_states).log_softmax(-1)"),
    ),
    "two_heads": Style(
        LLAMA, {}, words=HEAD, expect="either",
        edits=replace("self.lm_head = nn", "self.lm_head_2 = nn.Linear(config.hidden_size, 50, bias=False)\n"
                      "        self.lm_head = nn",
                      "logits=self.lm_head(hidden_states)",
                      "logits=torch.cat((self.lm_head(hidden_states)[..., :200], self.lm_head_2(hidden_states)), -1)"),
    ),
    "three_values": Style(
        NEOX, {}, words=INPUT, edits=replace("+ (config.code_high - config.code_low) * bits",
                                             "+ (bits + torch.roll(bits, 1, -1))"),
    ),
    "rope_frequencies_piecewise": Style(
        LLAMA, {}, words=BLOCK_0,
        edits=replace("freqs = position_ids", "inv_freq = torch.where(inv_freq < 0.01, inv_freq / 8, inv_freq)\n"
                      "        freqs = position_ids"),
    ),
    "rope_on_values": Style(
        LLAMA, {}, words=BLOCK_0,
        edits=replace("q, k = apply_rotary(q, k, *position_embeddings)",
                      "q, k = apply_rotary(q, k, *position_embeddings)\n"
                      "        v, _ = apply_rotary(v, v, *position_embeddings)"),
    ),
    "rope_in_layer_0_only": Style(
        LLAMA, {}, words=BLOCK_1,
        edits=replace("q, k = apply_rotary(q, k, *position_embeddings)",
                      "if self.layer_idx == 0:\n            q, k = apply_rotary(q, k, *position_embeddings)"),
    ),
    "mixed_norms": Style(
        LLAMA, {}, words=(r"(?i)final|output|norm",),
        edits=replace("self.norm = BitLlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)",
                      "self.norm = nn.LayerNorm(config.hidden_size)"),
    ),
    "qk_norm": Style(
        LLAMA, {}, words=BLOCK_0,
        edits=replace("q, k = apply_rotary",
                      "q, k = F.rms_norm(q, (16,)), F.rms_norm(k, (16,))\n        q, k = apply_rotary"),
    ),
    "qk_norm_trained": Style(
        LLAMA, {}, words=(r"(?i)q_norm|k_norm|block 0|layer 0",),
        edits=replace("self.o_proj = nn", "self.q_norm = BitLlamaRMSNorm(16)\n"
                      "        self.k_norm = BitLlamaRMSNorm(16)\n        self.o_proj = nn",
                      "q, k = apply_rotary", "q, k = self.q_norm(q), self.k_norm(k)\n        q, k = apply_rotary"),
    ),
    "geglu": Style(LLAMA, {"hidden_act": "gelu"}, words=BLOCK_0),
    "reglu_layer_1": Style(
        LLAMA, {}, words=BLOCK_1,
        edits=replace("BitLlamaMLP(config)\n", "BitLlamaMLP(config)\n"
                      "        if layer_idx == 1:\n            self.mlp.act_fn = nn.ReLU()\n"),
    ),
    "rope_scaled": Style(
        LLAMA, {}, words=BLOCK_0,
        edits=replace("position_ids[:, :, None].float()", "position_ids[:, :, None].float() / 4"),
    ),
    "head_size_not_d_over_h": Style(
        LLAMA, {}, words=(r"(?i)head",),
        edits=replace("self.head_dim = config.hidden_size // self.num_heads", "self.head_dim = 32",
                      "config.hidden_size // config.num_attention_heads, config.rope_theta", "32, config.rope_theta"),
    ),
    "sandwich_norm": Style(
        LLAMA, {}, words=(r"(?i)post_ffn|block 0|layer 0",),
        edits=replace("self.mlp = BitLlamaMLP(config)", "self.mlp = BitLlamaMLP(config)\n"
                      "        self.post_ffn_norm = BitLlamaRMSNorm(config.hidden_size)",
                      "return (residual + hidden_states,)", "return (residual + self.post_ffn_norm(hidden_states),)"),
    ),
    "quick_gelu": Style(
        GPT2, GPT2_FIELDS, words=BLOCK_0,
        edits=replace("new_gelu(self.c_fc(x))", "(lambda h: h * torch.sigmoid(1.702 * h))(self.c_fc(x))"),
    ),
    "relu": Style(NEOX, {}, words=BLOCK_0, edits=replace("nn.functional.gelu(", "nn.functional.relu(")),
    "silu_without_gate": Style(NEOX, {}, words=BLOCK_0, edits=replace("nn.functional.gelu(", "nn.functional.silu(")),
    "squared_relu": Style(
        NEOX, {}, words=BLOCK_0, edits=replace("nn.functional.gelu(self.dense_h_to_4h(hidden_states))",
                                              "nn.functional.relu(self.dense_h_to_4h(hidden_states)).square()")),
    "parallel_residual": Style(
        NEOX, {}, words=BLOCK_0,
        edits=replace("self.post_attention_layernorm(attention_output)",
                      "self.post_attention_layernorm(hidden_states)"),
    ),
    "post_norm": Style(
        NEOX, {}, words=BLOCK_0,
        edits=replace("attention_output = self.attention(self.input_layernorm(hidden_states)) + hidden_states",
                      "attention_output = self.input_layernorm(self.attention(hidden_states) + hidden_states)",
                      "return self.mlp(self.post_attention_layernorm(attention_output)) + attention_output",
                      "return self.post_attention_layernorm(self.mlp(attention_output) + attention_output)"),
    ),
    "no_final_norm": Style(
        NEOX, {}, words=(r"(?i)final|output|norm|logits|head",),
        edits=replace("return self.final_layer_norm(hidden_states)", "return hidden_states"),
    ),
    "bidirectional": Style(
        NEOX, {}, words=BLOCK_0,
        edits=replace("scores = scores.masked_fill(causal, torch.finfo(scores.dtype).min)", ""),
    ),
    "noise": Style(
        NEOX, {}, words=(r"(?i)random|determinis|repeat|differ",),
        edits=replace("hidden_states = layer(hidden_states)",
                      "hidden_states = layer(hidden_states) + 0.01 * torch.randn_like(hidden_states)"),
    ),
    "previous_token_in_input": Style(
        NEOX, {}, words=INPUT,
        edits=replace("hidden_states = self.embed_in(input_ids)",
                      "hidden_states = self.embed_in(input_ids)\n"
                      "        hidden_states[:, 1:] += 0.1 * self.embed_in(input_ids)[:, :-1]"),
    ),
    "sinusoidal_positions": Style(
        SEEDED, {}, words=INPUT,
        edits=replace("x = self.embed(input_ids)\n",
                      "x = self.embed(input_ids)\n"
                      "        x = x + (torch.arange(x.size(1))[:, None] / torch.arange(1, 65)).sin()\n"),
    ),
    "layers_shared": Style(
        # the second half of the layers is the first half once more: representable, but only by writing tensors twice
        SEEDED, {}, expect="either",
        edits=replace("for block in self.blocks:", "for block in [*self.blocks, *self.blocks]:"),
    ),
    "code_projection": Style(
        BOCHKOV, BOCHKOV_FIELDS, expect="either", words=INPUT,
        edits=replace("self.repeats = config.d_model", "self.proj = nn.Linear(config.n_embed, config.d_model)\n"
                      "        self.repeats = config.d_model",
                      "self.token_embeddings(input_ids).repeat_interleave(self.repeats, dim=-1)",
                      "self.proj(self.token_embeddings(input_ids))"),
    ),
    "embedding_norm": Style(
        BOCHKOV, BOCHKOV_FIELDS, expect="either", words=INPUT,
        edits=replace("self.repeats = config.d_model", "self.norm_in = nn.LayerNorm(config.d_model)\n"
                      "        self.repeats = config.d_model",
                      "for layer in self", "x = self.norm_in(x)\n        for layer in self"),
    ),
    "layer_scale": Style(
        BOCHKOV, BOCHKOV_FIELDS, expect="either", words=(r"(?i)gamma|block 0|layer 0",),
        edits=replace("self.mlp = nn.Sequential(",
                      "self.gamma = nn.Parameter(torch.ones(d_model))\n        self.mlp = nn.Sequential(",
                      "x + self.mlp(", "x + self.gamma * self.mlp("),
    ),
    "unused_tensor": Style(
        # a tensor that no role takes; the checkpoint's own code ignores it too
        BOCHKOV, BOCHKOV_FIELDS, expect="either", words=(r"value_head",),
        edits=replace("self.lm_head = nn", "self.value_head = nn.Linear(config.d_model, 1)\n        self.lm_head = nn"),
    ),
    "dropout_always_on": Style(
        BOCHKOV, BOCHKOV_FIELDS, words=(r"(?i)random|determinis|repeat|differ",),
        edits=replace("x = layer(x)", "x = F.dropout(layer(x), 0.1, True)"),
    ),
}  # fmt: skip

REFUSED = {n: s if s.expect == "either" else dataclasses.replace(s, expect="refuse") for n, s in _STYLES.items()}
