"""A checkpoint written once more, with the reference model as its code: the same weights and the same function.

The published checkpoints' own code has no KV cache, and may use what transformers 5 no longer has. The reference model
has one, and what vLLM and SGLang ask of a model.

    report = rewrap("checkpoint/", "rewrapped/", trust_remote_code=True)
"""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .. import _core
from ..errors import CheckpointError
from ..reference import configuration_fixmin, modeling_fixmin
from ..reference.configuration_fixmin import FixMinConfig
from ..reference.modeling_fixmin import FixMinForCausalLM
from .certify import make_prompts
from .checkpoint.source import check_directory
from .fold import Fold
from .observed.torch_threads import torch_threads
from .resolve import resolve
from .spec import ModelSpec, Resolved
from .streaming import reference_config, reference_logits

__all__ = ["TOLERANCE", "RewrapReport", "rewrap"]

TOLERANCE = 1e-5  # ‖Δlogits‖ / ‖logits‖ against the checkpoint's own code, both in float32
_SHARD = 2 << 30  # bytes of a file of weights; also what is in memory at a time
_GENERATED = 8  # tokens that are generated with and without a cache
_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}
# Beside weights, configuration and code: what a user of the checkpoint would miss.
_KEPT = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja", "LICENSE*", "NOTICE*")
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # of transformers: reads tokenizer.json as it is


@dataclass(frozen=True)
class RewrapReport:
    """What was written, and how it compares with the original."""

    path: Path
    n_bytes: int  # of the weights
    n_parameters: int
    dtype: str  # of the weights: "float32", or "bfloat16" or "float16" where the checkpoint's are all of it
    against: str  # what it was compared with
    logit_error: float  # ‖Δlogits‖ / ‖logits‖, the largest of some prompts
    tokens: int  # of these prompts
    warnings: tuple[str, ...]  # what to know of the checkpoint

    def lines(self) -> list[str]:
        """For people."""
        return [
            *(f"warning: {text}" for text in self.warnings),
            f"certified against {self.against}: relative difference of logits {self.logit_error:.2g} "
            f"(limit {TOLERANCE:g}), {self.tokens} tokens; generates the same {_GENERATED} with and without a cache",
            f"wrote {self.path}: {self.n_parameters:,} parameters, {self.dtype}, {self.n_bytes:,} bytes",
        ]


def rewrap(
    checkpoint_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fold_bias: bool = False,
    log: Callable[[str], None] | None = None,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> RewrapReport:
    """Write a checkpoint's weights with the reference model as their code, and certify that its function is the same.

    The folder appears when it is complete and certified. Nothing of the checkpoint is changed.

    Args:
        checkpoint_dir: as for `convert`.
        out: the folder to write; it must not exist, or be empty.
        fold_bias: leave the output projection without a bias, which some engines do not know: it goes into the last
            LayerNorm and the matrix (fold.py), whose new values need float32.
        log: told what is found.
        overrides, options: for `resolve`: what the user states, trust_remote_code, map_file, calibrate, allow_missing,
            allow_unexpected.

    Raises:
        CheckpointError: the checkpoint cannot be resolved; `out` exists; the result computes something else.
        OSError: the disk is full, the folder not writable.
    """
    tell: Callable[[str], None] = log or (lambda line: None)
    checkpoint_dir, out = Path(checkpoint_dir), Path(out)
    check_directory(checkpoint_dir)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: exists; name a folder that does not, or is empty")
    if out.resolve().is_relative_to(checkpoint_dir.resolve()):
        raise CheckpointError(f"{out}: lies in the checkpoint's folder, which is not changed; name another place")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"{out.parent}: there is no such folder to write {out.name} to")
    stated = {name: value for name, value in (overrides or {}).items() if value is not None}
    with (
        torch_threads(checkpoint_dir),
        tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.", suffix=".partial") as temporary,
        resolve(checkpoint_dir, overrides=stated, log=tell, **options) as resolved,
    ):
        folder = Path(temporary, out.name)
        folder.mkdir()
        tell("writing the weights ...")
        config = _config(resolved.spec, fold_bias)
        try:
            dtype = _write_weights(folder, resolved, config)
        except SafetensorError as refused:  # which is all that its library says of a full disk
            number = re.search(r"os error (\d+)", str(refused))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(out)) from refused
        _write_config(folder, config, dtype, resolved)
        for path in folder.glob("*.safetensors"):  # which their library makes readable by their owner alone
            path.chmod((folder / "config.json").stat().st_mode)
        _write_the_rest(folder, checkpoint_dir, resolved.spec)
        tell("comparing with the original ...")
        try:
            against, error, tokens = _compare(folder, resolved)
        except CheckpointError:
            raise
        except (TypeError, ValueError) as wrong:
            if not (folder / "generation_config.json").is_file():
                raise
            raise CheckpointError(f"generation_config.json: transformers does not take it: {wrong}") from wrong
        if not error <= TOLERANCE:
            raise CheckpointError(
                f"{out}: what was written differs from {against} by {error:.2g} (limit {TOLERANCE:g}); nothing is kept"
            )
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
        n_bytes = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        n_parameters = sum(int(np.prod(shape)) for _, shape in _parameters(config))
        return RewrapReport(
            *(out, n_bytes, n_parameters, str(dtype).removeprefix("torch."), against, error, tokens),
            tuple(resolved.warnings),
        )


def _config(spec: ModelSpec, fold_bias: bool = False) -> FixMinConfig:
    """The configuration of the reference model for all of a spec, code and output projection included."""
    config = reference_config(spec)
    code = spec.code
    config.code_kind, config.code_width = code.kind, max(code.width, 1)
    if code.kind == "affine":
        assert code.matrix is not None
        assert code.shift is not None
        if np.array_equal(code.matrix, np.eye(code.width)) and not code.shift.any():
            config.code_kind = "fixed"
    if code.kind != "learned":
        config.code_lift, config.code_values = code.lift, [float(v) for v in code.values]
    config.lm_head_bias = "output.bias" in spec.tensors and not fold_bias
    if fold_bias and "output.bias" in spec.tensors:
        if spec.norm != "layernorm":
            raise CheckpointError(
                "fold_bias: a bias can be folded into a LayerNorm only, and the last norm is an RMSNorm"
            )
        config.norm_bias = True
    config.bos_token_id, config.pad_token_id = spec.bos_token_id, spec.pad_token_id
    ends = spec.eos_token_ids
    config.eos_token_id = ends[0] if len(ends) == 1 else list(ends) or None
    return config


def _parameters(config: FixMinConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what the reference model stores, in its order."""
    with torch.device("meta"):
        return [(name, tuple(t.shape)) for name, t in FixMinForCausalLM(config).state_dict().items()]


def _gguf_name(name: str) -> str:
    """Of a parameter of the reference model."""
    name = name.removeprefix("model.")
    return name.replace("layers.", "blk.", 1) if name.startswith("layers.") else name.replace("lm_head.", "output.")


def _tensors(spec: ModelSpec, config: FixMinConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the reference model, one at a time. Biases that the checkpoint lacks are zero."""
    codes: dict[str, NDArray[np.uint8] | None] = {
        **{"model.code.matrix": spec.code.matrix, "model.code.shift": spec.code.shift},
        **{"model.code.table": spec.code.table},
    }
    folded: dict[str, Callable[[], NDArray[Any]]] = {}
    if "output.bias" in spec.tensors and not config.lm_head_bias:
        beta = spec.tensors.get("output_norm.bias")
        gain = spec.tensors["output_norm.weight"].load()
        fold = Fold.of(gain, np.zeros_like(gain) if beta is None else beta.load())
        folded["model.output_norm.weight"] = lambda: fold.new_gain.astype(np.float32)
        folded["model.output_norm.bias"] = lambda: fold.new_bias.astype(np.float32)
        folded["lm_head.weight"] = lambda: fold.rows(
            spec.tensors["output.weight"].load(), spec.tensors["output.bias"].load()
        )
    for name, shape in _parameters(config):
        recipe = spec.tensors.get(_gguf_name(name))
        if name in codes:
            values: NDArray[Any] = np.asarray(codes[name], np.uint8)
        elif name in folded:
            values = folded[name]()
        elif recipe is not None:
            values = recipe.load()
        elif name.endswith(".bias"):
            values = np.zeros(shape, np.float32)
        else:
            raise CheckpointError(f"the checkpoint has nothing for {name}")
        yield name, torch.from_numpy(np.ascontiguousarray(values)).clone()


def _write_weights(folder: Path, resolved: Resolved, config: FixMinConfig) -> torch.dtype:
    """As few files as _SHARD allows, in the narrow type of the checkpoint if that holds all values exactly."""
    stored = {t.dtype for t in resolved.source.tensors.values()} & {"F64", "F32", "F16", "BF16"}
    narrow = _NARROW.get(stored.pop()) if len(stored) == 1 else None
    for dtype in (narrow, torch.float32):
        if dtype is not None and _write_shards(folder, resolved.spec, config, dtype):
            return dtype
    raise AssertionError("float32 holds every float32")


def _write_shards(folder: Path, spec: ModelSpec, config: FixMinConfig, dtype: torch.dtype) -> bool:
    """False, with nothing left, if the type cannot hold a value."""
    shards: list[dict[str, Tensor]] = [{}]
    paths: list[Path] = []
    where: dict[str, int] = {}
    size = total = 0

    def write() -> None:
        paths.append(folder / f"shard-{len(paths)}")
        save_file(shards.pop(), str(paths[-1]), metadata={"format": "pt"})
        shards.append({})

    for name, tensor in _tensors(spec, config):
        if tensor.is_floating_point() and tensor.dtype != dtype:
            narrow = tensor.to(dtype)
            if not torch.equal(narrow.to(tensor.dtype), tensor):
                for path in paths:
                    path.unlink()
                return False
            tensor = narrow
        n_bytes = tensor.numel() * tensor.element_size()
        if size and size + n_bytes > _SHARD:
            write()
            size = 0
        shards[0][name], where[name] = tensor, len(paths)
        size, total = size + n_bytes, total + n_bytes
    write()
    names = [f"model-{i + 1:05}-of-{len(paths):05}.safetensors" for i in range(len(paths))]
    if len(paths) == 1:
        names = ["model.safetensors"]
    else:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in where.items()}}
        _write_json(folder / "model.safetensors.index.json", index)
    for path, name in zip(paths, names, strict=True):
        path.rename(folder / name)
    return True


def _write_config(folder: Path, config: FixMinConfig, dtype: torch.dtype, resolved: Resolved) -> None:
    for module in (configuration_fixmin, modeling_fixmin):
        assert module.__file__ is not None
        shutil.copyfile(module.__file__, folder / Path(module.__file__).name)
    config.architectures = ["FixMinForCausalLM"]
    config.auto_map = {
        "AutoConfig": "configuration_fixmin.FixMinConfig",
        "AutoModel": "modeling_fixmin.FixMinModel",
        "AutoModelForCausalLM": "modeling_fixmin.FixMinForCausalLM",
    }
    config.dtype = dtype
    config.rewrapped_from = {
        "checkpoint": resolved.spec.name,
        "weights_sha256": resolved.spec.weights_sha256(),
        "tool": f"fixmin-cpp {_core.__version__}",
    }
    config.save_pretrained(folder)


def _write_the_rest(folder: Path, checkpoint_dir: Path, spec: ModelSpec) -> None:
    """The tokenizer, read as tokenizer.json has it, and files that belong to the model."""
    for pattern in _KEPT:
        for path in filter(Path.is_file, checkpoint_dir.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    if spec.tokenizer_json is None:
        return
    shutil.copyfile(spec.tokenizer_json, folder / "tokenizer.json")
    stated = checkpoint_dir / "tokenizer_config.json"
    try:
        settings = json.loads(stated.read_text(encoding="utf-8")) if stated.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{stated}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{stated}: expected a JSON object")
    settings.pop("auto_map", None)  # a class of the checkpoint's own code
    settings["tokenizer_class"] = _TOKENIZER_CLASS
    settings.setdefault("model_max_length", spec.context_length)
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _compare(folder: Path, resolved: Resolved) -> tuple[str, float, int]:
    """What the folder was compared with, the largest relative difference of logits, tokens. CheckpointError: a cache
    changes what is generated."""
    from transformers import AutoModelForCausalLM

    prompts = make_prompts(resolved.spec)
    own = resolved.reference_logits
    if own is not None:
        against, truth = "the checkpoint's own code", [own(p) for p in prompts]
    else:
        against = "the reference implementation (the checkpoint's code was not run)"
        truth = reference_logits(resolved.spec, prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # transformers says so what will not work in a later release
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    with torch.inference_mode():
        errors = []
        for prompt, expected in zip(prompts, truth, strict=True):
            got = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0].numpy()
            errors.append(float(np.linalg.norm(got - expected) / np.linalg.norm(expected)))
        room = resolved.spec.context_length - _GENERATED
        ids = torch.from_numpy(prompts[0].astype(np.int64))[None, : max(1, min(room, 32))]
        settings = {"max_new_tokens": _GENERATED, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        cached, plain = (model.generate(ids, attention_mask=mask, use_cache=c, **settings) for c in (True, False))
    if not torch.equal(cached, plain):
        raise CheckpointError(f"{folder.name}: generates other tokens with a cache than without; nothing is kept")
    return against, max(errors), sum(len(p) for p in prompts)
