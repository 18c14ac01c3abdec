"""A causal language model without an input embedding table, written to be read next to the paper.

A token id is not looked up. Its K-bit code is computed, lifted to the width of the model, and decoded by a plain
pre-norm transformer:

    c[j]  = (t >> j) & 1                       K bits of the id t, least significant first
    c̃     = A·c xor b                          over GF(2); "fixed" means A = I and b = 0
    x[n]  = v[c̃[n mod K]]                      lift "tile";  "interleave": v[c̃[n // (D / K)]]
    x    += Wo·softmax(q·kᵀ·scale + causal)·v  with q, k, v projected from norm(x), and q, k rotated
    x    += W2·gelu(W1·norm(x))                or W2·(silu(Wg·h) * (W1·h)) with h = norm(x), "swiglu"
    logits = Wout·norm(x)

A. Bochkov, "Language Models Without a Trainable Input Embedding Table: Learning from Fixed Minimal Binary Token
Codes", arXiv 2605.09751 (2026).

Letters in the comments: B sequences, T tokens of this call, S tokens in the cache including this call, D width,
H query heads, G key/value heads, d head size, K code bits, V vocabulary.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_fixmin import FixMinConfig

FOR_ATTENTION = ("attention_instances", "forward_batch")  # what engines hand through to attention of their own
# transformers calls the cache "cache" from 5.24 on and "past_key_values" before, where it passes and where it reads it.
CACHE_FIELD = next(f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))


class TokenCode(nn.Module):
    """Token ids [...] -> vectors x [..., D] (float32), in the place of an embedding table.

    What a kind needs beside the id is a buffer stored with the weights, never something made in the constructor:
    transformers builds models on the meta device, where nothing can be computed.
    """

    def __init__(self, config: FixMinConfig) -> None:
        super().__init__()
        self.config, self.kind, self.width = config, config.code_kind, config.code_width
        self.num_embeddings, self.embedding_dim = config.vocab_size, config.hidden_size  # as of an nn.Embedding
        if self.kind == "affine":
            self.register_buffer("matrix", torch.eye(self.width, dtype=torch.uint8))  # A [K, K]
            self.register_buffer("shift", torch.zeros(self.width, dtype=torch.uint8))  # b [K]
        elif self.kind == "table":
            self.register_buffer("table", torch.zeros(config.vocab_size, self.width, dtype=torch.uint8))  # [V, K]

    def forward(self, ids: Tensor) -> Tensor:
        return lift(self.codes(ids), self.config, torch.float32)

    def codes(self, ids: Tensor) -> Tensor:
        """Ids [...] -> codes [..., K] of 0 and 1 (int64)."""
        if self.kind == "table":
            return self.table[ids].long()
        code = (ids[..., None] >> torch.arange(self.width, device=ids.device)) & 1  # c [..., K]
        if self.kind == "affine":
            # Over GF(2) a product is an AND and a sum is a parity.
            parity = (self.matrix.long() & code[..., None, :]).sum(-1) % 2  # A·c [..., K]
            code = parity ^ self.shift.long()
        return code


def lift(code: Tensor, config: FixMinConfig, dtype: torch.dtype) -> Tensor:
    """Codes [..., K] of 0 and 1 -> vectors x [..., D] of the two values."""
    n = torch.arange(config.hidden_size, device=code.device)
    index = n % config.code_width if config.code_lift == "tile" else n // (config.hidden_size // config.code_width)
    values = torch.tensor(config.code_values, dtype=dtype, device=code.device)
    return values[code[..., index]]


def rope_tables(positions: Tensor, config: FixMinConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, float64 [B, 1, T, rope_dim / 2], of the angles pos * theta^(-2i / rope_dim)."""
    two_i = torch.arange(0, config.rope_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[:, None, :, None].double() * config.rope_theta ** (-two_i / config.rope_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, config: FixMinConfig) -> Tensor:
    """Rotate the first rope_dim elements of each head of x [B, heads, T, d] by the angles of `rope_tables`."""
    turned, rest = x[..., : config.rope_dim], x[..., config.rope_dim :]
    work = torch.promote_types(x.dtype, torch.float32)  # bfloat16 angles would blur positions
    cos, sin = cos.to(work), sin.to(work)
    if config.rope_style == "half":
        a, b = turned.to(work).chunk(2, dim=-1)  # pairs (i, i + rope_dim/2)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        a, b = turned.to(work)[..., 0::2], turned.to(work)[..., 1::2]  # pairs (2i, 2i + 1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ·scaling + mask)·v, as transformers calls it: implementation "eager".

    query [B, H, T, d], key and value [B, G, S, d], mask [B, 1, T, S] -> [B, T, H, d], and the weights [B, H, T, S].
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)  # [B, H, S, d]
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1)
    return (weights @ value).transpose(1, 2), weights


def causal_mask(positions: int, past: int, padding: Tensor | None, like: Tensor) -> Tensor:
    """0 where a query may look and the most negative number elsewhere: [B or 1, 1, T, S] in the type of `like`.

    Query i of this call is token past + i. It sees the tokens 0..past + i, but for those that `padding` ([B, S], 0 for
    a padding token) hides.
    """
    seen = torch.ones(positions, past + positions, dtype=torch.bool, device=like.device).tril(past)[None, None]
    if padding is not None:
        seen = seen & padding[:, None, None, :].bool()
    # A finite number instead of -inf: a padding token that sees nothing must not turn its row into NaN.
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)


def make_norm(config: FixMinConfig) -> nn.Module:
    if config.norm_type == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class FixMinBlock(nn.Module):
    """One pre-norm transformer block, [B, T, D] -> [B, T, D].

    Its attention is what `config._attn_implementation` names among transformers' ALL_ATTENTION_FUNCTIONS. Engines that
    have one of their own (vLLM, SGLang) put it there, and read layer_idx, scaling and is_causal.
    """

    is_causal = True

    def __init__(self, config: FixMinConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.scaling = config, layer, config.scale
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, hidden = config.hidden_size, config.intermediate_size
        kv_width = config.num_key_value_heads * config.head_dim
        self.attn_norm = make_norm(config)
        self.attn_q = nn.Linear(width, width, bias=config.qkv_bias)
        self.attn_k = nn.Linear(width, kv_width, bias=config.qkv_bias)
        self.attn_v = nn.Linear(width, kv_width, bias=config.qkv_bias)
        self.attn_output = nn.Linear(width, width, bias=config.attn_out_bias)
        self.ffn_norm = make_norm(config)
        if config.activation == "swiglu":
            self.ffn_gate = nn.Linear(width, hidden, bias=config.mlp_bias)
        self.ffn_up = nn.Linear(width, hidden, bias=config.mlp_bias)
        self.ffn_down = nn.Linear(hidden, width, bias=config.mlp_bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None, **others: Any
    ) -> Tensor:
        q, k, v = self.project(self.attn_norm(x), cos, sin, cache)
        implementation = self.config._attn_implementation or "eager"
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        y = attention(self, q, k, v, mask, scaling=self.scaling, **others)[0]  # [B, T, H, d]
        x = x + self.attn_output(y.reshape(*x.shape[:2], -1))
        return x + self.feed_forward(self.ffn_norm(x))

    def project(self, h: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, D] -> q [B, H, T, d], and k and v [B, G, S, d] with those of the cache before them."""
        heads = (*h.shape[:2], -1, self.config.head_dim)
        q = self.attn_q(h).view(heads).transpose(1, 2)  # [B, H, T, d]
        k = self.attn_k(h).view(heads).transpose(1, 2)  # [B, G, T, d]
        v = self.attn_v(h).view(heads).transpose(1, 2)  # [B, G, T, d]
        q, k = rotate(q, cos, sin, self.config), rotate(k, cos, sin, self.config)
        if cache is not None:
            past = int(cache.get_seq_length(self.layer_idx))
            length = past + h.shape[1]  # S
            # The static cache of transformers 5.0 is told the places; later releases count, and ignore this.
            k, v = cache.update(k, v, self.layer_idx, {"cache_position": torch.arange(past, length, device=h.device)})
            k, v = k[:, :, :length], v[:, :, :length]  # [B, G, S, d]: a static cache returns its empty places too
        return q, k, v

    def feed_forward(self, h: Tensor) -> Tensor:
        if self.config.activation == "swiglu":
            return self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))
        approximate = "tanh" if self.config.activation == "gelu_tanh" else "none"
        return self.ffn_down(F.gelu(self.ffn_up(h), approximate=approximate))


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache under whichever of its two names it came."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    name, given = ("cache", cache) if cache is not None else ("past_key_values", past_key_values)
    if given is not None and not isinstance(given, Cache):
        raise TypeError(f"{name} must be a Cache of transformers such as DynamicCache, got {type(given).__name__}")
    return given


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """An argument that is ignored would give other results than were asked for."""
    of_generate = ("tokenizer", "assistant_tokenizer")  # which leaves them in what it passes on
    for name, value in arguments.items():
        if name not in of_generate and value is not None and value is not False:
            raise TypeError(f"forward() does not take {name}")


def check_places(places: Tensor, past: int, length: int) -> None:
    """Places [T] that transformers counted must be those behind the cache: they are not read elsewhere."""
    if places.tolist() != list(range(past, past + length)):
        raise ValueError(f"cache_position must be {past} to {past + length - 1}, got {places.tolist()}")


def next_token_loss(logits: Tensor, labels: Tensor, n_items: Tensor | int | None) -> Tensor:
    """Mean over the labels [B, T] but for -100, or their sum divided by n_items; logits [B, T, V]."""
    reduction = "mean" if n_items is None else "sum"
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction=reduction)
    return loss if n_items is None else loss / n_items


class FixMinPreTrainedModel(PreTrainedModel):
    """What transformers, and engines that run models of transformers, are told of the two classes below."""

    config_class = FixMinConfig
    base_model_prefix = "model"
    _no_split_modules = ("FixMinBlock",)
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class FixMinModel(FixMinPreTrainedModel):
    """Everything below `lm_head`: codes, blocks and the last norm."""

    def __init__(self, config: FixMinConfig) -> None:
        super().__init__(config)
        if config.code_kind == "learned":
            self.token_embd = nn.Embedding(config.vocab_size, config.hidden_size)
        else:
            self.code = TokenCode(config)
        self.layers = nn.ModuleList([FixMinBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.output_norm = make_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What makes vectors [B, T, D] of ids [B, T]: a table for kind "learned", else a computation."""
        return self.token_embd if self.config.code_kind == "learned" else self.code

    def set_input_embeddings(self, value: nn.Module) -> None:
        """For kind "learned". Codes stay: SGLang puts a table of its own in the place of every embedding, and would
        have nothing to load into it. ValueError: one of another size."""
        if self.config.code_kind == "learned":
            self.token_embd = value
        elif getattr(value, "num_embeddings", None) != self.config.vocab_size:
            raise ValueError("codes are computed: there is no input embedding to replace or to resize")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """The normed output [B, T, D].

        Args, Raises: as in FixMinForCausalLM.forward; inputs_embeds [B, T, D] in the place of input_ids.

        Returns:
            last_hidden_state [B, T, D], the cache (under the name that this release of transformers has for it) and,
            if asked for, hidden_states: the input of every block and the normed output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.to(self.output_norm.weight.dtype)
        cache = one_cache(cache, past_key_values)
        # No argument of its own: transformers warns of models that have one.
        if (places := others.pop("cache_position", None)) is not None:
            check_places(places, 0 if cache is None else int(cache.get_seq_length()), x.shape[1])
        for_attention = {name: others.pop(name) for name in FOR_ATTENTION if name in others}
        refuse_unknown(others)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        past, length = 0 if cache is None else int(cache.get_seq_length()), x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)[None]  # [1, T]
        mask = self.mask(attention_mask, past, x)
        cos, sin = rope_tables(position_ids, self.config)
        inputs = []
        for block in self.layers:
            inputs.append(x)
            x = block(x, cos, sin, mask, cache, **for_attention)
        x = self.output_norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*inputs, x) if output_hidden_states else None,
            **{CACHE_FIELD: cache if use_cache else None},
        )
        return output if return_dict is not False else output.to_tuple()

    def mask(self, padding: Tensor | None, past: int, x: Tensor) -> Tensor | None:
        """What the implementation of attention takes: padding [B, S] and x [B, T, D] -> a mask, or None."""
        length = x.shape[1]
        if padding is not None and padding.shape != (len(x), past + length):
            raise ValueError(
                f"attention_mask must have the shape {[len(x), past + length]} (rows, tokens of cache and call), "
                f"got {list(padding.shape)}"
            )
        plain = padding is None or bool(padding.all())
        implementation = self.config._attn_implementation or "eager"
        if implementation not in ("eager", "sdpa"):  # those know that a model of this kind looks back only
            return None if plain else padding
        if implementation == "sdpa" and plain and (past == 0 or length == 1):
            return None  # PyTorch's fused kernel, the fair opponent of a benchmark
        return causal_mask(length, past, None if plain else padding, x)


class FixMinForCausalLM(FixMinPreTrainedModel, GenerationMixin):
    """The model with its output projection, as Hugging Face expects it."""

    def __init__(self, config: FixMinConfig) -> None:
        super().__init__(config)
        self.model = FixMinModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """That of the model below."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
        """The mask [B, S] as it is, where transformers would make one of the length of a static cache from it."""
        return attention_mask

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the next token at every position.

        Args:
            input_ids: [B, T] integers below V.
            attention_mask: [B, S], 0 where a token is padding; S counts the cached tokens too.
            position_ids: [B, T] (None: counted from the start of the cache).
            past_key_values, cache: keys and values of the tokens before; extended in place. Two names for one thing,
                as releases of transformers differ.
            use_cache: whether to return a cache (None: as the configuration says; never while training).
            labels: [B, T], the ids themselves (they are shifted here); -100 is left out of the loss.
            output_hidden_states: also return the input of every block and, last, the normed output: (layers + 1)
                times [B, T, D].
            return_dict: False for a plain tuple.
            logits_to_keep: compute logits for this many last positions only (0: all), or for these, [n].
            num_items_in_batch: the loss is the sum over the labels divided by this number, instead of the mean.
            others: what transformers passes to every model; None and False ask for nothing. Old releases pass
                cache_position [T], the places of the tokens behind the cache.

        Returns:
            loss (mean, nats per token; None without labels), logits [B, T, V], the cache (under the name that this
            release of transformers has for it) and the hidden states.

        Raises:
            TypeError: an unknown argument, or a cache that is no `Cache` of transformers.
            ValueError: both names of the cache; a mask or places that do not fit the tokens; labels together with
                logits_to_keep.
        """
        if others.get("inputs_embeds") is not None:
            raise TypeError("forward() does not take inputs_embeds")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels need the logits of all positions: leave out logits_to_keep")
        cache = one_cache(cache, past_key_values)
        below = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **others,
        )
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        logits = self.lm_head(below.last_hidden_state[:, kept])
        loss = None if labels is None else next_token_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=below.hidden_states,
            **{CACHE_FIELD: below.get(CACHE_FIELD)},
        )
        return output if return_dict is not False else output.to_tuple()


FixMinModel.register_for_auto_class("AutoModel")
FixMinForCausalLM.register_for_auto_class("AutoModelForCausalLM")
