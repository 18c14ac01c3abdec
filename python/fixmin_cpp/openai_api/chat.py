"""Messages of a chat as one prompt, by a template of the operator or a plain one.

Special tokens are for the template: in the text of messages their names are text. So that a message cannot end itself
and begin one of the system, letters of such names are replaced before the template sees them, by others that no text
uses, and read as what they are when the prompt is cut into tokens.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ArgumentError, raised_by_signal_handler
from ..tokenizer import TextTokenizer
from .request import ChatRequest

__all__ = ["PLAIN_STOP", "PLAIN_TEMPLATE", "ChatPrompt", "ChatTemplate", "strings"]

# For base models, which know no roles: the form of the prompts on the published cards.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "assistant" %}Answer: {{ message.content }}
{% elif message.role == "user" %}Question: {{ message.content }}
{% else %}{{ message.content }}
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}Answer:{% endif -%}"""
PLAIN_STOP = ("\nQuestion:",)

_MAX_PROMPT = 1 << 24  # characters that a template may make of messages
_PRIVATE = re.compile("[\U00100000-\U0010ffff]")


@dataclass(frozen=True)
class ChatPrompt:
    """What a template has made of messages."""

    text: str
    letters: Mapping[int, str] = field(default_factory=dict)  # code points of `text` that stand for other letters

    def __str__(self) -> str:
        """The prompt as one reads it."""
        return self.text.translate(self.letters)

    def ids(self, tokenizer: TextTokenizer) -> list[int]:
        """Its tokens: those of the text, special ones only where the template has put them."""
        return tokenizer.encode_template(self.text, self.letters)


class ChatTemplate:
    """A Jinja template in a sandbox. It comes from the operator: one from a model file or a request is never run.

    It is given what transformers gives: messages, add_generation_prompt, bos_token, eos_token, raise_exception(), and
    the filter tojson.

    Raises:
        ArgumentError: it is no template.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = PLAIN_TEMPLATE if source is None else source
        self.stop = PLAIN_STOP if source is None else ()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=False, lstrip_blocks=False, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(self.source)
        except TemplateError as error:
            raise ArgumentError(f"chat_template is no Jinja template: {error}") from None

    def prompt_of(self, request: ChatRequest, tokenizer: TextTokenizer) -> list[int]:
        """The ids of a request's prompt. Raises ArgumentError like render()."""
        prompt = self.render(
            request.messages,
            tokenizer,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            parse_special=request.arguments.get("parse_special") is True,
        )
        return prompt.ids(tokenizer)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: TextTokenizer | None = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        parse_special: bool = False,
    ) -> ChatPrompt:
        """The prompt.

        Args:
            messages: each with `role`, `content` and whatever else the template reads; at least one.
            tokenizer: whose special tokens messages must not name.
            add_generation_prompt: whether the beginning of an answer follows. None: unless a message is continued.
            continue_final_message: whether the prompt ends with the last message's text, which the model goes on with.
                None: if it is the assistant's and add_generation_prompt is not True.
            parse_special: whether special tokens named in messages are such.

        Raises:
            ArgumentError: the template refuses these messages or cannot continue the last one.
        """
        goes_on = continue_final_message
        if goes_on is None:
            goes_on = add_generation_prompt is not True and messages[-1].get("role") == "assistant"
        if goes_on and add_generation_prompt:
            raise ArgumentError("add_generation_prompt and continue_final_message cannot both be true")
        begins = not goes_on if add_generation_prompt is None else add_generation_prompt
        names = [] if parse_special or tokenizer is None else list(tokenizer.control_tokens)
        letters = _Letters(names, [self.source, *strings(messages)])
        guarded: list[Any] = [letters.guard(message) for message in messages]
        end = letters.unused()
        if goes_on:
            guarded[-1] = {**guarded[-1], "content": f"{guarded[-1].get('content') or ''}{end}"}
        ends = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token} if tokenizer is not None else {}
        text = self._render(messages=guarded, add_generation_prompt=begins, **ends)
        if goes_on:
            if end not in text:
                raise ArgumentError("messages: the chat template leaves the last one out, so it cannot be continued")
            text = text[: text.rindex(end)].replace(end, "")
        return ChatPrompt(text, letters.meaning)

    def _render(self, **variables: Any) -> str:
        parts, n = [], 0
        try:
            for part in self._template.generate(**variables):
                parts.append(part)
                n += len(part)
                if n > _MAX_PROMPT:
                    raise ArgumentError("messages make a prompt that is too long")
        except ArgumentError:
            raise
        except TemplateError as error:
            raise ArgumentError(f"messages do not fit the chat template: {error}") from None
        except Exception as error:  # a template is a program: it may add None to a str, divide by 0, ...
            if raised_by_signal_handler(error):
                raise
            kind = type(error).__name__
            raise ArgumentError(f"messages do not fit the chat template: {kind}: {error}") from None
        return "".join(parts)


class _Letters:
    """Private letters in place of those of special tokens' names. One for one, so that a template which cuts texts or
    measures them does what it would do.

    Args:
        names: of special tokens.
        texts: what will stand in the prompt; its letters are not used.
    """

    def __init__(self, names: Sequence[str], texts: Iterable[str]) -> None:
        self._names = names
        self._used = {letter for text in texts for letter in _PRIVATE.findall(text)}
        self._of = {ord(letter): self.unused() for letter in dict.fromkeys("".join(names))}
        self._longest = max(map(len, names), default=0)
        # Parts that, beside a part of another text, could make a name.
        self._beginnings = {name[:n] for name in names for n in range(1, len(name))}
        self._ends = {name[n:] for name in names for n in range(1, len(name))}
        self.hidden = False

    @property
    def meaning(self) -> dict[int, str]:
        """What the letters stand for, if some were needed."""
        return {ord(private): chr(letter) for letter, private in self._of.items()} if self.hidden else {}

    def unused(self) -> str:
        """A letter of plane 16, which means nothing in any text. Nobody can know it, and so write it himself."""
        for _ in range(100):
            letter = chr(0x100000 + secrets.randbelow(0xFFFE))
            if letter not in self._used:
                self._used.add(letter)
                return letter
        raise ArgumentError("messages use most of the private letters from U+100000 on: leave them out")

    def guard(self, value: Any) -> Any:
        """`value` with no special token's name in its strings."""
        if isinstance(value, str):
            return self._guard_text(value)
        if isinstance(value, Mapping):
            return {self.guard(key): self.guard(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.guard(one) for one in value]
        return value

    def _guard_text(self, text: str) -> str:
        hide = bytearray(len(text))
        for name in self._names:
            at = text.find(name)
            while at >= 0:
                hide[at : at + len(name)] = b"\1" * len(name)
                at = text.find(name, at + 1)
        core = text.strip()  # a template may do that
        begin = text.find(core)
        end = begin + len(core)
        for n in range(1, min(self._longest, len(core) + 1)):
            if core[-n:] in self._beginnings:
                hide[end - n : end] = b"\1" * n
            if core[:n] in self._ends:
                hide[begin : begin + n] = b"\1" * n
        parts, done = [], 0
        for run in re.finditer(b"\1+", hide):
            parts += [text[done : run.start()], text[run.start() : run.end()].translate(self._of)]
            done = run.end()
        self.hidden = self.hidden or bool(parts)
        return "".join(parts) + text[done:]


def strings(value: Any) -> Iterator[str]:
    """All that are in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from strings(key)
            yield from strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings(one)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """As in transformers: characters as they are, not as escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> None:
    raise ArgumentError(f"messages do not fit the chat template: {message}")
