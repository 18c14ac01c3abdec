"""Resolve a checkpoint whose code is absent or not trusted: what the files say, what the user states, and the rest by
the model's own loss on a text, if that decides.

Every convention is an `Item`: settled by the user, the configuration or a tensor, or open with its alternatives. Open
items are either settled by calibration, each with its margin, or listed in the refusal with the option that settles
them.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import CheckpointError
from ..checkpoint.own_code import has_own_code
from ..checkpoint.source import Source
from ..spec import Resolved
from .calibrate import Losses, choose
from .files import Files, Item, State


def resolve_without_code(
    source: Source,
    stated: Mapping[str, Any],
    map_file: str | os.PathLike[str] | None,
    calibrate: str | os.PathLike[str] | None,
    tell: Callable[[str], None],
) -> Resolved:
    """See `resolve.resolve`."""
    try:
        files = Files(source, stated, map_file)
        items = files.items()
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_hint(source, False)}") from None
    for name, why in files.roles.ignored.items():
        tell(f"tensor {name} {source.tensors[name].shape}: ignored, {why}")
    undecided = {item.name: "" for item in items if item.origin is None}
    if any(not item.options for item in items) or (undecided and calibrate is None):
        raise _ambiguous(source, items, undecided, source.tokenizer_json() is not None)
    state = {item.name: item.options[0][1] for item in items}
    origins = {item.name: item.origin or "" for item in items}
    if calibrate is not None:
        undecided = choose(items, state, origins, Losses(source, files, calibrate, state["context_length"]), tell)
        if undecided:
            raise _ambiguous(source, items, undecided, False)
    spec = files.spec(state)
    for item in items:
        spec.conventions[item.name] = (_label(item, state), origins[item.name])
    return Resolved(spec, source, None)


def _label(item: Item, state: State) -> str:
    return next((label for label, value in item.options if value is state[item.name]), str(state[item.name]))


def _ambiguous(source: Source, items: list[Item], undecided: dict[str, str], calibratable: bool) -> CheckpointError:
    lines = []
    for item in items:
        if item.name in undecided:
            labels = " / ".join(label for label, _ in item.options[:6]) or "not said anywhere"
            labels += f" / {len(item.options) - 6} more" if len(item.options) > 6 else ""
            note = f"; {undecided[item.name]}" if undecided[item.name] else ""
            lines.append(f"  {item.name}: {labels} (settle it with {item.settle}{note})")
    text = "the files leave open what the model computes:\n" + "\n".join(lines)
    return CheckpointError(text + _hint(source, calibratable))


def _hint(source: Source, calibratable: bool) -> str:
    """What else would settle things."""
    ways = []
    if has_own_code(source):
        ways.append("--trust-remote-code, which runs the checkpoint's own code and lets it decide")
    if calibratable:
        ways.append("--calibrate TEXTFILE, which lets the model's loss on a text decide")
    return f"\nOr give {', or '.join(ways)}." if ways else ""
