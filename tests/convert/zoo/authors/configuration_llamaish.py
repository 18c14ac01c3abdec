"""Configuration of the LLaMA-like author."""

from transformers import PretrainedConfig


class BitLlamaConfig(PretrainedConfig):
    model_type = "bit_llama"

    def __init__(
        self,
        vocab_size=250,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        hidden_act="silu",
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        attention_bias=False,
        mlp_bias=False,
        code_width=8,
        code_seed=1234,
        rope_theta=500000.0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.code_width = code_width
        self.code_seed = code_seed
        self.rope_theta = rope_theta
        super().__init__(**kwargs)
