"""Which code computes a checkpoint: its own, in its directory, or an architecture of transformers. Nothing is run."""

import ast
import contextlib
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from .source import Source

AUTO_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")  # keys of auto_map


def has_own_code(source: Source) -> bool:
    """Whether the checkpoint comes with code of its own, or names an architecture that transformers has."""
    return own_class(source) is not None or library_class(source) is not None


def needs_trust(source: Source) -> bool:
    """Whether its code is in the checkpoint directory, so that running it needs the user's permission."""
    return own_class(source) is not None


def check_code(source: Source, trusted: bool) -> None:
    """CheckpointError, or without permission to run code a warning, if auto_map names code that is not there."""
    auto_map = source.config.get("auto_map")
    if auto_map is not None and not isinstance(auto_map, dict):
        raise CheckpointError(f"config.json: auto_map is {auto_map!r}, but must map names to 'module.Class'")
    for key in ("AutoConfig", *AUTO_MODELS):
        reference = (auto_map or {}).get(key)
        reference = reference[0] if isinstance(reference, (list, tuple)) and reference else reference
        if reference is None or local_reference(source.directory, reference):
            continue
        text = f"config.json: auto_map names {reference!r} for {key}, "
        if not isinstance(reference, str) or "." not in reference:
            raise CheckpointError(text + "but it must be 'module.Class'")
        module = reference.split("--")[-1].rpartition(".")[0]
        file = module.replace(".", "/") + ".py"
        text += f"but there is no {file} in {source.directory}"
        if "--" in reference:
            text += f": it lies in the repository {reference.split('--')[0]}, copy it from there"
        if trusted:
            raise CheckpointError(text)
        source.warn(f"{text}; the code could not be run even with --trust-remote-code")
    if trusted and not has_own_code(source):
        source.warn("--trust-remote-code: the checkpoint has no code that could be run")


def own_class(source: Source) -> tuple[str, str] | None:
    """(module, class) of the model in the checkpoint's directory."""
    auto_map = source.config.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    for key in AUTO_MODELS:
        if found := local_reference(source.directory, auto_map.get(key)):
            return found
    for architecture in _architectures(source):
        for path in sorted(source.directory.glob("[!.]*.py")):
            with contextlib.suppress(SyntaxError, UnicodeDecodeError):
                body = ast.parse(path.read_text(encoding="utf-8")).body
                if any(isinstance(node, ast.ClassDef) and node.name == architecture for node in body):
                    return path.stem, architecture
    return None


def _architectures(source: Source) -> list[str]:
    names = source.config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def local_reference(directory: Path, reference: Any) -> tuple[str, str] | None:
    """ "module.Class" or "repository--module.Class" of auto_map, if the module lies in the directory."""
    reference = reference[0] if isinstance(reference, (list, tuple)) and reference else reference
    if not isinstance(reference, str) or "." not in reference:
        return None
    module, _, name = reference.split("--")[-1].rpartition(".")
    with contextlib.suppress(OSError):  # names that no file can have
        if (directory / (module.replace(".", "/") + ".py")).is_file():
            return module, name
    return None


def library_class(source: Source) -> str | None:
    """The architecture, if transformers itself has it."""
    import transformers

    for name in _architectures(source):
        if name.endswith(("ForCausalLM", "LMHeadModel")) and hasattr(transformers, name):
            return name
    return None
