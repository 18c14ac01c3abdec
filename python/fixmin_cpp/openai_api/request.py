"""Bodies of requests as what they ask of Model.generate. Ranges are checked where that checks its arguments."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..arguments import as_bool, as_int, as_stop_strings, split_prompts
from ..errors import ArgumentError, ArgumentTypeError
from .fields import ALIASES, ARGUMENTS, OF_CHATS, OF_COMPLETIONS, FieldError, as_arguments, asked, part, shown

__all__ = ["ChatRequest", "CompletionRequest", "GenerationRequest", "prompts_in"]

_MAX_ROLE = 64  # characters


class GenerationRequest(ABC):
    """What completions and chats have in common. `fields`: those of the body that ask for something.

    Args:
        body: the JSON object.
        streams: whether an answer can be a stream of events.

    Raises:
        ArgumentError: a field is wrong as far as that is seen without a model. refusal() says which.
    """

    known: ClassVar[frozenset[str]]
    # What OpenAI's interface means when it does not say otherwise: the model's own distribution.
    usual: ClassVar[Mapping[str, Any]] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    prompt_field: ClassVar[str]
    logprobs_field: ClassVar[str]  # that says how many of the most probable tokens are wanted
    only_prompt = False  # whether what is generated is not part of the answer

    def __init__(self, body: Mapping[str, Any], *, streams: bool = True) -> None:
        self.fields = asked(body, self.known)
        self.n = self._count("n") or 1
        self.best_of = self._count("best_of")
        self.return_token_ids = self._flag("return_token_ids") or False
        self.stream = self._flag("stream") or False
        if self.stream and not streams:
            raise FieldError("stream", ": not supported: only a server sends an answer piece by piece")
        self.include_usage = self._read_stream_options()
        self.arguments = as_arguments({name: value for name, value in self.fields.items() if name in ARGUMENTS})
        self.logprobs = self._read_logprobs()  # of so many tokens beside each; None: none are wanted

    def resolved(self, before: Mapping[str, Any], stop: Sequence[str] = ()) -> dict[str, Any]:
        """Arguments of Model.generate.

        Args:
            before: what counts where the body says nothing, before OpenAI's defaults.
            stop: more stop strings.
        """
        arguments = {**self.usual, **before, **self.arguments}
        if self.logprobs is not None:
            arguments["logprobs"] = self.logprobs
        if stop:
            arguments["stop"] = [*as_stop_strings(arguments.get("stop")), *stop]
        return arguments

    @property
    def renamed(self) -> dict[str, str]:
        """The fields by the names of the arguments that they are."""
        # Of several the first one counts, as in as_arguments().
        renamed = {name: field for field, name in reversed(list(ALIASES.items())) if field in self.fields}
        if "response_format" in self.fields and "json_schema" not in self.fields:
            renamed["json_schema"] = "response_format"
        return renamed

    def _count(self, name: str, low: int = 1) -> int | None:
        return as_int(name, self.fields[name], low) if name in self.fields else None

    def _flag(self, name: str) -> bool | None:
        return as_bool(name, self.fields[name]) if name in self.fields else None

    def _read_stream_options(self) -> bool:
        if "stream_options" not in self.fields:
            return False
        given = part(
            "stream_options",
            self.fields["stream_options"],
            ("include_usage", "include_obfuscation", "continuous_usage_stats"),
        )
        flags = {name: as_bool(f"stream_options.{name}", value) for name, value in given.items()}
        if flags.get("continuous_usage_stats"):
            raise ArgumentError("stream_options.continuous_usage_stats is not supported: it must be false")
        if not self.stream:
            raise ArgumentError("stream_options is for answers that are streamed")
        return flags.get("include_usage", False)

    @abstractmethod
    def _read_logprobs(self) -> int | None: ...


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt`: as it came, `prompts`: each of those in it, text or ids."""

    known = OF_COMPLETIONS
    usual: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 16, **GenerationRequest.usual}
    prompt_field = "prompt"
    logprobs_field = "logprobs"

    def __init__(self, body: Mapping[str, Any], *, streams: bool = True) -> None:
        super().__init__(body, streams=streams)
        if "prompt" not in self.fields:
            raise ArgumentError("prompt is missing")
        self.prompt = self.fields["prompt"]
        self.prompts = prompts_in("prompt", self.prompt)[0]
        self.echo = self._flag("echo") or False
        if self.stream and self.best_of is not None and self.best_of > self.n:
            raise ArgumentError("best_of cannot be streamed: which ones are the best is known at the end")
        # OpenAI's way to ask for the probabilities of a prompt: echo it and generate nothing. One token is generated.
        n_tokens = self.arguments.get("max_new_tokens")
        self.only_prompt = type(n_tokens) is int and n_tokens == 0
        if self.only_prompt:
            if not self.echo:
                raise ArgumentError("max_tokens must be above 0, but with echo")
            self.arguments |= {"max_new_tokens": 1, "min_new_tokens": 0}
        if self.echo and self.logprobs is not None:
            self.arguments["prompt_logprobs"] = self.logprobs

    def _read_logprobs(self) -> int | None:
        given = self.fields.get("logprobs")
        if given is True:
            raise FieldError(
                "logprobs", " must be a number here, of the most probable tokens (true is for chats), got True"
            )
        # `false` is what clients send that know only chat's field.
        return None if given is None or given is False else as_int("logprobs", given, 0)


def prompts_in(name: str, given: Any) -> tuple[list[Any], bool]:
    """The texts or ids in a field, and whether they came as a list. ArgumentError if it holds none, or objects."""
    if isinstance(given, dict) or (isinstance(given, list) and dict in set(map(type, given))):  # of 200,000 ids too
        raise ArgumentTypeError(f"{name} must be a text, token ids, or a list of those, got an object")
    return split_prompts(given, name)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. `messages`: for a template, each with its `content` as one text."""

    known = OF_CHATS
    usual: ClassVar[Mapping[str, Any]] = {"max_new_tokens": -1, **GenerationRequest.usual}
    prompt_field = "messages"
    logprobs_field = "top_logprobs"

    def __init__(self, body: Mapping[str, Any], *, streams: bool = True) -> None:
        super().__init__(body, streams=streams)
        if "messages" not in self.fields:
            raise ArgumentError("messages is missing")
        self.messages = _messages(self.fields["messages"])
        self.add_generation_prompt = self._flag("add_generation_prompt")
        self.continue_final_message = self._flag("continue_final_message")

    @property
    def renamed(self) -> dict[str, str]:
        """See GenerationRequest."""
        return {**super().renamed, "logprobs": "top_logprobs"} if "top_logprobs" in self.fields else super().renamed

    def _read_logprobs(self) -> int | None:
        top = self._count("top_logprobs", 0) or 0
        if self._flag("logprobs"):
            return top
        if top:
            raise ArgumentError("top_logprobs needs logprobs to be true")
        return None


def _messages(given: Any) -> list[dict[str, Any]]:
    """What else a client puts into a message (name, refusal, ...) is for the template."""
    if not isinstance(given, list):
        raise ArgumentTypeError(f"messages must be a list, got {type(given).__name__}")
    if not given:
        raise ArgumentError("messages is empty")
    messages = []
    for i, message in enumerate(given):
        place = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ArgumentTypeError(f"{place} must be an object, got {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or len(role) > _MAX_ROLE:
            raise ArgumentError(f"{place}.role must be a text of at most {_MAX_ROLE} characters")
        messages.append({**message, "content": _content(f"{place}.content", message.get("content"))})
    return messages


def _content(place: str, given: Any) -> str:
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, list):
        raise ArgumentTypeError(f"{place} must be a text or a list of parts, got {type(given).__name__}")
    texts = []
    for i, one in enumerate(given):
        kind, text = (one.get("type"), one.get("text")) if isinstance(one, Mapping) else (None, None)
        if isinstance(kind, str) and kind != "text":
            raise ArgumentError(f"{place}[{i}]: {shown(kind)} is not supported: the model reads texts")
        if kind != "text" or not isinstance(text, str):
            what = "text must be a text" if kind == "text" else 'type must be "text"'
            raise ArgumentTypeError(f"{place}[{i}].{what}")
        texts.append(text)
    return "".join(texts)
