"""How a model is loaded: LoadArguments is the table of it, from Model() to the command line, batch jobs and the server.

A new option that the engine takes needs a row here, and nothing else in Python.
"""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from .arguments import MAX_INT32, as_float, as_int
from .errors import ArgumentError, ArgumentTypeError
from .fields import Field, Integer, checked_class, fields_of

__all__ = ["LOAD_FIELDS", "LoadArguments", "LoadOptions", "on_ray"]


def _kv_type(name: str, value: Any, vocab_size: int) -> str:
    if not isinstance(value, str) or value not in ("f16", "f32", "q8_0"):
        raise ArgumentError(f'{name} must be "f16", "f32" or "q8_0", got {value!r}')
    return value


def _device(name: str, value: Any, vocab_size: int) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", value):
        raise ArgumentError(f'{name} must be "auto", "cpu", "cuda" or "cuda:N", got {value!r}')
    return value


def _share(name: str, value: Any, vocab_size: int) -> float:
    share = as_float(name, value, 0.0, 1.0)
    if share == 0:
        raise ArgumentError(f"{name} must be above 0, got {value!r}")
    return share


def _context(name: str, value: Any, vocab_size: int) -> int | None:
    return as_int(name, value, 0, MAX_INT32) or None


class LoadArguments(TypedDict, total=False):
    """How Model() loads a file. All are optional."""

    # fmt: off
    device: Annotated[str | None, Field(None, _device,
        'where the model runs: "cpu"; "cuda" or "cuda:N", a GPU; "auto", a GPU if one is usable. None: what the '
        'environment variable FIXMIN_DEVICE says, else "cpu". Results do not depend on it.',
        option="--device", option_help="cpu, cuda, cuda:N, or auto. Default: FIXMIN_DEVICE, or cpu.")]
    n_threads: Annotated[int | None, Field(None, Integer(-1, 1024, least=0),
        "worker threads; None, 0 or -1: the smallest of CPU affinity, cgroup quota and physical cores.",
        option="-t --threads", option_help="Default, 0 or -1: what the machine offers.")]
    n_ctx: Annotated[int | None, Field(None, _context,
        "positions of the context, prompt and answer together; None or 0: what the model was trained with, which is "
        "also the most it can be.",
        option="-c --ctx --n-ctx", option_help="Context positions. Default, or 0: the model's.")]
    kv_type: Annotated[str, Field("f16", _kv_type,
        'type of the KV cache: "f16", "f32", or "q8_0", 8 bits and a scale for 32 values.',
        option_help="Type of the KV cache: f16, f32 or q8_0.")]
    n_batch: Annotated[int, Field(512, Integer(1, MAX_INT32),
        "tokens of all requests that are processed at a time. Results do not depend on it.", option=None)]
    n_kv: Annotated[int | None, Field(None, Integer(1, MAX_INT32),
        "positions of the KV cache, for all requests together and for what is remembered of earlier ones; None: as "
        "the next two say. Requests that do not fit wait.",
        option="--n-kv", option_help="Positions of the KV cache, of all requests.", rare=True)]
    n_parallel: Annotated[int, Field(256, Integer(1, MAX_INT32),
        "most requests that run at a time; more of them wait.",
        option="--parallel", option_help="Generations that run at a time.", rare=True)]
    kv_contexts: Annotated[int | None, Field(None, Integer(1, MAX_INT32),
        "contexts that the KV cache holds without n_kv, or fewer, down to one, if that were more than "
        "kv_memory_share; None: 16, or with a kv_memory_share as many as that holds.", option=None)]
    kv_memory_share: Annotated[float | None, Field(None, _share,
        "share of the memory that it takes at most: of a GPU's, or of what the machine lets the process use; None: "
        "1/8.",
        option="--kv-memory-share", option_help="Share of the memory, or of the GPU's, that the KV cache takes.",
        rare=True)]
    # fmt: on


LOAD_FIELDS: Mapping[str, Field] = fields_of(LoadArguments)
_Checked: Any = checked_class("LoadOptions", LOAD_FIELDS)


class LoadOptions(_Checked):  # type: ignore[misc]  # made of the table
    """Checked LoadArguments, in a form that can be compared, kept and pickled."""

    @classmethod
    def check(cls, given: Mapping[str, Any]) -> "LoadOptions":
        """Raises ArgumentError (a ValueError) or ArgumentTypeError (also a TypeError) for anything out of place."""
        checked = {}
        for name, value in given.items():
            if name not in LOAD_FIELDS:
                raise ArgumentTypeError(f"Model() has no argument {name!r}: it has {', '.join(LOAD_FIELDS)}")
            row = LOAD_FIELDS[name]
            checked[name] = None if value is row.default is None else row.checked(name, value)
        return cls(**checked)

    def given(self) -> dict[str, Any]:
        """As arguments again, without what is left to the machine."""
        return {name: value for name in LOAD_FIELDS if (value := getattr(self, name)) is not None}


def on_ray(device: str | None, gpus: float | None) -> tuple[str, float]:
    """Where the model of a Ray actor runs, and how many GPUs the actor reserves.

    Ray shows an actor the GPUs that it gave it and no others (CUDA_VISIBLE_DEVICES): the first is the one to take.

    Args:
        device: as in LoadArguments; None: what FIXMIN_DEVICE says here, since actors have another environment.
        gpus: None: one, if the model runs on a GPU. A part of one: so many actors share it.

    Raises:
        ArgumentError: the device is chosen by number or "auto"; gpus on the CPU, or more than one and not whole.
    """
    device = device or os.environ.get("FIXMIN_DEVICE") or "cpu"
    if device not in ("cpu", "cuda"):
        raise ArgumentError(f'on Ray device must be "cpu" or "cuda", got {device!r}: Ray says which GPU it is')
    if gpus is None:
        return device, float(device == "cuda")
    gpus = as_float("ray_gpus", gpus, 0.0, 1024.0)
    if (gpus > 0) != (device == "cuda"):
        raise ArgumentError(f'ray_gpus is {gpus:g} and device {device!r}: a model on "cuda" needs more than 0, else 0')
    if gpus > 1 and not gpus.is_integer():
        raise ArgumentError(f"ray_gpus is {gpus:g}; it must be at most 1, or whole")
    return device, gpus
