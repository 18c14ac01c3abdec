"""Checked arguments of one generation, and what becomes of them: seeds, candidates, parameters of the engine."""

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from . import _core
from .arguments import MAX_INT32, MAX_SEED, as_bool, as_int, digits, shortened
from .constrain import Constraint
from .errors import ArgumentError, ArgumentTypeError
from .fields import checked_class
from .load_options import LOAD_FIELDS
from .sampling_fields import ALIASES, FIELDS, FORMS

__all__ = ["DEFAULT_BREAKERS", "GenerationOptions", "candidate_counts", "candidate_seed", "main_names"]

DEFAULT_BREAKERS = ("\n", ":", '"', "*")  # of DRY, llama.cpp's
_MAX_CANDIDATES = 1024
_OF_GENERATE = ("n", "best_of", "on_token", "progress")

# Numbers that the engine takes under the same name and as they are.
_NATIVE = [
    name for name, row in FIELDS.items() if isinstance(row.default, int | float) and hasattr(_core.SamplingParams, name)
]


_Checked: Any = checked_class("GenerationOptions", FIELDS, constraint=None)


class GenerationOptions(_Checked):  # type: ignore[misc]  # made of the table
    """Checked arguments of one generation; their meaning is that of GenerationArguments.

    constraint: the form of the text, None: any. seed: None, a random one; a tuple, one for each prompt.
    dry_sequence_breakers: None, the default ones, if there is text. allowed_ids: (), all.
    """

    @classmethod
    def check(cls, arguments: Mapping[str, Any], vocab_size: int) -> "GenerationOptions":
        """Raises ArgumentError (a ValueError) or ArgumentTypeError (also a TypeError) for anything out of place."""
        given = {name: value for name, value in main_names(arguments).items() if value is not None}
        sample = given.pop("do_sample", None)
        sample = None if sample is None else as_bool("do_sample", sample)
        if sample:
            given.setdefault("temperature", 1.0)
        constraint = Constraint.check(**{name: given.pop(name) for name in FORMS if name in given})
        checked = {name: FIELDS[name].checked(name, value, vocab_size) for name, value in given.items()}
        if sample and checked["temperature"] == 0.0:
            raise ArgumentError("do_sample=True needs a temperature above 0, got temperature=0")
        if sample is False:
            checked["temperature"] = 0.0
        options = cls(constraint=constraint, **checked)
        if options.min_new_tokens > options.max_new_tokens:
            raise ArgumentError(
                f"min_new_tokens is {digits(options.min_new_tokens)}, above max_new_tokens, which is "
                f"{options.max_new_tokens}"
            )
        options._check_choice(vocab_size)
        return options

    def _check_choice(self, vocab_size: int) -> None:
        """ArgumentError if no token could be drawn from the first step on."""
        never = {*self.banned_ids, *(token_id for token_id, bias in self.logit_bias if bias == -math.inf)}
        n_allowed = len(set(self.allowed_ids) - never) if self.allowed_ids else vocab_size - len(never)
        if n_allowed == 0:
            raise ArgumentError("no token is left to draw: banned_ids, allowed_ids and logit_bias rule out every one")

    def seeds(self, n_prompts: int, many: bool) -> list[int]:
        """One for each prompt; drawn if none was given. `many`: whether the prompts came as a list."""
        if self.seed is None:
            return [_random_seed() for _ in range(n_prompts)]
        if isinstance(self.seed, int):
            return [self.seed] * n_prompts
        if not many:
            raise ArgumentTypeError(
                "seed must be an integer for a single prompt, got several: of n completions the first has it, and the "
                "others have seeds made of it"
            )
        if len(self.seed) != n_prompts:
            raise ArgumentError(f"seed has {len(self.seed)} entries, but there are {n_prompts} prompts")
        return [_random_seed() if seed is None else seed for seed in self.seed]

    def native(self, *, eos_ids: Sequence[int], breakers: list[list[int]]) -> _core.SamplingParams:
        """The same for the engine, but for the seed. eos_ids: those that end a text. breakers: dry_sequence_breakers
        as ids."""
        # Counts beyond what any sequence can reach mean the same as the largest one that fits.
        values = {name: getattr(self, name) for name in _NATIVE}
        numbers = {name: min(value, MAX_INT32) if isinstance(value, int) else value for name, value in values.items()}
        return _core.SamplingParams(
            **numbers,
            logit_bias=dict(self.logit_bias),
            allowed_ids=self.allowed_ids,
            banned_ids=[*self.banned_ids, *(eos_ids if self.ignore_eos else [])],
            stop_ids=[*self.stop_ids, *([] if self.ignore_eos else eos_ids)],
            dry_sequence_breakers=breakers,
        )


def candidate_counts(n: Any, best_of: Any, options: GenerationOptions, *, equal: bool = False) -> tuple[int, int]:
    """n and best_of (None: n) of Model.generate, checked. `equal`: they may be all the same, without a temperature."""
    n = 1 if n is None else as_int("n", n, 1, _MAX_CANDIDATES)
    best_of = n if best_of is None else as_int("best_of", best_of, 1, _MAX_CANDIDATES)
    if best_of < n:
        raise ArgumentError(f"best_of is {best_of}, below n, which is {n}")
    if best_of > 1 and options.temperature == 0.0 and not equal:
        name, value = ("n", n) if n > 1 else ("best_of", best_of)
        raise ArgumentError(f"{name}={value} needs a temperature above 0: without one all completions are the same")
    return n, best_of


def candidate_seed(seed: int, candidate: int) -> int:
    """The seed of completion 0, 1, ... of a prompt: the given one, then number 8i + 7 of its SplitMix64 sequence.

    Of eight numbers of the sequence a step draws from the first ones only. The upper 53 bits: other readers of JSON
    hold numbers as doubles.
    """
    if candidate == 0:
        return seed
    z = (seed + (8 * candidate + 8) * 0x9E3779B97F4A7C15) & MAX_SEED
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MAX_SEED
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MAX_SEED
    return (z ^ (z >> 31)) >> 11


def _random_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


def main_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments under their main names. ArgumentTypeError for a name that there is not."""
    named: dict[str, Any] = {}
    for name, value in arguments.items():
        main = ALIASES.get(name, name)
        if name in _OF_GENERATE:
            why = ": here a prompt has one completion" if name in ("n", "best_of") else ""
            raise ArgumentTypeError(f"{name} is an argument of Model.generate() only{why}")
        if main not in FIELDS:
            raise ArgumentTypeError(f"there is no argument {shortened(name)}{_hint(name)}")
        if main in named:
            raise ArgumentError(f"{name} and {main} are one argument: give it once")
        named[main] = value
    return named


# What other programs call an argument that there is here: llama.cpp, transformers, vLLM, OpenAI.
_ELSEWHERE = {
    "n": "num_return_sequences n_completions",
    "on_token": "streamer stopping_criteria callback",
    **{name: row.elsewhere for name, row in FIELDS.items()},
}
_OTHER_NAMES = {other: name for name, others in _ELSEWHERE.items() for other in others.split()}
_OTHER_WAYS = {
    **dict.fromkeys(
        ("num_beams", "length_penalty", "early_stopping", "beam_size"),
        "Model.beam_search(prompt, num_beams=...) looks for the most probable text",
    ),
    "stream": "Model.stream(prompt) gives one token after the other",
    **dict.fromkeys(("prompts", "inputs", "input_ids", "prompt_token_ids"), "the prompt comes first, without a name"),
    **dict.fromkeys(("attention_mask", "pad_token_id"), "prompts of a list need no padding"),
    **dict.fromkeys((*LOAD_FIELDS, "num_ctx"), "that belongs to Model(path, ...)"),
}


def _hint(name: Any) -> str:
    """What to write in place of an argument that there is not."""
    if name in _OTHER_WAYS:
        return f": {_OTHER_WAYS[name]}"
    meant = _OTHER_NAMES.get(name)
    if meant is None and isinstance(name, str) and len(name) < 100:
        meant = next(iter(difflib.get_close_matches(name, [*FIELDS, *ALIASES, *_OF_GENERATE], 1)), None)
    return "; fixmin_cpp.GenerationArguments lists all" if meant is None else f": did you mean {meant!r}?"
