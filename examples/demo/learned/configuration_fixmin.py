"""Configuration of a decoder whose token ids are computed into codes instead of looked up in a table."""

import math
from typing import Any

from transformers import PretrainedConfig

NORM_TYPES = ("layernorm", "rmsnorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")
ROPE_STYLES = ("half", "interleaved")
CODE_KINDS = ("fixed", "affine", "table", "learned")
CODE_LIFTS = ("tile", "interleave")


class FixMinConfig(PretrainedConfig):
    """Shapes and conventions of one FixMin model. The defaults are those of the published models.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: H; the head size is d = D / H.
        num_key_value_heads: number of key/value heads, a divisor of H (None: H). Query head h reads key/value head
            h // (H / num_key_value_heads).
        intermediate_size: width of the feed-forward layer (None: 4 D).
        max_position_embeddings: context length in tokens that the model was trained for. Not enforced here.
        norm_type: "layernorm" or "rmsnorm": before attention, before the feed-forward layer and before `lm_head`.
        norm_eps: added to the variance (layernorm) or to the mean square (rmsnorm).
        norm_bias: whether the layernorms have a bias; rmsnorm has none.
        activation: "gelu" (erf), "gelu_tanh" or "swiglu" (which adds the matrix `ffn_gate`).
        rope_style: "half" rotates the pairs (i, i + rope_dim/2), "interleaved" the pairs (2i, 2i + 1).
        rope_dim: number of leading elements of each head that are rotated, even (None: the head size).
        rope_theta: base of the rotary angles, pos * theta^(-2i / rope_dim).
        attn_scale: factor on q·k (None: 1 / sqrt(head size)).
        qkv_bias, attn_out_bias, mlp_bias, lm_head_bias: which projections have a bias.
        code_kind: "fixed" (the bits of the id), "affine" (A·bits xor b), "table" (stored K-bit rows) or "learned"
            (an ordinary trained embedding table of width D: the baseline).
        code_width: K, bits in a code (None: ceil(log2 V)).
        code_lift: how K bits become D numbers. "tile": x[n] is bit n mod K; "interleave": bit n // (D / K).
        code_values: the numbers (v0, v1) that stand for a 0 bit and a 1 bit.
        initializer_range: standard deviation of newly made weights.
        use_cache: whether `forward` returns a key/value cache when it is not told.
        bos_token_id, eos_token_id, pad_token_id: ids of the tokenizer's special tokens.

    Raises:
        ValueError: for an unknown name or shapes that do not fit together.
    """

    model_type = "fixmin"
    # How engines split the model: over tensors (the input or the output of a projection) and over layers.
    base_model_tp_plan = {  # noqa: RUF012
        **{f"layers.*.{name}": "colwise" for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")},
        **{f"layers.*.{name}": "rowwise" for name in ("attn_output", "ffn_down")},
    }
    base_model_pp_plan = {  # noqa: RUF012
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "output_norm": (["hidden_states"], ["hidden_states"]),
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - the base class declares it as a plain attribute

    def __init__(
        self,
        vocab_size: int = 65536,
        hidden_size: int = 1024,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 1024,
        norm_type: str = "layernorm",
        norm_eps: float = 1e-5,
        norm_bias: bool = True,
        activation: str = "gelu",
        rope_style: str = "half",
        rope_dim: int | None = None,
        rope_theta: float = 10000.0,
        attn_scale: float | None = None,
        qkv_bias: bool = False,
        attn_out_bias: bool = False,
        mlp_bias: bool = True,
        lm_head_bias: bool = True,
        code_kind: str = "fixed",
        code_width: int | None = None,
        code_lift: str = "tile",
        code_values: tuple[float, float] | list[float] = (0.0, 1.0),
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.norm_type = norm_type
        self.norm_eps = norm_eps
        self.norm_bias = norm_bias
        self.activation = activation
        self.rope_style = rope_style
        self.rope_dim = hidden_size // num_attention_heads if rope_dim is None else rope_dim
        self.rope_theta = rope_theta
        self.attn_scale = attn_scale
        self.qkv_bias = qkv_bias
        self.attn_out_bias = attn_out_bias
        self.mlp_bias = mlp_bias
        self.lm_head_bias = lm_head_bias
        self.code_kind = code_kind
        self.code_width = max(1, math.ceil(math.log2(vocab_size))) if code_width is None else code_width
        self.code_lift = code_lift
        self.code_values = [float(value) for value in code_values]
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._check()
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: there is no input embedding that lm_head could share")

    @property
    def head_dim(self) -> int:
        """d, the number of elements of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def scale(self) -> float:
        """The factor on q·k."""
        return 1.0 / math.sqrt(self.head_dim) if self.attn_scale is None else self.attn_scale

    def _check(self) -> None:
        for name, allowed in (
            ("norm_type", NORM_TYPES),
            ("activation", ACTIVATIONS),
            ("rope_style", ROPE_STYLES),
            ("code_kind", CODE_KINDS),
            ("code_lift", CODE_LIFTS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rope_dim % 2 or not 0 <= self.rope_dim <= self.head_dim:
            raise ValueError(f"rope_dim {self.rope_dim} is not an even number from 0 to the head size {self.head_dim}")
        if len(self.code_values) != 2:
            raise ValueError(f"code_values {self.code_values} are not two numbers")
        if self.code_kind in ("fixed", "affine") and self.vocab_size > 2**self.code_width:
            raise ValueError(f"vocab_size {self.vocab_size} does not fit into codes of {self.code_width} bits")
        if self.code_kind != "learned" and self.code_lift == "interleave" and self.hidden_size % self.code_width:
            raise ValueError(
                f"code_lift 'interleave' needs hidden_size {self.hidden_size} to be a multiple of "
                f"code_width {self.code_width}"
            )


FixMinConfig.register_for_auto_class()
