"""Which of llama.cpp's architectures computes what a model computes, as tables of what each of them can.

From llama.cpp's src/models/*.cpp: the tensors that load_arch_tensors asks for, and the operations of the graph. What is
missing in a table is ignored there without a word, so a model that has more than the table says must not be exported.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..convert.spec import ModelSpec
from ..errors import UnsupportedError

QKV = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's. The order of computation is that of docs/design.md in all of them."""

    name: str
    norm: str
    activations: tuple[str, ...]  # those that it computes, or nearly: its GELU is the one with tanh
    rope: str  # which elements of a head are rotated together: "half" or "interleaved"
    rotates_parts: bool  # rope.dimension_count may be less than a head
    fuses_qkv: bool  # one matrix attn_qkv
    required: frozenset[str] = frozenset()  # projections of a block whose bias must be there
    optional: frozenset[str] = frozenset()  # and whose bias may be there
    output_bias: bool = False

    def obstacles(self, spec: ModelSpec) -> Iterator[str]:
        """What of this model the architecture cannot compute; nothing if it can all be done."""
        if spec.norm != self.norm:
            yield f"{spec.norm} (it has {self.norm})"
        if spec.activation not in self.activations:
            yield f"{spec.activation} (it has {' or '.join(self.activations)})"
        head = spec.embedding_length // spec.head_count
        if spec.rope_dim != head and not self.rotates_parts:
            yield f"a rotation of {spec.rope_dim} of the {head} elements of a head"
        biases = {name.removesuffix(".bias") for name in spec.tensors if name.endswith(".bias")}
        parts = {name.rpartition(".")[2] for name in biases} - {"attn_norm", "ffn_norm", "output_norm"}
        if self.norm == "rmsnorm" and any(name.endswith("norm") for name in biases):
            yield "a bias of a norm"
        missing = sorted(parts - self.required - self.optional - {"output"})
        if missing:
            yield f"biases of {', '.join(missing)}"
        if "output" in parts and not self.output_bias and self.norm != "layernorm":
            yield "a bias of the output projection"  # behind a LayerNorm it is folded


_GPT = frozenset({"attn_output", "ffn_up", "ffn_down"})

#: In order of preference.
ARCHITECTURES = (
    Architecture(
        "gptneox",
        norm="layernorm",
        activations=("gelu", "gelu_tanh"),
        rope="half",
        rotates_parts=True,
        fuses_qkv=True,
        required=_GPT | {*QKV},
    ),
    # The same with q, k and v apart, so that each keeps its type; for older programs less usual.
    Architecture(
        "starcoder2",
        norm="layernorm",
        activations=("gelu", "gelu_tanh"),
        rope="half",
        rotates_parts=False,
        fuses_qkv=False,
        required=_GPT,
        optional=frozenset(QKV),
    ),
    Architecture(
        "stablelm",
        norm="layernorm",
        activations=("swiglu",),
        rope="half",
        rotates_parts=True,
        fuses_qkv=False,
        optional=frozenset(QKV),
    ),
    Architecture(
        "qwen2",
        norm="rmsnorm",
        activations=("swiglu",),
        rope="half",
        rotates_parts=False,
        fuses_qkv=False,
        optional=frozenset(QKV),
        output_bias=True,
    ),
    # Biases everywhere but at the output.
    Architecture(
        "llama",
        norm="rmsnorm",
        activations=("swiglu",),
        rope="interleaved",
        rotates_parts=False,
        fuses_qkv=False,
        optional=frozenset({*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down"}),
    ),
)


def choose(spec: ModelSpec, *, keeps_qkv_apart: bool = False) -> Architecture:
    """The first architecture that computes the model.

    keeps_qkv_apart: q, k and v have different types: an architecture that stores them apart goes first.

    Raises UnsupportedError, which names what the nearest one lacks.
    """
    order = sorted(ARCHITECTURES, key=lambda a: a.fuses_qkv and keeps_qkv_apart)
    found = {a: list(a.obstacles(spec)) for a in order}
    # What a model is made of says more about which is near than how many details fit.
    best = min(order, key=lambda a: (a.norm != spec.norm, spec.activation not in a.activations, len(found[a])))
    if found[best]:
        raise UnsupportedError(
            f"no architecture of llama.cpp computes a model with {spec.norm} and {spec.activation} like this one; "
            f"the nearest, {best.name}, lacks {'; '.join(found[best])}"
        )
    return best
