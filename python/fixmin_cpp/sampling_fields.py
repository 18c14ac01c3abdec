"""The arguments that say how a prompt is continued: GenerationArguments is the table of them.

A new argument that the engine takes as it is needs a row here, and nothing else in Python: that checks it, gives it a
default, hands it to _core.SamplingParams, and makes it an option of the command line and a field of the server.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, TypeAlias, TypedDict

import numpy as np

from . import arguments as check
from .arguments import MAX_FLOAT32, MAX_INT32, TokenIds
from .errors import ArgumentError
from .fields import Alias, Field, Integer, Number, aliases_of, fields_of, summary, unsized

__all__ = ["ALIASES", "BODY_ALIASES", "FIELDS", "FORMS", "GenerationArguments"]

Flag: TypeAlias = bool | None
Int: TypeAlias = int | None
Float: TypeAlias = float | None
Text: TypeAlias = str | None
Texts: TypeAlias = str | Sequence[str] | Set[str] | None
Choices: TypeAlias = Sequence[str] | None
Ids: TypeAlias = int | TokenIds | Set[int] | None
Seeds: TypeAlias = int | Sequence[int | None] | None
Biases: TypeAlias = Mapping[int, float] | Mapping[str, float] | Sequence[tuple[int, float]] | None
Breakers: TypeAlias = Sequence[str | Sequence[int]] | None

_MIN_FLOAT32 = float(np.finfo(np.float32).tiny)


def _positive(name: str, value: Any, vocab_size: int) -> float:
    number = check.as_float(name, value, 0.0, MAX_FLOAT32)
    if number == 0.0:
        raise ArgumentError(f"{name} must be above 0, got {value!r}")
    return max(number, _MIN_FLOAT32)


def _length(name: str, value: Any, vocab_size: int) -> int:
    """A number of tokens from 1 on; -1, and llama.cpp's -2, for as many as the context holds."""
    number = check.as_int(name, value, -math.inf)
    if number < 1 and number not in (-1, -2):
        raise ArgumentError(f"{name} must be at least 1, or -1: until the context ends, got {check.digits(number)}")
    return MAX_INT32 if number < 0 else number


def _seconds(name: str, value: Any, vocab_size: int) -> float | None:
    number = check.as_float(name, value, 0.0, math.inf)
    return None if number == math.inf else min(number, MAX_FLOAT32)


_count, _count_or_all, _tokens_back = Integer(0), Integer(-1, least=0), Integer(-1)
_not_negative, _any_float, _probability = Number(0.0, MAX_FLOAT32), Number(-MAX_FLOAT32, MAX_FLOAT32), Number(0.0, 1.0)
_share = Number(0.0, 1.0, least=_MIN_FLOAT32)  # of 0: the smallest there is, which one token exceeds
_flag, _ids = unsized(check.as_bool), check.as_id_tuple


class GenerationArguments(TypedDict, total=False):
    """How Model.generate and Model.stream continue a prompt. All are optional; docs/sampling.md has the formulas.

    Names, defaults and order are llama.cpp's; None is the same as not given. Without a temperature the most probable
    token is taken: what narrows the choice then has no effect, biases, bans and penalties do.
    """

    # fmt: off
    parse_special: Annotated[Flag, Field(True, _flag,
        "Names of special tokens in a prompt's text, as </s>, are those tokens; else they are text like any other.",
        heading="Prompt", option="--no-parse-special",
        option_help="Read names of special tokens in the prompt, as </s>, as plain text.")]

    max_new_tokens: Annotated[Int, Field(128, _length,
        "Upper limit of new tokens, at least 1; -1: until the context, which prompt and answer share, ends.",
        heading="Length", option="-n --max-new-tokens", bodies="max_completion_tokens max_tokens n_predict",
        elsewhere="max_tokens max_completion_tokens max_length max_len n_predict num_predict n_tokens")]
    min_new_tokens: Annotated[Int, Field(0, _count,
        "Before so many, no end-of-text token and none of stop_ids is drawn, and no stop string looked for.",
        bodies="min_tokens", elsewhere="min_tokens min_length")]
    stop: Annotated[Texts, Field((), unsized(lambda name, value: check.as_stop_strings(value)),
        "End before the leftmost of these texts, wherever token borders fall; it may name special tokens.",
        elsewhere="stop_strings stop_sequences stop_words antiprompt reverse_prompt")]
    stop_ids: Annotated[Ids, Field((), _ids, "End at these tokens, as at the end-of-text token, without them.",
        option="--stop-id", bodies="stop_token_ids", elsewhere="eos_token_id stop_token_ids stop_tokens")]
    ignore_eos: Annotated[Flag, Field(False, _flag, "Never draw the end-of-text token.", elsewhere="skip_eos")]
    timeout: Annotated[Float, Field(None, _seconds, "End after so many seconds, those in the queue included.",
        elsewhere="max_time time_limit t_max_predict_ms")]

    temperature: Annotated[Float, Field(0.0, _not_negative,
        "How evenly tokens are drawn; 0: greedy, 1: as the model says.", heading="Chance",
        option="--temperature --temp", elsewhere="temp")]
    do_sample: Annotated[Flag, Field(None, None,
        "False: greedy whatever the temperature, True: 1 if none is given (as in transformers).", option=None,
        elsewhere="sample sampling")]
    seed: Annotated[Seeds, Field(None, unsized(check.as_seeds),
        "From 0 to 2^64-1, the same one gives the same tokens; -1, or none: a random one, which the result tells. For "
        "a list of prompts also a list.", option="-s --seed",
        option_help="The same one, the same text. Default: -1, a random one, shown at the end.",
        elsewhere="rng_seed random_seed manual_seed random_state generator")]
    dynatemp_range: Annotated[Float, Field(0.0, _not_negative,
        "Temperature +- range, the higher the less certain the model.")]
    dynatemp_exponent: Annotated[Float, Field(1.0, _not_negative, "How that depends on the entropy.",
        option="--dynatemp-exponent --dynatemp-exp", elsewhere="dynatemp_exp")]

    top_n_sigma: Annotated[Float, Field(-1.0, _any_float,
        "Logits within so many standard deviations of the largest; 0 or less: all.",
        heading="Which tokens may be drawn, in this order", option="--top-n-sigma --top-nsigma",
        elsewhere="top_nsigma")]
    top_k: Annotated[Int, Field(40, _count_or_all, "So many of the most probable tokens; 0 or -1: all.")]
    typical_p: Annotated[Float, Field(1.0, _share,
        "This share of the probability, tokens of nearly typical surprise first; 1: all, 0: one.",
        option="--typical-p --typical", elsewhere="typical")]
    top_p: Annotated[Float, Field(0.95, _share, "The smallest set with this share of the probability; 1: all, 0: one.")]
    min_p: Annotated[Float, Field(0.05, _probability, "Tokens so probable beside the most probable one; 0: all.")]
    xtc_probability: Annotated[Float, Field(0.0, _probability,
        "How often all but the least probable of the tokens above xtc_threshold are left out.")]
    xtc_threshold: Annotated[Float, Field(0.1, _probability, "Which these are; above 0.5: none.")]
    min_keep: Annotated[Int, Field(0, _count, "Tokens that typical_p, top_p, min_p and XTC leave at least.")]
    mirostat: Annotated[Int, Field(0, Integer(0, 2),
        "1 or 2: in place of all that, aim at a surprise of mirostat_tau bits.")]
    mirostat_tau: Annotated[Float, Field(5.0, _not_negative, "Bits that mirostat aims at.",
        option="--mirostat-tau --mirostat-ent")]
    mirostat_eta: Annotated[Float, Field(0.1, _not_negative, "How fast mirostat corrects.",
        option="--mirostat-eta --mirostat-lr")]

    repeat_penalty: Annotated[Float, Field(1.0, _positive,
        "Divides positive logits of recent tokens and multiplies negative ones.", heading="Repetition",
        elsewhere="penalty_repeat rep_pen")]
    repetition_penalty: Annotated[Float, Alias("repeat_penalty")]
    presence_penalty: Annotated[Float, Field(0.0, _any_float, "Subtracted from logits of recent tokens.",
        elsewhere="penalty_present")]
    frequency_penalty: Annotated[Float, Field(0.0, _any_float, "The same, for every time that they came up.",
        elsewhere="penalty_freq")]
    repeat_last_n: Annotated[Int, Field(64, _tokens_back, "How many tokens are recent, prompt included; -1: all.",
        elsewhere="penalty_last_n last_n_tokens_size")]
    openai_penalties: Annotated[Flag, Field(False, _flag,
        "Presence and frequency: of all generated tokens and none of the prompt, as OpenAI's.")]
    dry_multiplier: Annotated[Float, Field(0.0, _not_negative,
        "DRY: a token that continues a repetition of n tokens loses multiplier * base^(n - allowed length).",
        elsewhere="no_repeat_ngram_size")]
    dry_base: Annotated[Float, Field(1.75, Number(1.0, MAX_FLOAT32), "DRY: growth with the length.")]
    dry_allowed_length: Annotated[Int, Field(2, _count, "DRY: the shortest length that counts.")]
    dry_penalty_last_n: Annotated[Int, Field(-1, _tokens_back, "DRY: tokens to look back; -1: all.")]
    dry_sequence_breakers: Annotated[Breakers, Field(None, check.as_breakers,
        "DRY: repetitions do not reach across these, texts or token ids; by default newline : \" *",
        option="--dry-sequence-breaker",
        option_help="DRY: repetitions end here, by default newline : \" *; 'none' for none.")]

    logit_bias: Annotated[Biases, Field((), check.as_logit_bias,
        "By token id, what is added to its logit; -inf: never drawn.", heading="Single tokens",
        option="-l --logit-bias", option_help="Add to a logit: 17+1.5, 17-inf.",
        elsewhere="sequence_bias logits_processor")]
    banned_ids: Annotated[Ids, Field((), _ids, "Never draw these tokens.", option="--banned-id",
        elsewhere="bad_words_ids suppress_tokens bad_words")]
    bad_ids: Annotated[Ids, Alias("banned_ids")]
    allowed_ids: Annotated[Ids, Field((), check.as_allowed_ids, "Draw nothing but these tokens.", option="--allowed-id",
        bodies="allowed_token_ids", elsewhere="allowed_token_ids prefix_allowed_tokens_fn")]

    # At most one of these; docs/constrained.md.
    json_schema: Annotated[Any, Field(None, None,
        "The text is JSON of this schema: a dict, its text, a pydantic model class, or True for any JSON value.",
        heading="Form of the text (needs fixmin-cpp[grammar])", option="-j --json-schema",
        option_help="The text is JSON of this schema ({}: any).", elsewhere="guided_json response_format schema")]
    regex: Annotated[Text, Field(None, None, "The whole text matches it.", elsewhere="guided_regex")]
    grammar: Annotated[Text, Field(None, None, "The text is of this grammar, Lark as llguidance reads it or GBNF.",
        elsewhere="guided_grammar")]
    choices: Annotated[Choices, Field(None, None, "The text is one of these.", option="--choice",
        elsewhere="guided_choice choice")]

    logprobs: Annotated[Int, Field(None, Integer(0, 1024),
        "Log-probability of every generated token, and of so many of the most probable.",
        heading="Probabilities and speed",
        option_help="Log-probabilities of the tokens, and of the k most probable, in JSON.", bodies=None,
        elsewhere="top_logprobs n_probs output_scores output_logits return_dict_in_generate")]
    prompt_logprobs: Annotated[Int, Field(None, Integer(0, 1024),
        "The same for the tokens of the prompt but the first; all of it is read then.",
        option_help="The same for the prompt.", bodies=None, elsewhere="echo")]
    prompt_lookup_num_tokens: Annotated[Int, Field(0, Integer(0, 31),
        "Guess up to so many tokens from how the text went on before: the same result, sooner where it repeats itself.",
        elsewhere="num_assistant_tokens n_draft draft")]
    prefix_cache: Annotated[Flag, Field(True, _flag, "Read only what no earlier prompt began with, and remember it.",
        option="--no-prefix-cache", option_help="Read the prompt for every completion.", bodies="cache_prompt",
        elsewhere="cache_prompt use_cache")]
    # fmt: on


FIELDS: Mapping[str, Field] = fields_of(GenerationArguments)
ALIASES: Mapping[str, str] = aliases_of(GenerationArguments)  # other names of arguments
# Further ones in bodies of HTTP requests. Of two for the same argument the first wins.
BODY_ALIASES: Mapping[str, str] = {other: name for name, row in FIELDS.items() for other in (row.bodies or "").split()}
FORMS = ("json_schema", "regex", "grammar", "choices")  # checked together
GenerationArguments.__doc__ = f"{str(GenerationArguments.__doc__).rstrip()}\n\n{summary(FIELDS)}"
