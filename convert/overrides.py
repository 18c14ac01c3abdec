"""What a user may state of a checkpoint: one table, which gives the command line options, their checks and messages."""

import argparse
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError


@dataclass(frozen=True)
class Override:
    """A row: how a value is checked and given. `spec_field`: where a `ModelSpec` has what the code computes."""

    help: str
    wanted: str  # what a value must be, for the message
    allows: Callable[[Any], bool]
    spec_field: str | None = None
    choices: tuple[str, ...] = ()
    argument: Mapping[str, Any] = field(default_factory=dict)  # for argparse


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _choice(help: str, *choices: str, spec_field: str | None = None, **argument: Any) -> Override:
    allowed = f"one of {', '.join(choices)}"
    return Override(help, allowed, lambda v: v in choices, spec_field, choices, {"choices": choices, **argument})


def _number(help: str, spec_field: str) -> Override:
    return Override(help, "a positive number", lambda v: _is_finite(v) and v > 0, spec_field, (), {"type": float})


def _count(help: str, spec_field: str | None = None) -> Override:
    def allows(value: Any) -> bool:
        return _is_finite(value) and value >= 1 and value == int(value)

    return Override(help, "a positive whole number", allows, spec_field, (), {"type": int})


def _two(help: str, wanted: str, each: Callable[[Any], bool], **argument: Any) -> Override:
    def allows(value: Any) -> bool:
        return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(each, value))

    return Override(help, wanted, allows, None, (), {"nargs": 2, **argument})


_QKV_ORDERS = ("".join(order) + end for order in itertools.permutations("qkv") for end in ("", "/head"))

OVERRIDES: dict[str, Override] = {
    "lift": _choice('"tile" or "interleave"', "tile", "interleave", spec_field="code.lift"),
    "bit_order": _choice('"lsb" or "msb": which bit of an id the first element of a code is', "lsb", "msb"),
    "affine": _two(
        "(A, b) as arrays or paths of .npy files: code = A·bin(id) xor b, or (c·A if orientation is given so)",
        "two values",
        lambda v: True,
        metavar=("A.npy", "B.npy"),
    ),
    "affine_orientation": _choice('"Ac" (A times the column of bits) or "cA" (the row of bits times A)', "Ac", "cA"),
    "values": _two(
        "(value of a 0 bit, value of a 1 bit)", "two finite numbers", _is_finite, type=float, metavar=("V0", "V1")
    ),
    "norm": _choice('"layernorm" or "rmsnorm"', "layernorm", "rmsnorm", spec_field="norm"),
    "norm_eps": _number("number added under the root of every norm", "norm_eps"),
    "activation": _choice('"gelu", "gelu_tanh" or "swiglu"', "gelu", "gelu_tanh", "swiglu", spec_field="activation"),
    "rope_style": _choice('"half" or "interleaved"', "half", "interleaved", spec_field="rope_style"),
    "rope_base": _number("rotary base", "rope_base"),
    "rope_dim": _count("elements of a head that are rotated", "rope_dim"),
    "n_head": _count("query heads", "head_count"),
    "n_head_kv": _count("key/value heads", "head_count_kv"),
    "attention_scale": _number("factor on q·k", "attention_scale"),
    "qkv_order": _choice(
        'layout of a fused projection: "qkv", "kqv", ... or, with one such triple per head, "qkv/head"',
        *_QKV_ORDERS,
        metavar="QKV_ORDER",
    ),
    "gate_up_order": _choice('"gate_up" or "up_gate": order in a fused projection', "gate_up", "up_gate"),
    "transposed": Override(
        "whether matrices are stored [in, out]",
        "one of True, False",
        lambda v: v in (True, False),
        argument={"action": argparse.BooleanOptionalAction},
    ),
    "context_length": _count("longest prompt in tokens"),
}


def option(name: str) -> str:
    """The command line option of an override."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse._ActionsContainer) -> None:
    """An option for every override; None where it is not given."""
    for name, override in OVERRIDES.items():
        parser.add_argument(option(name), default=None, help=override.help.replace("%", "%%"), **override.argument)


def stated_options(args: argparse.Namespace) -> dict[str, Any]:
    """The overrides among parsed arguments that were given."""
    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def checked(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those that are not None. CheckpointError for an unknown name, or a value that no checkpoint could have."""
    stated = {name: value for name, value in (overrides or {}).items() if value is not None}
    if unknown := sorted(set(stated) - set(OVERRIDES)):
        raise CheckpointError(f"unknown override: {', '.join(unknown)}; known: {', '.join(OVERRIDES)}")
    for name, value in stated.items():
        if not OVERRIDES[name].allows(value):
            raise CheckpointError(f"{option(name)} {value}: must be {OVERRIDES[name].wanted}")
    return stated
