"""The fields of OpenAI's interface and of those that copied it, and what they mean as arguments of Model.generate."""

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ArgumentError, ArgumentTypeError
from ..sampling_fields import ALIASES as OTHER_NAMES
from ..sampling_fields import BODY_ALIASES, FIELDS, Int

__all__ = ["ALIASES", "ARGUMENTS", "OF_CHATS", "OF_COMPLETIONS", "FieldError", "as_arguments", "asked", "part", "shown"]

_MAX_SEED = 2**53 - 1  # other readers of JSON hold numbers as doubles

# Fields with another name than the argument, those that win before those that they win over.
ALIASES: Mapping[str, str] = {**BODY_ALIASES, **OTHER_NAMES}
_OPENAIS = ("max_completion_tokens", "max_tokens")  # of which OpenAI's clients send both, the first one being the newer

# The fields that there are: of how to generate, and of the endpoints.
ARGUMENTS = frozenset(name for name, row in FIELDS.items() if row.bodies is not None) | {*ALIASES, "response_format"}
_OF_BOTH = ARGUMENTS | {"model", "n", "stream", "stream_options", "return_token_ids", "logprobs"}
OF_COMPLETIONS = _OF_BOTH | {"prompt", "best_of", "echo"}
OF_CHATS = _OF_BOTH | {"messages", "top_logprobs", "add_generation_prompt", "continue_final_message"}

_INTEGERS = frozenset(name for name, row in FIELDS.items() if row.kind == Int)
_INTEGERS |= {"seed", "n", "best_of", "top_logprobs"}

# Fields of the clients of OpenAI, vLLM, SGLang, llama-server and TGI that are not here, or not at this endpoint, with
# the values that ask for nothing. null never asks for anything. First what is never looked at:
_IGNORED = """
    metadata user safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options service_tier
    reasoning_effort reasoning verbosity request_id rid priority cache_salt guided_decoding_backend id_slot n_keep
"""
_ONLY_NULL = """
    audio prediction web_search_options moderation chat_template kv_transfer_params structured_outputs prompt_logprobs
    prompt_embeds thinking_token_budget guided_json guided_regex guided_choice guided_grammar guided_whitespace_pattern
    lora_path ebnf stop_regex session_params custom_params custom_logit_processor samplers chat_format truncate
    adapter_id guideline
"""
_ONLY_FALSE = """
    store include_stop_str_in_output no_stop_trim continue_final_message add_special_tokens use_beam_search
    early_stopping return_tokens_as_token_ids return_hidden_states post_sampling_probs timings_per_token return_progress
    return_tokens penalize_nl grammar_lazy backend_sampling thinking_forced_open details decoder_input_details
    return_full_text watermark echo
"""
_ANY_FLAG = """
    parallel_tool_calls spaces_between_special_tokens include_reasoning separate_reasoning stream_reasoning
    parse_tool_calls
"""
_EMPTY_LIST = "tools functions bad_words documents logits_processors image_data lora response_fields grammar_triggers"
_NO_OPS: Mapping[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(_IGNORED.split(), None),
    **dict.fromkeys(_ONLY_NULL.split(), ()),
    **dict.fromkeys(_ONLY_FALSE.split(), (False,)),
    **dict.fromkeys(_ANY_FLAG.split(), (True, False)),
    **dict.fromkeys((*_EMPTY_LIST.split(), "preserved_tokens"), ([],)),
    **dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs", "vllm_xargs"), ({},)),
    **dict.fromkeys(("skip_special_tokens", "detokenize", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("n_probs", "n_discard", "n_indent", "n_cache_reuse", "top_n_tokens", "top_logprobs"), (0,)),
    **dict.fromkeys(("length_penalty", "tfs_z"), (1, 1.0)),
    **dict.fromkeys(("tool_choice", "function_call", "reasoning_format"), ("none", "auto")),
    "modalities": (["text"],),
    "truncate_prompt_tokens": (-1,),
    "t_max_predict_ms": (0, -1),
    "best_of": (1,),
    "suffix": ("",),
}
_WHY = {
    **dict.fromkeys(("tools", "functions", "tool_choice", "function_call"), "this model calls no functions"),
    **dict.fromkeys(("modalities", "audio"), "there is only text"),
    "store": "nothing is kept",
    "prompt_logprobs": "echo and logprobs give them",
    "suffix": "the model continues texts, it does not fill in",
}


class FieldError(ArgumentError):
    """What is wrong with a field, as a sentence that begins with its name."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"{field}{what}")
        self.field = field


def asked(body: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The fields of `body` that ask for something, all of them `known`. FieldError for the first one that is wrong.

    As everywhere in OpenAI's interface, null stands for a field that is not given.
    """
    found = {}
    for name, value in body.items():
        if name in known:
            if value is not None:
                found[name] = _whole(name, value)
        elif name not in _NO_OPS:
            raise FieldError(shown(name), f": there is no such field{_similar(name, known)}")
        elif not _asks_nothing(name, value):
            why = f": {_WHY[name]}" if name in _WHY else ""
            raise FieldError(name, f": not supported{why}")
    return found


def shown(text: str) -> str:
    """The beginning of what a client wrote, for a message, which cannot hold half of a surrogate pair."""
    return text[:64].encode(errors="backslashreplace").decode()


def _asks_nothing(name: str, value: Any) -> bool:
    values = _NO_OPS[name]
    # True is no number here.
    return value is None or values is None or any(type(value) is type(v) and value == v for v in values)


def _similar(name: str, known: Collection[str]) -> str:
    if len(name) > 64:
        return ""
    similar = difflib.get_close_matches(name, [*known, *_NO_OPS], 1)
    return f": did you mean {similar[0]!r}?" if similar else ""


def as_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of Model.generate for ARGUMENTS, none of them None. What they say is checked only as far as it changes.

    Raises:
        ArgumentError: two fields say different things, or one cannot be read.
    """
    given = dict(fields)
    if "response_format" in given:
        schema = _schema_of(given.pop("response_format"))
        if schema is not None:
            if "json_schema" in given:
                raise ArgumentError("response_format and json_schema are the same: give one")
            given["json_schema"] = schema
    if isinstance(given.get("dry_sequence_breakers"), str):
        given["dry_sequence_breakers"] = _breakers(given["dry_sequence_breakers"])
    names: dict[str, str] = {}  # under which a client gave what is not called so here
    for field, name in ALIASES.items():
        if field not in given:
            continue
        value = given.pop(field)
        if name in given and given[name] != value and not (field == _OPENAIS[1] and _OPENAIS[0] in fields):
            raise ArgumentError(f"{field} and {names.get(name, name)} are the same: give one")
        given.setdefault(name, value)
        names.setdefault(name, field)
    if type(given.get("top_k")) is int and given["top_k"] < 0:
        given["top_k"] = 0  # all, as in vLLM and llama.cpp
    if "seed" in given:
        _set_seed(given)
    # Under llama.cpp's name for the window the penalties mean what they mean there.
    given.setdefault("openai_penalties", "repeat_last_n" not in given)
    return given


def _whole(name: str, value: Any) -> Any:
    """JSON's 16.0 is an integer too."""
    is_whole = isinstance(value, float) and value.is_integer() and ALIASES.get(name, name) in _INTEGERS
    return int(value) if is_whole else value


def _breakers(text: str) -> list[Any]:
    """dry_sequence_breakers as some clients of llama-server's send them: the list as JSON text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ArgumentError("dry_sequence_breakers must be a list of texts or token ids, or such a list as JSON text")
    return found


def _schema_of(response_format: Any) -> Any:
    """The JSON schema that response_format asks for, OpenAI's or llama-server's; None: any text will do."""
    form = part("response_format", response_format, ("type", "json_schema", "schema"))
    inner = part(
        "response_format.json_schema", form.get("json_schema", {}), ("name", "description", "schema", "strict")
    )
    kind, schema = form.get("type"), form.get("schema", inner.get("schema"))
    if kind not in ("text", "json_object", "json_schema"):
        raise ArgumentError(f"response_format.type must be text, json_object or json_schema, got {kind!r:.60}")
    if schema is not None and not isinstance(schema, Mapping | bool):
        raise ArgumentTypeError(f"response_format's schema must be an object, got {schema!r:.60}")
    if "schema" in form and "schema" in inner:
        raise ArgumentError("response_format.schema and response_format.json_schema.schema are the same: give one")
    if kind == "text" and schema is not None:
        raise ArgumentError("response_format has a schema, but its type is 'text': say 'json_schema'")
    if kind == "json_schema" and schema is None:
        raise ArgumentError("response_format.json_schema.schema is missing")
    return {"type": "object"} if kind == "json_object" and schema is None else schema


def part(name: str, given: Any, known: Collection[str]) -> dict[str, Any]:
    """An object of a request without the fields that are null."""
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(f"{name} must be an object, got {given!r:.60}")
    part = {field: value for field, value in given.items() if value is not None}
    for field in part:
        if field not in known:
            raise ArgumentError(f"{name} has no field {field!r:.60}{_similar(field, known)}")
    return part


def _set_seed(given: dict[str, Any]) -> None:
    seed = given["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ArgumentTypeError(f"seed must be an integer, got {seed!r:.60}")
    if not -(2**63) <= seed < 2**64:
        raise ArgumentError(f"seed must be between {-(2**63)} and {2**64 - 1}, got {seed}")
    if seed == -1:
        del given["seed"]  # a random one, as in llama.cpp and vLLM
    else:
        seed %= 2**64
        given["seed"] = seed if seed <= _MAX_SEED else (seed ^ seed >> 53) & _MAX_SEED  # reported, and gives the same
