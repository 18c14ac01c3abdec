"""Configuration of the GPT-2-like author."""

from transformers import PretrainedConfig


class BinGPTConfig(PretrainedConfig):
    model_type = "bin-gpt"

    def __init__(
        self,
        vocab_size=200,
        n_positions=64,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_inner=None,
        code_bits=8,
        rope_base=10000.0,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
        layer_norm_epsilon=1e-5,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.n_positions = n_positions
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.n_inner = n_inner
        self.code_bits = code_bits
        self.rope_base = rope_base
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.layer_norm_epsilon = layer_norm_epsilon
        super().__init__(**kwargs)
