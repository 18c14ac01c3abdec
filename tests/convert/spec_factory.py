"""Small random models as `Resolved`: what resolving a checkpoint yields, made directly from the PyTorch reference."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from fixmin_cpp import reference
from fixmin_cpp.convert.spec import CodeSpec, ModelSpec, Resolved, TensorRecipe
from fixmin_cpp.reference.configuration_fixmin import FixMinConfig
from fixmin_cpp.reference.modeling_fixmin import FixMinForCausalLM

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
}


class NoSource:
    """In the place of a checkpoint directory."""

    closed = False

    def close(self) -> None:
        self.closed = True


def make_reference(seed: int = 0, **options) -> FixMinForCausalLM:
    """A reference model of the `SMALL` shape; norms differ from 1, biases from 0, and the affine map is not trivial."""
    torch.manual_seed(seed)
    config = FixMinConfig(**{**SMALL, **options})
    model = FixMinForCausalLM(config).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                mean = 1.0 if name.endswith("norm.weight") else 0.0
                parameter.copy_(mean + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
        width = config.code_width
        if config.code_kind == "affine":
            lower = np.tril(rng.integers(0, 2, (width, width)), -1) + np.eye(width, dtype=np.int64)
            model.model.code.matrix.copy_(torch.from_numpy(lower[rng.permutation(width)].astype(np.uint8)))
            model.model.code.shift.copy_(torch.from_numpy(rng.integers(0, 2, width).astype(np.uint8)))
        elif config.code_kind == "table":
            ids = rng.permutation(2**width)[: config.vocab_size]
            bits = (ids[:, None] >> np.arange(width)) & 1
            model.model.code.table.copy_(torch.from_numpy(bits.astype(np.uint8)))
    return model


def make_resolved(model: FixMinForCausalLM, own_code: bool = True, **changes) -> Resolved:
    """The reference as a resolved checkpoint. own_code: whether it can be run; changes: fields of the spec."""
    config = model.config
    tensors = {}
    for name, parameter in model.named_parameters():
        name = name.replace("model.layers.", "blk.").replace("lm_head.", "output.").replace("model.", "")
        tensors[name] = array_recipe(parameter.detach().numpy())
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "attention_scale": config.scale,
        "norm": config.norm_type,
        "norm_eps": config.norm_eps,
        "rope_dim": config.rope_dim,
        "rope_base": config.rope_theta,
        "rope_style": config.rope_style,
        "activation": config.activation,
        "code": _code(model),
        "tensors": tensors,
        "conventions": {"rope_style": (config.rope_style, "test")},
        "name": "small",
        "weights_sha256": lambda: "00" * 32,
    }

    @torch.inference_mode()
    def logits(ids: NDArray) -> NDArray[np.float32]:
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()

    @torch.inference_mode()
    def first_input(ids: NDArray) -> NDArray[np.float32]:
        return model.get_input_embeddings()(torch.from_numpy(ids.astype(np.int64))[None])[0].numpy()

    spec = ModelSpec(**{**fields, **changes})
    return Resolved(spec, NoSource(), logits if own_code else None, first_input if own_code else None)


def array_recipe(values: NDArray[np.float32]) -> TensorRecipe:
    return TensorRecipe(values.shape, ("memory",), lambda start, stop: values[start:stop])


def _code(model: FixMinForCausalLM) -> CodeSpec:
    config = model.config
    if config.code_kind == "learned":
        return CodeSpec("learned")
    lift = {"width": config.code_width, "lift": config.code_lift, "values": tuple(config.code_values)}
    if config.code_kind == "table":
        return CodeSpec("table", table=model.model.code.table.numpy(), **lift)
    if config.code_kind == "fixed":
        identity = np.eye(config.code_width, dtype=np.uint8)
        return CodeSpec("affine", matrix=identity, shift=np.zeros(config.code_width, np.uint8), **lift)
    return CodeSpec("affine", matrix=model.model.code.matrix.numpy(), shift=model.model.code.shift.numpy(), **lift)


def save_checkpoint(model: FixMinForCausalLM, folder: Path) -> Path:
    """The reference as a checkpoint directory: config.json, model.safetensors and its modeling code."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    auto_map = {
        "AutoConfig": "configuration_fixmin.FixMinConfig",
        "AutoModelForCausalLM": "modeling_fixmin.FixMinForCausalLM",
    }
    config = {**model.config.to_dict(), "architectures": ["FixMinForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_fixmin.py", "modeling_fixmin.py"):
        shutil.copy(Path(reference.__file__).with_name(name), folder)
    return folder
