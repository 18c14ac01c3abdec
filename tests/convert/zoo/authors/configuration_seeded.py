"""Configuration of the author who draws the code from a seed."""

from transformers import PretrainedConfig


class AffineCodeConfig(PretrainedConfig):
    model_type = "affine_code"

    def __init__(
        self,
        vocab_size=256,
        n_bits=8,
        d_model=64,
        n_heads=2,
        n_layers=2,
        d_ff=128,
        max_len=64,
        bias=True,
        dropout=0.1,
        rope_base=10000.0,
        eps=1e-5,
        affine_seed=42,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.n_bits = n_bits
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.d_ff = d_ff
        self.max_len = max_len
        self.bias = bias
        self.dropout = dropout
        self.rope_base = rope_base
        self.eps = eps
        self.affine_seed = affine_seed
