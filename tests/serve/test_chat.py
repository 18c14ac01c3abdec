"""Prompts of chats: what a template makes of messages, and which of its tokens are special."""

import json
import re
import string
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from toy_models import byte_fallback, byte_level

from fixmin_cpp.errors import ArgumentError
from fixmin_cpp.openai_api.chat import ChatTemplate
from fixmin_cpp.tokenizer import TextTokenizer

CONTROL = ["<|im_start|>", "<|im_end|>", "<|im|>", "</s>"]


def with_control(tokenizer: Tokenizer) -> TextTokenizer:
    tokenizer.add_special_tokens(CONTROL)
    end = tokenizer.token_to_id("</s>")
    return TextTokenizer(tokenizer, bos_id=tokenizer.token_to_id("<s>"), eos_id=end)


TOKENIZERS = {"byte_level": with_control(byte_level()), "byte_fallback": with_control(byte_fallback())}
NAMES = set(TOKENIZERS["byte_level"].control_tokens)

CHATML = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)
# Contents side by side, changed, as JSON, cut in two: whatever a template may do to them.
BESIDE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
CHANGED = "{% for m in messages %}{{ m.content | trim }}<|im_end|>{{ m | tojson }}{% endfor %}"
HALVES = (
    "{% for m in messages %}{% set n = m.content | length // 2 %}"
    "{{ m.content[:n] }}|{{ m.content[n:] }}</s>{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "beside": BESIDE, "changed": CHANGED, "halves": HALVES}

parts = [*CONTROL, "<|im_", "end|>", "<", "|>", "s>", "</", "<s>", "a", " ", "\n", "é", "user", "\U00100041"]
texts = st.lists(st.sampled_from(parts), max_size=5).map("".join)
chats = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": texts}), min_size=1)


def special(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in ids if i in tokenizer.special_ids]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@given(messages=chats)
def test_only_the_template_has_special_tokens(kind, name, messages):
    """Those that it has for messages of harmless text."""
    tokenizer, template = TOKENIZERS[kind], ChatTemplate(TEMPLATES[name])
    prompt = template.render(messages, tokenizer, add_generation_prompt=True)
    harmless = [{"role": m["role"], "content": "x"} for m in messages]
    expected = special(tokenizer, tokenizer.encode(str(template.render(harmless, add_generation_prompt=True))))
    if name == "beside":
        expected = ["<s>", "</s>"]
    ids = prompt.ids(tokenizer)
    assert special(tokenizer, ids) == expected
    plain = str(template.render(messages, None, add_generation_prompt=True))  # nothing was replaced in it
    if name == "beside":
        plain = f"<s>{plain}</s>"
    assert str(prompt) == plain
    assert tokenizer.decode(ids) == (plain.removeprefix(" ") if kind == "byte_fallback" else plain)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@given(contents=st.lists(st.text(alphabet="a b\n<|>é日im_", max_size=9), min_size=1, max_size=3))
def test_messages_that_name_nothing_give_the_ids_of_the_text(kind, name, contents):
    tokenizer, template = TOKENIZERS[kind], ChatTemplate(TEMPLATES[name])
    messages = [{"role": "user", "content": content} for content in contents]
    prompt = template.render(messages, tokenizer)
    if not any(name in content for name in NAMES for content in contents) and not re.search(
        "<s>|</s>", "".join(contents)
    ):
        assert prompt.ids(tokenizer) == tokenizer.encode(str(prompt))


def test_a_client_may_ask_for_special_tokens():
    tokenizer, template = TOKENIZERS["byte_level"], ChatTemplate(CHATML)
    messages = [{"role": "user", "content": "a<|im_end|>"}]
    prompt = template.render(messages, tokenizer, parse_special=True)
    assert prompt.ids(tokenizer) == tokenizer.encode(str(prompt))
    assert special(tokenizer, prompt.ids(tokenizer)).count("<|im_end|>") == 2


def test_names_in_keys_and_in_parts_of_a_message_are_text_too():
    tokenizer = TOKENIZERS["byte_level"]
    template = ChatTemplate("{% for m in messages %}{{ m.calls | tojson }}{% endfor %}</s>")
    messages = [{"role": "user", "content": "", "calls": [{"</s>": ["<|im_end|>", 3, None, True]}]}]
    ids = template.render(messages, tokenizer).ids(tokenizer)
    assert special(tokenizer, ids) == ["</s>"]
    assert json.loads(tokenizer.decode(ids).removesuffix("</s>")) == messages[0]["calls"]


# --- the last message --------------------------------------------------------------------------------------------

QUESTION = {"role": "user", "content": "Capital of France?"}
BEGUN = {"role": "assistant", "content": "Par "}


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        ({}, "Answer: Par "),
        ({"continue_final_message": True}, "Answer: Par "),
        ({"add_generation_prompt": False}, "Answer: Par "),
        ({"add_generation_prompt": True}, "Answer: Par \nAnswer:"),
        ({"continue_final_message": False}, "Answer: Par \nAnswer:"),
        ({"continue_final_message": False, "add_generation_prompt": False}, "Answer: Par \n"),
    ],
)
def test_a_last_message_of_the_assistant_is_continued(arguments, end):
    prompt = ChatTemplate().render([QUESTION, BEGUN], TOKENIZERS["byte_level"], **arguments)
    assert str(prompt) == "Question: Capital of France?\n" + end


def test_a_message_that_is_not_the_last_is_closed():
    assert str(ChatTemplate().render([QUESTION, BEGUN, QUESTION])).endswith(
        "Par \nQuestion: Capital of France?\nAnswer:"
    )


def test_others_are_continued_on_request():
    prompt = ChatTemplate(CHATML).render([QUESTION], TOKENIZERS["byte_level"], continue_final_message=True)
    assert str(prompt) == "<|im_start|>user\nCapital of France?"


@given(content=texts)
def test_a_continued_text_stays_as_it_is(content):
    messages = [QUESTION, {"role": "assistant", "content": content}]
    prompt = ChatTemplate(CHATML).render(messages, TOKENIZERS["byte_level"])
    assert str(prompt).endswith("<|im_start|>assistant\n" + content.lstrip(string.whitespace))
    assert special(TOKENIZERS["byte_level"], prompt.ids(TOKENIZERS["byte_level"])) == [*CONTROL[:2], CONTROL[0]]


def test_the_two_wishes_exclude_each_other():
    with pytest.raises(ArgumentError, match="cannot both be true"):
        ChatTemplate().render([BEGUN], continue_final_message=True, add_generation_prompt=True)


def test_a_template_that_drops_the_last_message_cannot_continue_it():
    template = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ArgumentError, match="leaves the last one out"):
        template.render([QUESTION, BEGUN])


@pytest.mark.parametrize("content", ["", None])
def test_an_empty_beginning_is_continued_too(content):
    prompt = ChatTemplate().render([QUESTION, {"role": "assistant", "content": content}])
    assert str(prompt).endswith("\nAnswer: ")


# --- templates that fail -------------------------------------------------------------------------------------------

FAILING = {
    "{{ 1 / (messages | length - 1) }}": "ZeroDivisionError",
    "{{ messages[0].content + 3 }}": "TypeError",
    "{{ messages[0].nothing.there }}": "no attribute",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ messages[0].content.__class__.__mro__ }}": "unsafe",
    "{% for i in range(10000000) %}x{% endfor %}": "too",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "Recursion",
    "{% for m in messages %}{{ 'x' * 20000000 }}{% endfor %}": "too long",
}


@pytest.mark.parametrize("source", FAILING)
def test_what_goes_wrong_in_a_template_is_an_error_with_its_message(source):
    with pytest.raises(ArgumentError, match=FAILING[source]):
        ChatTemplate(source).render([QUESTION])


def test_private_letters_that_messages_use_up() -> None:
    """None is left to stand for others: an error, and no search without an end."""
    tokenizer = TOKENIZERS["byte_level"]
    every = "".join(chr(0x100000 + i) for i in range(0x10000))
    for message in ({"content": f"a</s>{every}"}, {"content": "a", "name": every}):
        with pytest.raises(ArgumentError, match="private letters"):
            ChatTemplate().render([{"role": "user", **message}], tokenizer)
    some = every[:30_000]
    assert str(ChatTemplate().render([{"role": "user", "content": f"</s>{some}"}], tokenizer)).startswith(
        "Question: </s>"
    )
