"""The playground in a real browser (Debian's chromium), against a real `fixmin serve`.

What the page shows is compared with what the API answers to another client, and codes with NumPy's product over the
file's own matrix. Every page is watched: an error on the console or a request to another origin fails its test.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from servers import proxy, serving
from tokenizers import Tokenizer
from toy_models import concatenating, write_model

pytest.importorskip("playwright")

from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.external,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; on Debian: apt-get install chromium"),
]

FRANCE = "Question: What is the capital of France?\nAnswer:"
CAPITAL = "Question: What is"  # the demo goes on with a question and, on the next line, an answer
MARKUP = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script>&amp;'

Start = Callable[..., contextlib.AbstractContextManager[Any]]
Open = Callable[..., Page]


# --- a watched browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Chromium's sandbox does not work for root.
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the playground of a server.

    `refused`: statuses that the test provokes (the browser logs each). `fresh`: with the story that a first look shows;
    else as in a tab that has been there before.
    """
    contexts, problems = [], []

    def open_(
        server: Any, refused: tuple[str, ...] = (), ready: bool = True, fresh: bool = False, **options: Any
    ) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        if not fresh:
            context.add_init_script("sessionStorage['fixmin-page'] ??= '{}'")
        page = context.new_page()
        page.set_default_timeout(20_000)

        def on_console(message: Any) -> None:
            if message.type in ("error", "warning") and not any(text in message.text for text in refused):
                problems.append(message.text)

        page.on("console", on_console)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(server.url + "/") or problems.append(request.url))
        page.goto(server.url)
        if ready:
            expect(page.locator("#model")).not_to_be_empty()
        return page

    expect.set_options(timeout=20_000)
    yield open_
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(open_page: Open, demo_server: Any) -> Page:
    return open_page(demo_server)


def generate(page: Page, prompt: str, **settings: Any) -> None:
    """Fills in and starts; `settings` by the ids of their fields, with _ for -. Greedy without a temperature."""
    page.fill("#prompt", prompt)
    page.evaluate("document.getElementById('settings').open = true")
    for name, value in {"temperature": 0, "max_tokens": 12, "seed": 7, **settings}.items():
        page.fill("#" + name.replace("_", "-"), str(value))
    page.click("#generate")


def wait_for_end(page: Page, finish: str = "") -> None:
    """Waits; the end must be `finish`, or one that the model or max_tokens made."""
    expect(page.locator("#generate")).to_be_enabled()
    usual = re.compile("^(max tokens reached|end of the text, or a stop string)$")
    expect(page.locator("#finish")).to_have_text(finish or usual)


def text_of(page: Page, selector: str) -> str:
    return page.locator(selector).text_content() or ""


# --- the API as another client sees it --------------------------------------------------------------------------------


def complete(server: Any, prompt: str, **settings: Any) -> dict[str, Any]:
    """The whole answer, not streamed, to what generate() asks for."""
    usual = {"temperature": 0, "max_tokens": 12, "seed": 7, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
    body = {"prompt": prompt, "logprobs": 5, "return_token_ids": True, **usual, **settings}
    return server.post("/v1/completions", body).json()["choices"][0]


def percent(share: float) -> str:
    """As the page writes a probability: whole percents, or two digits of a small one."""
    return f"{share * 100:.0f} %" if share >= 0.0995 else f"{float(f'{share * 100:.2g}'):.9g} %"


def shades(page: Page, place: str) -> list[float]:
    """Of the tokens there, 0 to 1."""
    tokens = page.locator(f"{place} .token")
    return tokens.evaluate_all("spans => spans.map(span => +span.style.getPropertyValue('--s'))")


def strength(logprobs: list[float]) -> np.ndarray:
    """How strongly the page shades tokens: by their log-probabilities, those below 1/400 all the same."""
    return np.minimum(1, -np.array(logprobs) / math.log(400))


# --- generating -------------------------------------------------------------------------------------------------------


# The page draws once a frame, and a fast machine may answer within one: each event of a stream gets frames of its own.
SLOW_STREAM = """() => {
    const frame = () => new Promise(requestAnimationFrame);
    const slow = () => new TransformStream({
        async transform(text, to) {
            for (const part of text.split(/(?<=\\n\\n)/)) { to.enqueue(part); await frame(); await frame(); }
        },
    });
    const fetched = window.fetch;
    window.fetch = async (...request) => {
        const answer = await fetched(...request);
        if (!answer.headers.get("content-type").startsWith("text/event-stream")) return answer;
        const events = answer.body.pipeThrough(new TextDecoderStream()).pipeThrough(slow());
        return new Response(events.pipeThrough(new TextEncoderStream()), answer);
    };
}"""


def test_answer_comes_in_pieces_and_is_the_apis(page: Page, demo_server: Any) -> None:
    page.evaluate(SLOW_STREAM)
    page.evaluate(
        """() => {
            const answer = document.getElementById("new");
            window.seen = [];
            new MutationObserver(() => seen.push(answer.textContent)).observe(answer, { childList: true });
        }"""
    )
    generate(page, "Once upon a time,", temperature=0.8, max_tokens=60, seed=11)
    wait_for_end(page)
    expected = complete(demo_server, "Once upon a time,", temperature=0.8, max_tokens=60, seed=11)

    assert text_of(page, "#new") == expected["text"]
    pieces = page.evaluate("[...new Set(seen)]")
    assert len(pieces) > 30
    assert all(expected["text"].startswith(piece) for piece in pieces)

    np.testing.assert_allclose(shades(page, "#new"), strength(expected["logprobs"]["token_logprobs"]), rtol=1e-6)
    assert text_of(page, "#count") == "60"
    assert text_of(page, "#used-seed") == "11"
    assert re.fullmatch(r"\d+ tokens/s", text_of(page, "#speed"))
    assert re.fullmatch(r"\d+ ms", text_of(page, "#first"))
    assert expected["text"] in text_of(page, "#spoken")  # the polite live region: the whole, once


def test_shade_is_stronger_for_less_probable_tokens(page: Page) -> None:
    generate(page, "Once upon a time,", temperature=1.2, max_tokens=40, seed=3)
    wait_for_end(page)
    drawn = page.locator("#new .token").evaluate_all(
        """spans => spans.map(span => [+span.style.getPropertyValue("--s"),
            +getComputedStyle(span).backgroundColor.match(/([\\d.]+)\\)$/)[1]])"""
    )
    strong, alpha = np.array(drawn).T
    assert strong.min() < 0.1 < 0.4 < strong.max()
    np.testing.assert_allclose(alpha, strong, atol=0.01)


def test_a_random_seed_is_shown_and_repeats_the_answer(page: Page, demo_server: Any) -> None:
    generate(page, "Once upon a time,", temperature=1, seed="")
    wait_for_end(page)
    seed = int(text_of(page, "#used-seed"))
    assert text_of(page, "#new") == complete(demo_server, "Once upon a time,", temperature=1, seed=seed)["text"]


def test_stop_strings_are_lines_with_escapes(page: Page, demo_server: Any) -> None:
    generate(page, CAPITAL, max_tokens=30, stop_strings="never\n\\nAns")
    wait_for_end(page, "end of the text, or a stop string")
    expected = complete(demo_server, CAPITAL, max_tokens=30, stop=["never", "\nAns"])
    assert "\nAns" in complete(demo_server, CAPITAL, max_tokens=30)["text"]
    assert "\n" not in expected["text"]
    assert text_of(page, "#new") == expected["text"]


def test_parts_of_characters(open_page: Open, start: Start, bytes_path: Path) -> None:
    with start(bytes_path) as server:
        page = open_page(server)
        generate(page, "日本", temperature=1, max_tokens=80, seed=2)
        wait_for_end(page)
        expected = complete(server, "日本", temperature=1, max_tokens=80, seed=2)
    assert text_of(page, "#new") == expected["text"]
    assert page.locator("#new .token").count() == len(expected["token_ids"]) > 40
    assert page.locator("#new .token[data-mark='·']").count() > 0


@pytest.mark.parametrize("how", ["click", "Escape"])
def test_stop(open_page: Open, long_server: Any, how: str) -> None:
    page = open_page(long_server)
    generate(page, "a", max_tokens=90_000)
    expect(page.locator("#new .token").nth(20)).to_be_attached()
    assert long_server.metric("vllm:num_requests_running") == 1
    if how == "click":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    wait_for_end(page, "you stopped it")
    count = int(text_of(page, "#count").replace(",", ""))
    assert 20 < count < 90_000
    assert page.locator("#new .token").count() == count
    assert long_server.idle()
    generate(page, "a", max_tokens=5)  # the page goes on
    wait_for_end(page)
    assert text_of(page, "#new") == complete(long_server, "a", max_tokens=5)["text"]


# --- details of a token ----------------------------------------------------------------------------------------------


def to_token_by_keyboard(page: Page, index: int) -> Locator:
    """Tab from the Generate button to the tokens, then arrows to one of the answer."""
    page.focus("#generate")
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    for _ in range(page.locator("#given .token").count() + index):
        page.keyboard.press("ArrowRight")
    token = page.locator("#new .token").nth(index)
    expect(token).to_be_focused()
    return token


@pytest.mark.parametrize("how", ["hover", "focus"])
def test_alternatives(page: Page, demo_server: Any, how: str) -> None:
    generate(page, "Once upon a time,", temperature=1.5, top_k=0, top_p=1, min_p=0)
    wait_for_end(page)
    expected = complete(demo_server, "Once upon a time,", temperature=1.5, top_k=0, top_p=1, min_p=0)
    lists = expected["logprobs"]
    for index in (0, 3, 11):
        if how == "hover":
            page.locator("#new .token").nth(index).hover()
        else:
            to_token_by_keyboard(page, index)
        expect(page.locator("#token-facts")).to_contain_text(f"id {expected['token_ids'][index]},")
        top = sorted(lists["top_logprobs"][index].items(), key=lambda item: -item[1])
        rows = page.locator("#alternatives li")
        assert rows.locator("button").all_text_contents() == [
            text.replace(" ", "␣").replace("\n", "↵") for text, _ in top
        ]
        assert rows.locator(".share").all_text_contents() == [percent(math.exp(value)) for _, value in top]
        widths = rows.locator(".bar span").evaluate_all("bars => bars.map(bar => parseFloat(bar.style.width))")
        np.testing.assert_allclose(widths, [100 * math.exp(value) for _, value in top], rtol=1e-3)
        assert page.locator("#alternatives li.chosen").count() == 1


def test_details_stay_and_cover_nothing(page: Page) -> None:
    generate(page, FRANCE)
    wait_for_end(page)
    page.locator("#new .token").first.hover()
    before = page.locator("#details").inner_text()
    page.hover("h1")
    assert page.locator("#details").inner_text() == before
    answer, details = page.locator("#answer").bounding_box(), page.locator("#details").bounding_box()
    assert answer is not None
    assert details is not None
    assert answer["x"] + answer["width"] <= details["x"]


@pytest.mark.parametrize("place", ["new", "given"])
def test_an_alternative_is_gone_on_from(page: Page, demo_server: Any, place: str) -> None:
    prompt = "Once upon a time,"
    generate(page, prompt, max_tokens=20)
    wait_for_end(page)
    given = complete(demo_server, prompt, max_tokens=20, echo=True)
    at = 4 if place == "new" else 2
    lists = given["logprobs"]
    index = at + (len(lists["tokens"]) - 20 if place == "new" else 0)
    other = sorted(lists["top_logprobs"][index].items(), key=lambda item: -item[1])[1][0]
    page.locator(f"#{place} .token").nth(at).hover()
    page.locator("#alternatives button").nth(1).click()
    wait_for_end(page)
    continued = given["text"][: lists["text_offset"][index]] + other
    assert page.locator("#prompt").input_value() == continued
    assert text_of(page, "#given") == continued
    assert text_of(page, "#new") == complete(demo_server, continued, max_tokens=20)["text"]


def test_an_alternative_after_characters_of_two_units(open_page: Open, start: Start, tmp_path: Path) -> None:
    """JavaScript counts an emoji as two; offsets count it as one."""
    with start(write_model(tmp_path / "model.gguf", concatenating())) as server:
        page = open_page(server)
        generate(page, "😀😀ab", max_tokens=3)
        wait_for_end(page)
        page.locator("#new .token").nth(1).hover()
        second = page.locator("#alternatives button").nth(1)
        text = second.inner_text().replace("␣", " ")
        kept = "😀😀ab" + (page.locator("#new .token").first.text_content() or "")
        second.click()
        wait_for_end(page)
        assert page.locator("#prompt").input_value() == kept + text


def test_the_prompt_is_shaded_too(page: Page, demo_server: Any) -> None:
    generate(page, FRANCE)
    wait_for_end(page)
    echoed = complete(demo_server, FRANCE, max_tokens=0, echo=True)["logprobs"]
    assert text_of(page, "#given") == FRANCE
    np.testing.assert_allclose(shades(page, "#given"), strength([0.0, *echoed["token_logprobs"][1:]]), rtol=1e-6)
    page.locator("#given .token").first.hover()
    expect(page.locator("#token-facts")).to_contain_text("no probability")


def test_line_breaks_can_be_seen(page: Page, demo_server: Any) -> None:
    generate(page, CAPITAL, max_tokens=20)
    wait_for_end(page)
    tokens = complete(demo_server, CAPITAL, max_tokens=20)["logprobs"]["tokens"]
    token = page.locator("#new .token").nth(tokens.index("\n"))
    assert token.get_attribute("data-mark") == "↵"
    assert token.get_attribute("aria-label") == "↵"
    token.focus()
    expect(page.locator("#alternatives li.chosen button")).to_have_text("↵")


@pytest.mark.parametrize("how", ["click", "Enter"])
def test_a_token_goes_to_the_inspector(page: Page, demo_server: Any, how: str) -> None:
    generate(page, CAPITAL)
    wait_for_end(page)
    expected = complete(demo_server, CAPITAL)
    for index in (0, 4):
        if how == "click":
            page.locator("#new .token").nth(index).click()
        else:
            to_token_by_keyboard(page, index)
            page.keyboard.press("Enter")
        expect(page.locator("#rows td:nth-child(2)")).to_have_text([str(expected["token_ids"][index])])
        expect(page.locator("#inspected")).to_have_value(expected["logprobs"]["tokens"][index])


# --- the code inspector -----------------------------------------------------------------------------------------------


class File:
    """What a GGUF file says of its codes, read with the gguf package."""

    def __init__(self, path: str | Path) -> None:
        self._reader = gguf.GGUFReader(path)
        self.tokenizer = Tokenizer.from_str(self["tokenizer.huggingface.json"])
        self.width, self.cells, self.lift = (
            self["fixmin.code.width"],
            self["fixmin.embedding_length"],
            self["fixmin.code.lift"],
        )

    def __getitem__(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    @property
    def matrix(self) -> np.ndarray:
        return np.array(self["fixmin.code.affine_matrix"]).reshape(self.width, self.width)

    @property
    def shift(self) -> np.ndarray:
        return np.array(self["fixmin.code.affine_shift"])

    def bits(self, ids: Any) -> np.ndarray:
        """[T, K], lowest bit first"""
        return np.asarray(ids)[:, None] >> np.arange(self.width) & 1

    def lifted(self, code: np.ndarray) -> np.ndarray:
        """[D] bits"""
        return np.resize(code, self.cells) if self.lift == "tile" else np.repeat(code, self.cells // self.width)


@pytest.fixture(params=["demo", "interleave", "odd tile"])
def affine(request: pytest.FixtureRequest, start: Start, tmp_path: Path) -> Iterator[tuple[File, Any]]:
    """A model with a matrix, and its server."""
    if request.param == "demo":
        yield File(request.getfixturevalue("demo_path")), request.getfixturevalue("demo_server")
        return
    # 6 bits: 96 cells are 16 to a bit, and 64 cells end within a tile.
    lift, cells = ("interleave", 96) if request.param == "interleave" else ("tile", 64)
    path = write_model(tmp_path / "model.gguf", concatenating(), lift=lift, embedding_length=cells)
    with start(path) as server:
        yield File(path), server


def drawn_bits(page: Page, group: str) -> list[int]:
    return page.locator(f"#product .{group} rect + text").evaluate_all("texts => texts.map(text => +text.textContent)")


def strip_bits(page: Page, cells: int) -> list[int]:
    """Bits of the strip in reading order, from where its cells were drawn."""
    placed = {}
    for bit, name in enumerate(("zero", "one")):
        path = page.locator(f"#strip path.{name}").get_attribute("d") or ""
        for x, y in re.findall(r"M([\d.]+) ([\d.]+)h", path):
            placed[float(y), float(x)] = bit
    assert len(placed) == cells
    return [placed[at] for at in sorted(placed)]


def test_inspector_shows_the_files_codes(open_page: Open, affine: tuple[File, Any]) -> None:
    file, server = affine
    page = open_page(server)
    text = "the quick abc, cat?\n"
    page.fill("#inspected", text)
    ids = file.tokenizer.encode(text, add_special_tokens=False).ids
    bits = file.bits(ids)
    codes = bits @ file.matrix.T % 2 ^ file.shift
    rows = page.locator("#rows tr")
    expect(rows.locator("td:nth-child(2)")).to_have_text([str(i) for i in ids])
    for column, expected in ((3, bits), (4, codes)):
        shown = rows.locator(f"td:nth-child({column})").all_text_contents()
        assert shown == ["".join(map(str, row)) for row in expected]

    rows.first.locator("button").focus()
    for i in (0, 1, len(ids) - 1):  # chosen with the keyboard
        page.keyboard.press("Home")
        for _ in range(i):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        expect(rows.nth(i).locator("button")).to_have_attribute("aria-pressed", "true")
        assert f"bin({ids[i]})" in text_of(page, "#product-title")
        assert drawn_bits(page, "bits-row") == bits[i].tolist()
        assert drawn_bits(page, "matrix") == file.matrix.ravel().tolist()
        assert drawn_bits(page, "parity") == (file.matrix @ bits[i] % 2).tolist()
        assert drawn_bits(page, "shift") == file.shift.tolist()
        assert drawn_bits(page, "code") == codes[i].tolist()
        left = page.locator("#product .bits-row rect").evaluate_all(
            "cells => cells.map(c => c.getBoundingClientRect().x)"
        )
        lit = page.locator("#product .column").evaluate_all("columns => columns.map(c => c.getBoundingClientRect().x)")
        near = [int(np.abs(np.array(left) - x).argmin()) for x in lit]
        assert near == np.flatnonzero(bits[i]).tolist()
        assert strip_bits(page, file.cells) == file.lifted(codes[i]).tolist()
        sums = page.locator("#sums li").all_text_contents()
        assert [int(line[-1]) for line in sums] == codes[i].tolist()
    expect(page.locator("#strip-note")).to_contain_text("Tiled" if file.lift == "tile" else "Interleaved")


def test_idea_has_the_models_numbers(page: Page, demo_path: str) -> None:
    file = File(demo_path)
    idea = text_of(page, "#idea")
    vocab = file["fixmin.vocab_size"]
    for expected in (f"{vocab:,}", f"{file.cells:,}", f"saves {vocab * file.cells:,} parameters", f"{file.width} bits"):
        assert expected in idea


def test_codes_from_a_table(open_page: Open, start: Start, tmp_path: Path) -> None:
    tokenizer = concatenating()
    table = np.random.default_rng(1).permutation(64)[: tokenizer.get_vocab_size(), None] >> np.arange(6) & 1
    with start(write_model(tmp_path / "table.gguf", tokenizer, code_kind="table", table=table)) as server:
        page = open_page(server)
        page.fill("#inspected", "cat")
        ids = tokenizer.encode("cat").ids
        expect(page.locator("#rows td:nth-child(2)")).to_have_text([str(i) for i in ids])
        assert page.locator("#rows td:nth-child(4)").all_text_contents() == ["".join(map(str, table[i])) for i in ids]
        assert drawn_bits(page, "code") == table[ids[0]].tolist()
        expect(page.locator("#product-note")).to_contain_text("fixed table")
        expect(page.locator("#by-row")).to_be_hidden()


def test_a_model_with_an_ordinary_table_has_no_inspector(open_page: Open, start: Start, tmp_path: Path) -> None:
    with start(write_model(tmp_path / "learned.gguf", concatenating(), code_kind="learned")) as server:
        page = open_page(server)
        expect(page.locator("#idea")).to_contain_text("an ordinary table")
        expect(page.locator("#inspected")).to_be_hidden()
        expect(page.locator("#codes")).to_be_hidden()
        generate(page, "the")
        wait_for_end(page)
        page.locator("#new .token").first.click()  # must not ask for codes
        expect(page.locator("#inspector-error")).to_be_empty()


def test_an_answer_that_comes_late_is_dropped(page: Page) -> None:
    held: list[Route] = []
    page.route("**/codes", lambda route: route.continue_() if held else held.append(route))
    with page.expect_request("**/codes"):
        page.fill("#inspected", "The")
    while not held:
        page.wait_for_timeout(20)
    page.fill("#inspected", "The capital")
    expect(page.locator("#rows tr")).to_have_count(2)
    held[0].fulfill(json={"tokens": [{"id": 1, "text": "late", "bits": [0] * 12, "code": [0] * 12}]})
    page.wait_for_timeout(300)
    expect(page.locator("#rows tr")).to_have_count(2)


def test_typing_asks_once(page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: "/codes" in request.url and asked.append(request.post_data or ""))
    # In one turn of the page's own clock, so that no pause between two letters can be long enough to ask.
    page.evaluate(
        """() => {
            const box = document.getElementById("inspected");
            box.value = "";
            for (const letter of "France") {
                box.value += letter;
                box.dispatchEvent(new Event("input", { bubbles: true }));
            }
        }"""
    )
    expect(page.locator("#rows tr")).to_have_count(3)  # its tokens; the text of the start has 4
    page.wait_for_timeout(500)
    assert [json.loads(body) for body in asked] == [{"text": "France"}]


def test_the_picture_follows_the_newest_and_the_hovered_token(open_page: Open, affine: tuple[File, Any]) -> None:
    file, server = affine
    page = open_page(server)
    expect(page.locator("#codes")).to_be_visible()
    generate(page, "cat", temperature=1, top_k=0, max_tokens=8)
    wait_for_end(page)
    ids = complete(server, "cat", temperature=1, top_k=0, max_tokens=8)["token_ids"]
    codes = file.bits(ids) @ file.matrix.T % 2 ^ file.shift
    for i in (len(ids) - 1, 0):
        if i == 0:
            page.locator("#new .token").nth(i).hover()
        expect(page.locator("#entering")).to_contain_text(f"→ {ids[i]:,}")
        assert drawn_bits(page, "bits-row") == file.bits(ids)[i].tolist()
        assert drawn_bits(page, "code") == codes[i].tolist()
        assert strip_bits(page, file.cells) == file.lifted(codes[i]).tolist()


# --- first look, examples, reload -------------------------------------------------------------------------------------


def test_the_first_look_shows_a_story_and_a_reload_keeps_it(open_page: Open, demo_server: Any) -> None:
    page = open_page(demo_server, fresh=True)
    expect(page.locator("#new .token").nth(40)).to_be_attached()
    wait_for_end(page)
    story = complete(demo_server, "Once upon a time,", temperature=0.8, max_tokens=64, seed=38347918)
    assert text_of(page, "#new") == story["text"]
    assert max(shades(page, "#new")) > 0.5

    page.fill("#prompt", "another")
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("#temperature", "0.5")
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    figures = text_of(page, ".figures")
    shaded = shades(page, "#new")
    page.reload()
    expect(page.locator("#codes")).to_be_visible()
    assert text_of(page, "#new") == story["text"]
    assert shades(page, "#new") == shaded
    assert text_of(page, ".figures") == figures
    assert page.locator("#prompt").input_value() == "another"
    assert page.locator("#temperature").input_value() == "0.5"
    assert not [url for url in sent if url.endswith("completions")]
    page.locator("#new .token").nth(2).hover()
    expect(page.locator("#token-facts")).to_contain_text(f"id {story['token_ids'][2]},")


def test_examples(page: Page, demo_server: Any) -> None:
    examples = page.locator("#examples button")
    for i in range(examples.count()):
        examples.nth(i).click()
        wait_for_end(page)
        assert text_of(page, "#given") == page.locator("#prompt").input_value()
        assert text_of(page, "#new") != ""
    page.get_by_role("button", name="Capital of UK").click()
    wait_for_end(page, "end of the text, or a stop string")
    assert text_of(page, "#new") == " London"


def test_copy_and_the_same_request_elsewhere(open_page: Open, demo_server: Any) -> None:
    page = open_page(demo_server, permissions=["clipboard-read", "clipboard-write"])
    prompt = 'It\'s a "day" in $HOME,\nOnce \\ upon'
    generate(page, prompt, temperature=0.7, stop_strings="\\n\nnever")
    wait_for_end(page)
    answer = text_of(page, "#new")
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == answer

    page.click("#elsewhere summary")
    page.click("#copy-curl")
    said = subprocess.run(
        ["bash", "-c", page.evaluate("navigator.clipboard.readText()")], capture_output=True, check=True
    )
    assert json.loads(said.stdout)["choices"][0]["text"] == answer
    page.click("#copy-python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(page.evaluate("navigator.clipboard.readText()"), {})
    assert printed.getvalue() == answer + "\n"
    page.fill("#api-key", "secret")
    for place in ("#curl", "#python"):
        expect(page.locator(place)).to_contain_text("FIXMIN_API_KEY")
        assert "secret" not in text_of(page, place)


def test_another_model_behind_the_same_address(open_page: Open, start: Start, demo_path: Path, tmp_path: Path) -> None:
    """No false equation: the old matrix is never drawn beside new codes."""
    with start(demo_path) as server:
        page = open_page(server, refused=("ERR_", "Failed to load resource"))
        generate(page, "cat")
        wait_for_end(page)
        port = int(server.url.rsplit(":", 1)[1])
    path = write_model(tmp_path / "other.gguf", concatenating(), seed=5)
    with start(path, port=port):
        file = File(path)
        page.fill("#inspected", "cat")
        ids = file.tokenizer.encode("cat").ids
        expect(page.locator("#rows td:nth-child(2)")).to_have_text([str(i) for i in ids])
        code = file.bits(ids)[0] @ file.matrix.T % 2 ^ file.shift
        assert drawn_bits(page, "matrix") == file.matrix.ravel().tolist()
        assert drawn_bits(page, "code") == code.tolist()
        expect(page.locator("#model")).to_contain_text("other")
        expect(page.locator("#stale")).to_be_visible()
        generate(page, "cat", max_tokens=3)
        wait_for_end(page)
        expect(page.locator("#stale")).to_be_hidden()


# --- errors in words --------------------------------------------------------------------------------------------------


def test_api_key(open_page: Open, start: Start, demo_path: Path) -> None:
    with start(demo_path, "--api-key", "correct horse") as server:
        page = open_page(server, refused=("401",), ready=False)
        error = page.locator("#error")
        expect(error).to_have_text("The server asks for an API key. Enter it under Settings.")
        expect(error).to_have_attribute("role", "alert")
        key = page.get_by_label("API key")
        expect(key).to_be_visible()  # Settings are open
        key.fill("wrong")
        generate(page, FRANCE)
        expect(error).to_have_text("The server does not know this API key. Correct it under Settings.")
        key.fill("schlüssel")
        page.click("#generate")
        expect(error).to_have_text("The API key contains characters that no key can have.")
        key.fill("correct horse")
        page.click("#generate", delay=500)  # what the key makes appear must not move the button away from a slow hand
        wait_for_end(page)
        expect(error).to_be_empty()
        expect(page.locator("#model")).to_contain_text("6 layers")
        expect(page.locator("#codes")).to_be_visible()
        assert "correct horse" not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()
        expect(page.locator("#model")).to_contain_text("6 layers")  # known until the tab is closed


def test_a_busy_server(open_page: Open, start: Start, long_path: Path) -> None:
    with start(long_path, "--parallel", "1", "--max-queue", "0") as server:
        first, second = open_page(server), open_page(server, refused=("429",))
        generate(first, "a", max_tokens=90_000)
        expect(first.locator("#new .token").first).to_be_attached()
        generate(second, "a")
        expect(second.locator("#error")).to_contain_text("The server is busy. Try again in 1 s.")
        first.keyboard.press("Escape")
        assert server.idle()
        second.click("#generate")
        wait_for_end(second)
        expect(second.locator("#error")).to_be_empty()


def test_a_server_that_goes_away(open_page: Open, start: Start, long_path: Path) -> None:
    with start(long_path) as server:
        page = open_page(server, refused=("Failed to load resource", "ERR_"))
        generate(page, "a", max_tokens=90_000)
        expect(page.locator("#new .token").nth(20)).to_be_attached()
        server.process.kill()
        expect(page.locator("#error")).to_have_text("The connection to the server broke.")
        expect(page.locator("#finish")).to_have_text("an error")
        page.click("#generate")
        expect(page.locator("#error")).to_have_text("The server does not answer. Is it still running?")


def test_a_prompt_that_is_too_long(open_page: Open, demo_server: Any) -> None:
    page = open_page(demo_server, refused=("400",))
    generate(page, "cat " * 500)
    expect(page.locator("#error")).to_contain_text("The server refused this (400): ")
    expect(page.locator("#finish")).to_have_text("an error")
    expect(page.locator("#generate")).to_be_enabled()


def test_a_setting_that_is_wrong_is_not_sent(page: Page) -> None:
    generate(page, FRANCE, top_p=0.5)
    wait_for_end(page)
    page.fill("#top-p", "7")
    page.evaluate("document.getElementById('settings').open = false")
    page.on("request", lambda request: pytest.fail(f"sent {request.url}"))
    page.click("#generate")
    expect(page.locator("#top-p")).to_be_focused()


EVENT = 'data: {"choices": [{"index": 0, "text": "ab", "logprobs": null, "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            dict(status=429, json={"error": {"message": "queue full"}}),
            "The server is busy. Try again in a moment. (queue full)",
        ),
        (dict(status=429, json={}, headers={"Retry-After": "3"}), "The server is busy. Try again in 3 s."),
        (dict(status=500, json={"error": {"message": "ouch"}}), "The server failed (500): ouch"),
        (dict(status=502, body="<html>proxy</html>"), "The server failed (502): Bad Gateway"),
        (
            dict(status=404, json={"error": {"message": "no such model"}}),
            "The server refused this (404): no such model",
        ),
        (None, "The server does not answer. Is it still running?"),
        (dict(body=EVENT + 'data: {"error": {"message": "shutting down"}}\n\n'), "The server broke off: shutting down"),
        (dict(body=EVENT), "The connection ended before the answer was complete."),
    ],
)
def test_errors_in_words(open_page: Open, demo_server: Any, answer: dict[str, Any] | None, words: str) -> None:
    page = open_page(demo_server, refused=("Failed to load resource",))
    page.route("**/completions", lambda route: route.abort() if answer is None else route.fulfill(**answer))
    generate(page, FRANCE)
    expect(page.locator("#error")).to_contain_text(words)
    expect(page.locator("#finish")).to_have_text("an error")
    expect(page.locator("#answer")).to_have_text("ab" if answer and EVENT in str(answer.get("body")) else "")
    page.unroute("**/completions")
    page.click("#generate")  # the page goes on
    wait_for_end(page)
    expect(page.locator("#error")).to_be_empty()


def test_loading_is_shown_and_waited_for(open_page: Open, demo_server: Any, browser: Browser) -> None:
    page = open_page(demo_server, refused=("503",))
    progress = [0.25, 0.5]

    def health(route: Route) -> None:
        if progress:
            body = {"error": {"message": "the model is loading"}, "progress": progress[0]}
            route.fulfill(status=503, json=body)
        else:
            route.continue_()

    page.route("**/health", health)
    page.reload()
    for expected in (0.25, 0.5):
        expect(page.locator("#loading-text")).to_have_text(f"The model is loading: {expected:.0%}".replace("%", " %"))
        expect(page.locator("#loading-bar")).to_have_js_property("value", expected)
        progress.pop(0)
    expect(page.locator("#loading")).to_be_hidden()
    expect(page.locator("#model")).to_contain_text("6 layers")

    # A server that loads again, while the page is open.
    progress.append(0.75)
    page.route(
        "**/completions", lambda route: route.fulfill(status=503, json={"error": {"message": "the model is loading"}})
    )
    generate(page, FRANCE)
    expect(page.locator("#loading-text")).to_have_text("The model is loading: 75 %")
    progress.clear()
    expect(page.locator("#error")).to_be_empty()
    page.unroute("**/completions")
    page.click("#generate")
    wait_for_end(page)


# --- events cut anywhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_may_be_cut_anywhere(page: Page, end: str) -> None:
    lines = [
        ": comment",
        "data: é日😀",
        "",
        "event: x",
        "data:two",
        "data:  lines",
        "id: 3",
        "",
        "",
        "data: [DONE]",
        "",
        "data: lost",
    ]
    stream = end.join(lines).encode()
    expected = ["é日😀", "two\n lines", "[DONE]"]
    got = page.evaluate(
        """async (bytes) => {
            const cut = (...places) => {
                const edges = [0, ...places, bytes.length];
                const parts = edges.slice(1).map((edge, i) => new Uint8Array(bytes.slice(edges[i], edge)));
                return new ReadableStream({ start(c) { parts.forEach((part) => c.enqueue(part)); c.close(); } });
            };
            const streams = [cut(...bytes.keys()), ...bytes.map((_, i) => cut(i))];
            return Promise.all(streams.map(async (stream) => {
                const events = [];
                for await (const data of serverSentEvents(stream)) events.push(data);
                return events;
            }));
        }""",
        list(stream),
    )
    assert len(got) == len(stream) + 1
    assert all(events == expected for events in got)


# --- texts stay texts -------------------------------------------------------------------------------------------------


def test_markup_stays_text(page: Page, demo_server: Any) -> None:
    generate(page, MARKUP)
    wait_for_end(page)
    assert text_of(page, "#new") == complete(demo_server, MARKUP)["text"]

    logprobs = {
        "tokens": [MARKUP],
        "token_logprobs": [-1.0],
        "top_logprobs": [{MARKUP: -1.0, "<b>x</b>": -2.0, "__proto__": -3.0}],
    }
    choice = {"index": 0, "text": MARKUP, "logprobs": logprobs, "finish_reason": "length"}
    events = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/completions", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
    page.click("#generate")
    expect(page.locator("#new")).to_have_text(MARKUP)
    page.locator("#new .token").focus()
    visible = MARKUP.replace(" ", "␣")
    assert page.locator("#alternatives button").all_text_contents() == [visible, "<b>x</b>", "__proto__"]
    page.keyboard.press("Enter")
    expect(page.locator("#inspected")).to_have_value(MARKUP)
    expect(page.locator("#rows button").first).to_have_text(re.compile("^<"))
    # Tokens of the page are the text again.
    assert "".join(page.locator("#rows button").all_text_contents()) == visible
    page.unroute("**/completions")

    error = f"data: {json.dumps({'error': {'message': MARKUP}})}\n\n"
    page.route("**/completions", lambda route: route.fulfill(body=error, content_type="text/event-stream"))
    page.click("#generate")
    expect(page.locator("#error")).to_contain_text(MARKUP)
    assert page.locator("img, script").count() == 1  # the page's own script
    assert page.evaluate("window.hurt") is None


# --- keyboard, width, colours -----------------------------------------------------------------------------------------


def test_everything_is_reached_by_tab_and_named(page: Page) -> None:
    expect(page.locator("#codes")).to_be_visible()
    generate(page, FRANCE)
    wait_for_end(page)
    page.focus("#theme")
    page.keyboard.press("Shift+Tab")
    reached: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
                const e = document.activeElement;
                return [e.id || e.className || e.parentNode.id || e.tagName, getComputedStyle(e).outlineStyle];
            }"""
        )
        if name == "BODY" or (reached and name == reached[0]):
            break
        assert outline != "none", name
        reached.append(name.split(" ")[0])
    fields = ["max-tokens", "temperature", "top-k", "top-p", "min-p", "seed", "stop-strings", "api-key"]
    start = ["theme", *["examples"] * 4, "prompt", "settings", *fields, "generate"]
    # One stop in the answer and one in the table: arrow keys move within.
    end = ["token", "copy", "elsewhere", "inspected", "by-row"]
    assert [name for name in reached if name not in ("BUTTON", "answer", "rows")] == [*start, *end]

    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, textarea, button")]
            .filter((e) => !e.labels?.length && !e.textContent.trim() && !e.ariaLabel).map((e) => e.outerHTML)"""
    )
    assert unnamed == []


def test_generating_by_keyboard_alone(page: Page, demo_server: Any) -> None:
    page.focus("#prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("Once upon")
    page.keyboard.press("Control+Enter")
    wait_for_end(page)
    seed = int(text_of(page, "#used-seed"))
    expected = complete(demo_server, "Once upon", temperature=0.8, max_tokens=64, seed=seed)
    assert text_of(page, "#new") == expected["text"]


def test_focus_moves_to_the_button_that_works(open_page: Open, long_server: Any) -> None:
    page = open_page(long_server)
    generate(page, "a", max_tokens=90_000)
    expect(page.locator("#stop")).to_be_focused()
    page.keyboard.press("Enter")
    wait_for_end(page, "you stopped it")
    expect(page.locator("#generate")).to_be_focused()


def test_touch(open_page: Open, demo_server: Any) -> None:
    page = open_page(demo_server, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    generate(page, CAPITAL)
    wait_for_end(page)
    expect(page.locator("#how-to-point")).to_contain_text("Tap a token")
    expect(page.locator("#token-facts")).to_contain_text("Tap a token")
    expect(page.locator("kbd").first).to_be_hidden()
    page.locator("#new .token").nth(3).tap()
    expect(page.locator("#rows tr")).to_have_count(1)
    expect(page.locator("#alternatives li")).to_have_count(5)
    page.locator("#alternatives button").nth(1).tap()
    wait_for_end(page)
    assert page.locator("#prompt").input_value().startswith(CAPITAL)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_width(open_page: Open, demo_server: Any, scheme: str) -> None:
    page = open_page(demo_server, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    generate(page, "word" * 60, temperature=1.5, top_k=0, max_tokens=40)
    wait_for_end(page)
    page.fill("#inspected", "internationalisation " * 6 + "x" * 200)
    expect(page.locator("#codes")).to_be_visible()
    page.click("#by-row summary")

    def inside() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= 360 && document.body.scrollWidth <= 360")

    assert inside()
    for token in (page.locator("#new .token").first, page.locator("#new .token").nth(17)):
        token.focus()
        box = page.locator("#details").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["height"] <= 0.45 * 740 + 2
        assert box["y"] + box["height"] <= 741  # in sight without scrolling there
    assert inside()


def test_wide_screens_have_margins(open_page: Open, demo_server: Any) -> None:
    page = open_page(demo_server, viewport={"width": 2560, "height": 1200})
    box = page.locator("main").bounding_box()
    assert box is not None
    assert box["width"] <= 1420
    assert abs(box["x"] + box["width"] / 2 - 1280) < 10


CONTRAST = """(pairs) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const light = (colours) => {  // painted over each other, whatever notation they have
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data]
            .map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const probe = document.body.appendChild(document.createElement("i"));
    const resolve = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
    return pairs.map((pair) => {
        const [a, b] = pair.map((name) => light([resolve(name)])).sort();
        return [pair.join(" on "), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(open_page: Open, demo_server: Any, scheme: str) -> None:
    page = open_page(demo_server, color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 600) == (scheme == "light")
    texts = [("text", ground) for ground in ("ground", "panel", "surprise", "lit")]
    texts += [("quiet", ground) for ground in ("ground", "panel", "lit")]
    texts += [("on-accent", "accent"), ("error", "panel")]
    low = {pair: round(ratio, 2) for pair, ratio in page.evaluate(CONTRAST, texts) if ratio < 4.5}
    assert low == {}


def test_theme_is_chosen_and_kept(open_page: Open, demo_server: Any) -> None:
    page = open_page(demo_server, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    toggle = page.get_by_role("button", name="Theme")
    expect(toggle).to_have_text("Theme: system")
    toggle.click()
    expect(toggle).to_have_text("Theme: light")
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light
    toggle.click()
    assert page.evaluate(ground) == dark


@pytest.mark.parametrize("strips", [False, True])
def test_below_a_prefix(browser: Browser, served_path: Path, tmp_path: Path, strips: bool) -> None:
    """Behind a proxy: the page, what it asks, the request that it shows, and /docs."""
    with (
        serving(served_path, tmp_path / "log", "--root-path", "/a/llm") as server,
        proxy(server, "/a/llm", strips) as url,
    ):
        page = browser.new_page()
        outside: list[str] = []
        page.on("request", lambda request: request.url.startswith(url) or outside.append(request.url))
        for address in (url, url + "/"):
            page.goto(address)
            expect(page.locator("#model")).not_to_be_empty()
            generate(page, "the")
            wait_for_end(page)
            expect(page.locator("#finish")).not_to_be_empty()
            page.evaluate("document.getElementById('elsewhere').open = true")
            expect(page.locator("#curl")).to_contain_text(f"{url}/v1/completions")
        page.goto(f"{url}/docs/")
        expect(page.locator("#source")).to_have_attribute("href", "/a/llm/openapi.json")
        tokenize = page.locator("details", has_text="POST /tokenize")
        tokenize.locator("summary").click()
        tokenize.get_by_role("button", name="Send").click()
        expect(tokenize.locator("pre")).to_contain_text("tokens")
        assert outside == []
        page.close()


def test_reduced_motion(open_page: Open, long_server: Any) -> None:
    names = {}
    for motion in ("reduce", "no-preference"):
        page = open_page(long_server, reduced_motion=motion)
        generate(page, "a", max_tokens=90_000)
        expect(page.locator("#answer")).to_have_class("running")
        names[motion] = page.evaluate("getComputedStyle(document.getElementById('answer'), '::after').animationName")
        page.keyboard.press("Escape")
    assert names == {"reduce": "none", "no-preference": "blink"}


PICTURES = {
    "light": {"viewport": {"width": 1280, "height": 960}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 960}, "color_scheme": "dark"},
    "wide": {"viewport": {"width": 1920, "height": 1080}, "color_scheme": "light"},
    "dark-phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"},
}


@pytest.mark.parametrize("name", PICTURES)
def test_screenshots(open_page: Open, demo_server: Any, tmp_path: Path, name: str) -> None:
    """The pictures of docs/ are made by `FIXMIN_SCREENSHOTS=docs pytest tests/serve -k screenshots`."""
    page = open_page(demo_server, fresh=True, **PICTURES[name])
    wait_for_end(page)
    to_token_by_keyboard(page, 4)
    page.keyboard.press("Enter")
    expect(page.locator("#rows tr")).to_have_count(1)
    page.evaluate("scrollTo(0, 0)")
    path = Path(os.environ.get("FIXMIN_SCREENSHOTS", tmp_path)) / f"playground-{name}.png"
    page.screenshot(path=path, full_page=True)
    assert 20_000 < path.stat().st_size < 300_000
