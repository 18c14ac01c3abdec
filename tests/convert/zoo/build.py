"""Writes one checkpoint directory of the zoo and loads its original model back, without any help of the converter."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

AUTHORS = Path(__file__).parent / "authors"
Edits = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Author:
    """One modeling file of `authors/`, and how its user calls the model."""

    file: str  # stem in authors/
    config_class: str
    model_class: str
    first_block: str  # module whose first argument is the input of block 0
    head: str = "lm_head"  # pattern of the names of the output projection
    config_file: str | None = None  # stem in authors/, if the configuration has a file of its own
    vocab_key: str = "vocab_size"
    context_key: str = "max_position_embeddings"
    call: Callable[[Any, torch.Tensor], Any] = lambda model, ids: model(ids)


@dataclass(frozen=True)
class Style:
    """A checkpoint and what the converter owes it.

    convert: certified with no option but --trust-remote-code. refuse: CheckpointError. either: one of the two, but
    never a wrong file (functions that GGUF can hold only after rewriting weights).
    """

    author: Author
    config: dict[str, Any] = field(default_factory=dict)  # what config.json says beyond the names of classes
    edits: Edits = ()  # (old, new) in the author's file; every old must occur
    module_name: str | None = None  # stem of the modeling file in the checkpoint, default modeling_<author>
    scale: tuple[tuple[str, float], ...] = ()  # (pattern of parameter names, factor on the drawn values)
    shift: tuple[tuple[str, float], ...] = ()  # (pattern of parameter names, added constant)
    tables: Callable[[torch.nn.Module, torch.Generator], None] | None = None  # sets frozen tables and the like
    layout: Literal["single", "sharded", "bin", "sharded_bin"] = "single"
    dtype: torch.dtype = torch.float32  # of the floating-point tensors in the file
    prefix: str = ""  # in front of every tensor name in the file
    drop: str | None = None  # pattern of tensor names that are not saved (tied to others)
    tokenizer: bool = False
    first_block: str | None = None  # where an edit moved the author's
    call: Callable[[Any, torch.Tensor], Any] | None = None  # where an edit changed how the model is called
    expect: Literal["convert", "refuse", "either"] = "convert"
    words: tuple[str, ...] = ()  # regular expressions, each to be found in a refusal
    alternatives: tuple[Edits, ...] = ()  # other conventions: each must change the logits visibly
    visible: float = 1e-3  # relative change that the alternatives must exceed
    notice_at: int = 48  # tokens it takes to see what is special


def draw_weights(model: torch.nn.Module, style: Style, seed: int) -> None:
    """Fills trainable parameters: matrices ~ N(0, 1.5² / columns), vectors get noise of 0.3 around their start."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        factor = float(np.prod([f for pattern, f in style.scale if re.search(pattern, name)]))
        constant = sum(c for pattern, c in style.shift if re.search(pattern, name))
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter += 0.3 * factor * noise + constant
            elif id(parameter) in embeddings:
                parameter.copy_(0.02 * factor * noise)
            else:
                parameter.copy_(1.5 * factor * noise / parameter.shape[-1] ** 0.5 + constant)
    if style.tables is not None:
        with torch.no_grad():
            style.tables(model, generator)


def write_code(directory: Path, style: Style, extra_edits: Edits = ()) -> None:
    """config.json and the .py files."""
    author = style.author
    source = (AUTHORS / f"{author.file}.py").read_text()
    config_source = (AUTHORS / f"{author.config_file}.py").read_text() if author.config_file else ""
    for old, new in style.edits + extra_edits:
        assert old in source + config_source, f"{author.file}: no {old!r} to replace"
        source, config_source = source.replace(old, new), config_source.replace(old, new)
    stem = style.module_name or f"modeling_{author.file}"
    (directory / f"{stem}.py").write_text(source)
    if author.config_file:
        (directory / f"{author.config_file}.py").write_text(config_source)
    model_type = re.search(r'model_type = "(.*)"', source + config_source)
    assert model_type is not None
    config = {
        "architectures": [author.model_class],
        "auto_map": {
            "AutoConfig": f"{author.config_file or stem}.{author.config_class}",
            "AutoModelForCausalLM": f"{stem}.{author.model_class}",
        },
        "model_type": model_type[1],
        "torch_dtype": str(style.dtype).removeprefix("torch."),
        **style.config,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))


@contextlib.contextmanager
def imported(directory: Path, stem: str) -> Iterator[ModuleType]:
    """The checkpoint's modeling file as a module of a package of its own, forgotten afterwards."""
    package = f"zoo_checkpoint_{abs(hash(str(directory)))}"
    root = ModuleType(package)
    root.__path__ = [str(directory)]
    sys.modules[package] = root
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # of files that are changed within a second
    try:
        yield importlib.import_module(f"{package}.{stem}")
    finally:
        sys.dont_write_bytecode = before
        for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
            del sys.modules[name]


def build_model(directory: Path, style: Style) -> torch.nn.Module:
    """The original class, constructed on the CPU in float32 from config.json, in evaluation mode."""
    with imported(directory, style.module_name or f"modeling_{style.author.file}") as module:
        config_class = getattr(module, style.author.config_class)
        fields = json.loads((directory / "config.json").read_text())
        for key in ("auto_map", "model_type", "torch_dtype"):
            fields.pop(key)
        torch.manual_seed(0)
        return getattr(module, style.author.model_class)(config_class(**fields)).eval()


def save_weights(directory: Path, state: dict[str, torch.Tensor], layout: str) -> None:
    names = list(state)
    halves = [names] if layout in ("single", "bin") else [names[: len(names) // 2], names[len(names) // 2 :]]
    binary = layout.endswith("bin")
    stem, suffix = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    weight_map = {}
    for number, part in enumerate(halves, 1):
        name = f"{stem}.{suffix}" if len(halves) == 1 else f"{stem}-{number:05d}-of-{len(halves):05d}.{suffix}"
        tensors = {n: state[n] for n in part}
        weight_map |= dict.fromkeys(part, name)
        if binary:
            torch.save(tensors, directory / name)
        else:
            copies = {n: t.clone().contiguous() for n, t in tensors.items()}
            save_file(copies, directory / name, metadata={"format": "pt"})
    if len(halves) > 1:
        total = sum(t.numel() * t.element_size() for t in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        state |= load_file(path)
    for path in sorted(directory.glob("*.bin")):
        state |= torch.load(path, weights_only=True)
    return state


def character_of(token: int) -> str:
    """Token ids are letters from U+4E00 on, so that any sequence of ids is a text and comes back unchanged."""
    return chr(0x4E00 + token)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """tokenizer.json of one character per token; decoding is plain concatenation."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {character_of(t): t for t in range(vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))


def make_checkpoint(style: Style, directory: Path, seed: int = 0, full_config: bool = False) -> None:
    """Writes the checkpoint directory of a style; `full_config` as `save_pretrained` does, with every default."""
    directory.mkdir(parents=True, exist_ok=True)
    write_code(directory, style)
    model = build_model(directory, style)
    if full_config:
        fields = {key: value for key, value in vars(model.config).items() if not key.startswith("_")}
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=2, default=str))
    draw_weights(model, style, seed)
    state = {
        style.prefix + name: tensor.to(style.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if not (style.drop and re.search(style.drop, name))
    }
    save_weights(directory, state, style.layout)
    if style.tokenizer:
        write_tokenizer(directory, getattr(model.config, style.author.vocab_key))


class _Stop(Exception):
    """Raised by the hook: the input of block 0 is known, the rest of the forward pass is not wanted."""


class Original:
    """The checkpoint's own model, loaded by this file's own means: the ground truth of every comparison."""

    def __init__(self, model: torch.nn.Module, style: Style) -> None:
        self.model = model
        self.style = style
        self.call = style.call or style.author.call
        self.vocab_size: int = getattr(model.config, style.author.vocab_key)
        self.context_length: int = getattr(model.config, style.author.context_key)

    @classmethod
    def load(cls, directory: Path, style: Style) -> Original:
        """The model of a checkpoint directory; every tensor of the file must be one of the model's, and vice versa."""
        weights = read_weights(directory)
        assert all(name.startswith(style.prefix) for name in weights)
        state = {name.removeprefix(style.prefix): tensor for name, tensor in weights.items()}
        model = build_model(directory, style)
        result = model.load_state_dict(state, strict=style.drop is None)
        assert not result.unexpected_keys
        assert all(style.drop and re.search(style.drop, name) for name in result.missing_keys)
        return cls(model, style)

    @torch.no_grad()
    def batch_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [B, T] -> logits [B, T, V], whatever the author's code returns them in."""
        output = self.call(self.model, ids)
        parts = output if isinstance(output, tuple) else output.values() if isinstance(output, dict) else [output]
        (logits,) = (part for part in parts if isinstance(part, torch.Tensor) and part.ndim == 3)
        return logits

    def logits(self, ids: NDArray[Any]) -> NDArray[np.float64]:
        """ids [T] -> logits [T, V]."""
        return self.batch_logits(torch.as_tensor(np.asarray(ids, dtype=np.int64))[None])[0].double().numpy()

    @torch.no_grad()
    def input_rows(self, ids: NDArray[Any]) -> NDArray[np.float64]:
        """Input of block 0 for every id [T], each a sequence of its own -> [T, D]."""
        seen: list[torch.Tensor] = []

        def stop(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        block = self.style.first_block or self.style.author.first_block
        handle = self.model.get_submodule(block).register_forward_pre_hook(stop)
        try:
            with contextlib.suppress(_Stop):
                self.call(self.model, torch.as_tensor(np.asarray(ids, dtype=np.int64))[:, None])
        finally:
            handle.remove()
        return seen[0][:, 0].double().numpy()


def prompt(original: Original, seed: int = 0) -> NDArray[np.int64]:
    """A sequence that visits the first and the last id, 48 long unless the context or the style says otherwise."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(original.vocab_size, size=min(original.style.notice_at, original.context_length))
    ids[:2] = original.vocab_size - 1, 0
    return ids


def sampled_text(original: Original, rows: int = 8, seed: int = 0) -> str:
    """A text that the model itself wrote at temperature 1, so no other model explains it better on average.

    What a wrong convention costs in nats per token is then the divergence between the two models: certain to show in
    enough text, without training anything. Only for styles with a tokenizer. Each row starts afresh and fills the
    context: unlike a trained model, one with random weights needs all of it to recognise its own text.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(original.vocab_size, (rows, 1), generator=generator)
    while ids.shape[1] < original.context_length:
        likely = original.batch_logits(ids)[:, -1].softmax(-1)
        ids = torch.cat((ids, torch.multinomial(likely, 1, generator=generator)), dim=1)
    return "".join(character_of(token) for token in ids.flatten().tolist())
