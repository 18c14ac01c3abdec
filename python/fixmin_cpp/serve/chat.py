"""Messages of a chat as one prompt, by a template of the operator or a plain one."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ArgumentError

__all__ = ["PLAIN_STOP", "PLAIN_TEMPLATE", "ChatTemplate"]

# For base models, which know no roles: the form of the prompts on the published cards.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "assistant" %}Answer: {{ message.content }}
{% elif message.role == "user" %}Question: {{ message.content }}
{% else %}{{ message.content }}
{% endif -%}
{%- endfor -%}
Answer:"""
PLAIN_STOP = ("\nQuestion:",)

_MAX_PROMPT = 1 << 24  # characters that a template may make of messages


class ChatTemplate:
    """A Jinja template in a sandbox. It comes from the operator: one from a model file or a request is never run.

    Raises:
        ArgumentError: it is no template.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = PLAIN_TEMPLATE if source is None else source
        self.stop = PLAIN_STOP if source is None else ()
        environment = ImmutableSandboxedEnvironment(trim_blocks=False, lstrip_blocks=False)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(self.source)
        except TemplateError as error:
            raise ArgumentError(f"chat_template is no Jinja template: {error}") from None

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt. ArgumentError: the template refuses these messages."""
        try:
            parts, n = [], 0
            for part in self._template.generate(messages=list(messages), add_generation_prompt=True):
                parts.append(part)
                n += len(part)
                if n > _MAX_PROMPT:
                    raise ArgumentError("messages make a prompt that is too long")
        except TemplateError as error:
            raise ArgumentError(f"messages do not fit the chat template: {error}") from None
        return "".join(parts)


def _refuse(message: str) -> None:
    raise ArgumentError(f"messages do not fit the chat template: {message}")
