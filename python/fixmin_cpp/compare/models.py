"""The models of a comparison: GGUF files, or checkpoints, which are converted first."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import _core
from ..errors import ArgumentError, naming
from ..hub import find
from ..inspect import describe_code
from ..recognise import refuse_wrong_model
from .results import ModelFacts
from .store import file_sha256

__all__ = ["distinct_names", "read_facts", "resolve_model"]


def resolve_model(given: Path, *, outtype: str, trust_remote_code: bool, tell: Callable[[str], None]) -> Path:
    """The GGUF file of a model argument: itself, or what a checkpoint is converted to, once (fixmin_cpp.hub)."""
    if given.is_file():
        refuse_wrong_model(given)
        return given
    return find(given, dtype=outtype, trust_remote_code=trust_remote_code, log=tell).path


def distinct_names(given: Sequence[Path]) -> list[str]:
    """A name for each model: of its file or folder, with a number where two are alike."""
    names = [path.resolve().name.removesuffix(".gguf") for path in given]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    ]


def read_facts(path: Path, source: str, name: str) -> ModelFacts:
    """What the file says of itself. GGUFError: it is malformed; ArgumentError: it is no model of this kind."""
    with naming(path):
        file = _core.GgufFile(str(path))
        metadata, tensors = file.metadata, file.tensors
    kind = metadata.get("fixmin.code.kind")
    vocab_size, width = metadata.get("fixmin.vocab_size"), metadata.get("fixmin.code.width", 0)
    if not isinstance(kind, str) or not isinstance(vocab_size, int):
        raise ArgumentError(f"{path} is not a model of this program: it has no fixmin.code.kind")
    weights = {t.name: math.prod(t.shape) for t in tensors if not t.name.endswith(".weight_scale")}
    weights.pop("token_code.weight", None)
    types: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.name in weights:
            types[tensor.type] += weights[tensor.name]
    variant = _variant(kind, metadata)
    return ModelFacts(
        name=name,
        source=source,
        path=str(path),
        sha256=file_sha256(path),
        variant=variant,
        types=" + ".join(one for one, n in types.most_common() if n >= 0.01 * types.total()),
        n_parameters=sum(weights.values()),
        n_input_parameters=weights.get("token_embd.weight", 0),
        code_bits={"affine": width * (width + 1), "table": vocab_size * width}.get(variant, 0),
        file_bytes=path.stat().st_size,
        n_ctx=int(metadata.get("fixmin.context_length", 0)),
        vocab_size=vocab_size,
    )


def _variant(kind: str, metadata: dict[str, Any]) -> str:
    """The paper's name for the code of a file."""
    if kind != "affine":
        return kind
    code = describe_code(metadata)
    plain = str(code.get("map", "")).startswith(("identity", "reversal")) and not any(code.get("shift", (1,)))
    return "fixed" if plain else "affine"
