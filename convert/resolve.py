"""Find out what function a checkpoint computes and settle its conventions."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .checkpoint.own_code import check_code, has_own_code, needs_trust
from .checkpoint.roles import read_map
from .checkpoint.source import Source, is_no_weight, some
from .overrides import checked
from .spec import Resolved
from .stated.without_code import resolve_without_code

Log = Callable[[str], None]


def resolve(
    checkpoint_dir: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    map_file: str | os.PathLike[str] | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    remembered: Mapping[str, Sequence[str]] | None = None,
    log: Log | None = None,
) -> Resolved:
    """Read a checkpoint directory and settle every convention of the model, each with its provenance.

    Args:
        checkpoint_dir: config.json, weights, and perhaps the modeling code and tokenizer.json.
        trust_remote_code: run the checkpoint's own code. What it computes then decides; nothing is guessed.
        map_file: which checkpoint tensor is which GGUF tensor, see `roles.read_map`.
        calibrate: a text file; without code, what the files leave open is chosen by the model's loss on it.
        overrides: what the user states; keys and values as in `overrides.OVERRIDES`.
        allow_missing: names, or patterns with * and ?, of tensors that the files may lack: they get what a new model
            has there (the constructor's values; without code, biases of 0 and gains of 1).
        allow_unexpected: the same for tensors that have no place in the model: they are left out.
        remembered: more names for the two, which may name nothing: those of an earlier conversion.
        log: called with a line of text for every finding, as it is made.

    Returns:
        The spec, its source and, if the code was run, the checkpoint's own logits and inputs of block 0.

    Raises:
        CheckpointError: unreadable, ambiguous, or a function the file format does not have.
    """
    stated = checked(overrides)
    report: list[str] = []

    def tell(line: str) -> None:
        report.append(line)
        if log is not None:
            log(line)

    source = Source(Path(checkpoint_dir), allow_missing=allow_missing, allow_unexpected=allow_unexpected)
    for allowance in (source.allow_missing, source.allow_unexpected):
        allowance.remembered = tuple((remembered or {}).get(allowance.option.strip("-").replace("-", "_"), ()))
    try:
        check_code(source, trust_remote_code)
        check_finite(source, map_file)
        if has_own_code(source) and (trust_remote_code or not needs_trust(source)):
            from .observed.observe import resolve_by_code  # imports torch

            resolved = resolve_by_code(source, stated, map_file, tell)
        else:
            resolved = resolve_without_code(source, stated, map_file, calibrate, tell)
        source.allow_missing.check_used()
        source.allow_unexpected.check_used()
    except BaseException:
        source.close()
        raise
    try:
        for name, (value, origin) in resolved.spec.conventions.items():
            tell(f"{name} = {_short(value)} ({origin})")
        _check_tokenizer(resolved)
        _check_codes(resolved)
    except BaseException:
        source.close()
        raise
    for text in source.warnings:
        tell(f"warning: {text}")
    resolved.report, resolved.warnings = report, tuple(source.warnings)
    return resolved


def _check_tokenizer(resolved: Resolved) -> None:
    """A warning if texts can have ids that the model does not have. CheckpointError for an unreadable tokenizer."""
    path, size = resolved.spec.tokenizer_json, resolved.spec.vocab_size
    tokenizer = resolved.source.tokenizer()
    if path is None or tokenizer is None:
        return
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= size]
    if beyond:
        resolved.source.warn(
            f"{path.name} has {len(beyond)} tokens beyond the {size} of the model ({some(sorted(beyond), 3)}): texts "
            "with them cannot be read"
        )


def _check_codes(resolved: Resolved) -> None:
    """A warning if the model cannot tell ids apart: usually a code that is damaged, or of another checkpoint."""
    spec = resolved.spec
    if spec.code.kind == "learned":
        return
    codes = np.packbits(spec.code.codes(np.arange(spec.vocab_size)), axis=1)
    n_same = spec.vocab_size - len(np.unique(codes, axis=0))
    if n_same:
        resolved.source.warn(
            f"{n_same} of {spec.vocab_size} token ids have the code of another one, so that the model cannot tell them "
            "apart: is the matrix or table of the codes damaged?"
        )


def check_finite(source: Source, map_file: str | os.PathLike[str] | None) -> None:
    """CheckpointError that names the first weight that is NaN or infinite. Reads all weights once.

    Here, because further on such a number looks like a function that the file format does not have.
    """
    ignored = read_map(source, map_file).ignored
    for name, tensor in source.tensors.items():
        square = len(tensor.shape) >= 2 and tensor.size == tensor.shape[-1] ** 2
        if name not in ignored and not is_no_weight(name) and not source.allow_unexpected(name):
            try:
                source.check_finite(name)
            except CheckpointError:
                if not (square and is_no_weight(name, source.read_raw(name))):  # a mask may hold -inf
                    raise


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"array {value.shape}"
    return f"{value:.7g}" if isinstance(value, float) else str(value)
