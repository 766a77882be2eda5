"""The page at ``/`` in a browser, as a user has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, SHIFT, Page, browsing
from byte_model import byte_model
from scripted_served import ScriptedServed
from serving import Running, serving, wait_for
from small_engine import make_engine

from layer_streamer.llm.serving.guarding.guard import Guard
from layer_streamer.llm.serving.guarding.keys import Keys
from layer_streamer.llm.serving.streamed import StreamedEngine
from layer_streamer.llm.serving.working.pieces import Piece

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium in PATH"),
]
LAST = "[...document.querySelectorAll('.assistant')].at(-1)"
IDLE = "document.querySelector('#send').innerText === 'Send'"
LOOKS = [(390, False), (390, True), (1280, False), (1280, True)]
SEEN = ("#model", "#where", "#new", ".user", ".assistant", "pre", "#text", "#send", "#told")
CONTRAST = """(element) => {
  const style = (one) => getComputedStyle(one);
  const light = (color) => {
    const part = color.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
      .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  let behind = element;
  while (style(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const [ink, back] = [light(style(element).color), light(style(behind).backgroundColor)];
  return (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
}"""
"""Of an element's ink and what is behind it, as WCAG has it."""


class Lines(ScriptedServed):
    """Says a new line for each bar."""

    def _say(self, tag: Any) -> Piece:
        piece = super()._say(tag)
        piece.text = piece.text.replace("| ", "\n")
        return piece


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browsing(tmp_path / "profile") as found:
        yield found


def open_page(page: Page, running: Running) -> None:
    page.open(f"{running.url}/")
    page.wait("document.title !== 'layer-streamer'")


def ask(page: Page, text: str) -> None:
    """Write it where the focus is, and send it."""
    page.write(text)
    page.press("Enter")


def answered(page: Page) -> str:
    """The whole answer to what was asked last."""
    page.wait(f"{IDLE} && document.querySelector('#told').innerText")
    found: str = page.run(f"{LAST}.textContent")
    return found


def test_the_page_loads_under_its_policy_and_asks_nobody_else(page: Page, server: Running) -> None:
    open_page(page, server)
    ask(page, "a bc d")
    assert answered(page) == "a bc d "
    assert page.complaints == []
    assert set(page.asked) == {
        f"{server.url}/{path}" for path in ("", "v1/models", "v1/chat/completions")
    }
    assert page.run("document.activeElement.id") == "text", "one can go on writing"


def test_an_answer_comes_in_as_it_is_made(page: Page) -> None:
    engine = ScriptedServed(gate=True)
    with serving(engine) as running:
        open_page(page, running)
        ask(page, "one two three")
        assert engine.passes is not None
        for words in ("one ", "one two ", "one two three "):
            engine.passes.release()
            page.wait(f"{LAST}.textContent === '{words}'")
        page.wait(IDLE)


def test_an_answer_is_the_engines_text_and_the_page_says_how_it_was_made(
    page: Page, tmp_path: Path
) -> None:
    path = byte_model(tmp_path, max_position_embeddings=1024)
    options: Any = {"reproducible": True, "max_length": 256, "kv_tokens": 512}

    def open_engine() -> StreamedEngine:
        return StreamedEngine(make_engine(path, **options), "bytes")

    with serving(open_engine) as running:
        wait_for(lambda: running.worker.status == "ready")
        open_page(page, running)
        ask(page, "Hello")
        found = answered(page)
        told = {"role": "user", "content": "Hello"}
        done = running.client().chat.completions.create(model="m", messages=[told])  # type: ignore[list-item]
        assert found == done.choices[0].message.content and len(found) > 50
        assert done.usage is not None
        said = page.text("#told")
        assert said.startswith(f"{done.usage.completion_tokens} tokens · ")
        assert " tokens/s · " in said and "1.00 tokens a pass" in said and "cut at the" in said
        assert page.text("#where") and " MiB on " in page.text("#where")
        assert page.text("#model") == "bytes" == page.run("document.title")


@pytest.mark.parametrize("how", ["key", "button"])
def test_an_answer_that_is_stopped_stays_and_frees_its_row(page: Page, how: str) -> None:
    engine = ScriptedServed(gate=True)
    with serving(engine) as running:
        open_page(page, running)
        ask(page, "one two three")
        assert engine.passes is not None
        engine.passes.release()
        page.wait(f"{LAST}.textContent === 'one '")
        assert b"\nlayer_streamer_rows 1.0" in running.get("/metrics")[1]
        page.press("Escape") if how == "key" else page.click("#send")
        page.wait(IDLE)
        wait_for(lambda: b"\nlayer_streamer_rows 0.0" in running.get("/metrics")[1])
        assert page.run(f"{LAST}.textContent") == "one " and engine.cancelled
        engine.passes.release(9)
        page.click("#text")
        ask(page, "and on")
        assert answered(page) == "and on "
        roles = [message["role"] for message in engine.orders[-1].prompts[0]]
        assert roles == ["user", "assistant", "user"]
        assert page.complaints == []


def test_what_was_said_is_there_after_a_reload_until_a_new_chat(page: Page) -> None:
    engine = ScriptedServed(gate=True)
    with serving(engine) as running:
        assert engine.passes is not None
        engine.passes.release(2)
        open_page(page, running)
        ask(page, "one two")
        assert answered(page) == "one two "
        ask(page, "is not answered")
        assert engine.submitted.acquire() and engine.submitted.acquire()
        page.reload()
        page.wait("document.title === 'scripted'")
        assert page.text(".user") == "one two" and page.run(f"{LAST}.textContent") == "one two "
        assert page.run("document.querySelector('#text').value") == "is not answered"
        assert page.run("document.querySelectorAll('.turn').length") == 2
        page.click("#new")
        assert page.run("document.querySelectorAll('.turn').length") == 0
        page.reload()
        assert page.run("document.querySelectorAll('.turn').length") == 0


@pytest.mark.parametrize("text", [
    "<script>window.harmed=1</script>", "<img/src=x/onerror=window.harmed=1>",
    "<iframe/srcdoc='<script>parent.harmed=1</script>'>", "&lt;b&gt;", "[a](javascript:harmed=1)",
])  # fmt: skip
def test_markup_of_a_model_is_shown_as_text_only(page: Page, text: str) -> None:
    with serving() as running:
        open_page(page, running)
        ask(page, text)
        assert answered(page) == f"{text} "
        page.reload()
        assert page.run(f"{LAST}.textContent") == f"{text} " and page.text(".user") == text
        inner = "#said script, #said img, #said iframe, #said a, #said b"
        assert page.run(f'document.querySelectorAll("{inner}").length') == 0
        assert page.run("window.harmed") is None and page.complaints == []


def test_code_stands_apart_as_it_comes_and_after_a_reload(page: Page) -> None:
    with serving(Lines()) as running:
        open_page(page, running)
        ask(page, "So: | ```python | <b>print</b>(1) | ``` | and | ``` | x")
        answered(page)
        for _ in range(2):
            parts = page.run(f"[...{LAST}.children].map((one) => [one.tagName, one.textContent])")
            assert parts == [
                ["DIV", "So: "], ["PRE", "<b>print</b>(1) "], ["DIV", "and "], ["PRE", "x "],
            ]  # fmt: skip
            page.reload()


def test_a_server_with_a_key_asks_for_it(page: Page) -> None:
    with serving(guard=Guard(Keys(["sk-0123456789"]))) as running:
        page.with_credentials("anyone", "sk-0123456789")
        open_page(page, running)
        assert any(event["method"] == "Fetch.authRequired" for event in page.events)
        ask(page, "a b")
        assert answered(page) == "a b " and page.text("#model") == "scripted"


def test_what_is_refused_is_told_and_the_question_given_back(page: Page, server: Running) -> None:
    open_page(page, server)
    ask(page, "REFUSE")
    page.wait("document.querySelector('.error')")
    assert "refused" in page.text(".error") and ("alert", "Error") in page.parts
    page.wait(IDLE)
    assert page.run("document.querySelector('#text').value") == "REFUSE"
    assert page.run("document.querySelectorAll('.user, .assistant').length") == 0


def test_keys_write_lines_and_reach_all_there_is(page: Page, server: Running) -> None:
    open_page(page, server)
    page.write("a")
    height = "document.querySelector('#text').offsetHeight"
    low = page.run(height)
    page.press("Enter", SHIFT)
    page.write("b c")
    assert page.run("document.querySelector('#text').value") == "a\nb c" and page.run(height) > low
    page.press("Enter")
    assert answered(page) == "b c " and page.run(height) == low
    found = set()
    for _ in range(6):
        page.press("Tab")
        inside, outline = page.run(
            "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert outline == "solid" or not inside, "where the focus is must be seen"
        found.add(inside)
    assert found >= {"said", "new", "text", "send"}
    named = {
        ("heading", "scripted"), ("button", "New chat"), ("log", "Conversation"), ("group", "You"),
        ("group", "Answer"), ("textbox", "Message"), ("button", "Send"),
    }  # fmt: skip
    assert named <= set(page.parts)


@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_nothing_is_cut_off_and_all_can_be_read(page: Page, width: int, dark: bool) -> None:
    engine = Lines()
    name, where = "a-name-" + "that-is-long-" * 8, {"disk": 1 << 40, "host": 0, "device": 5 << 20}
    engine.facts = replace(engine.facts, name=name, where=where, max_length=9999)
    with serving(engine) as running:
        page.look(width, 800, dark=dark)
        open_page(page, running)
        ask(page, f"A {'w' * 500} | ``` | {'c' * 500} | ``` | {'said ' * 99}")
        answered(page)
        for place in ("html", "#said", "#form", "header", "footer"):
            found = f"document.querySelector('{place}')"
            needed, given = page.run(f"[{found}.scrollWidth, {found}.clientWidth]")
            assert needed <= given <= width, place
        for place in SEEN:
            assert page.run(f"({CONTRAST})(document.querySelector('{place}'))") >= 4.5, place
            box = f"document.querySelector('{place}').getBoundingClientRect()"
            left, right = page.run(f"[{box}.left, {box}.right]")
            assert 0 <= left < right <= width, place
        assert page.text("#where") == "5 MiB on the device · 1024.0 GiB on disk"
        said = "document.querySelector('#said')"
        assert page.run(f"{said}.scrollHeight - {said}.scrollTop - {said}.clientHeight") < 2
