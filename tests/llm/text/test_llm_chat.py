"""The chat: turns, Ctrl-C, what is prefilled again."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any

import interrupter
import pytest
from byte_model import byte_model
from paths import ROOT

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.text.chat import Chat, read_lines, run_chat

OPTIONS = {"max_new_tokens": 12, "temperature": 1.3, "seed": 4}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = byte_model(tmp_path_factory.mktemp("chat"))
    with StreamingEngine(directory, device="cpu") as engine:
        yield engine


class Screen:
    """What is written; presses Ctrl-C when the ``at``-th piece has come."""

    def __init__(self, at: int = -1) -> None:
        self.text, self._at = "", at

    def __call__(self, text: str) -> None:
        self.text += text
        self._at -= 1
        if self._at == 0:
            os.kill(os.getpid(), signal.SIGINT)


def expected(engine: StreamingEngine, messages: Any) -> str:
    return engine.generate(messages, **OPTIONS)


def test_answers_follow_the_whole_conversation(engine: StreamingEngine) -> None:
    screen = Screen()
    chat = Chat(engine, screen, OPTIONS)
    assert chat.answer("Hello") and chat.answer("And then?")
    first, second = (m["content"] for m in chat.messages if m["role"] == "assistant")
    assert screen.text == f"{first}\n{second}\n"
    assert first == expected(engine, chat.messages[:1])
    assert second == expected(engine, chat.messages[:3])


def test_only_what_is_new_is_prefilled(
    engine: StreamingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    forward = engine._runner.forward

    def spy(entries: Any, **options: Any) -> Any:
        counts.append(sum(len(ids) for _, ids in entries))
        return forward(entries, **options)

    monkeypatch.setattr(engine._runner, "forward", spy)
    chat = Chat(engine, lambda _: None, OPTIONS)
    chat.answer("Hello " * 20)
    chat.answer("More?")
    prompt, again = counts[0], counts[12]
    assert prompt > 120
    # The new question, the marks around it, and the answer where its text is other tokens.
    assert again < 75


@pytest.mark.parametrize("at", [1, 2, 4])
def test_ctrl_c_ends_the_answer_and_the_next_turn_is_right(
    engine: StreamingEngine, at: int
) -> None:
    screen = Screen(at)
    chat = Chat(engine, screen, OPTIONS)
    assert chat.answer("Hello") is False
    (said,) = (m["content"] for m in chat.messages if m["role"] == "assistant")
    whole = expected(engine, chat.messages[:1])
    assert whole.startswith(said) and len(said) < len(whole)
    assert chat.answer("And then?")
    assert chat.messages[3]["content"] == expected(engine, chat.messages[:3])


def test_lines_are_answered_until_the_input_ends(engine: StreamingEngine) -> None:
    lines = iter(["Hi", None, "/new", "Ho", " "])

    def ask() -> str:
        line = next(lines, EOFError)
        if line is None:
            raise KeyboardInterrupt
        if line is EOFError:
            raise EOFError
        return str(line)

    said: list[str] = []
    chat = Chat(engine, lambda _: None, OPTIONS)
    run_chat(chat, read_lines(ask), said.append)
    assert chat.messages == []
    assert [line for line in said[1:]] == [
        "(Ctrl-D ends the chat)",
        "(starting over)",
        "(starting over)",
    ]


def test_a_question_that_does_not_fit_is_forgotten_and_the_chat_goes_on(
    engine: StreamingEngine,
) -> None:
    said: list[str] = []
    chat = Chat(engine, lambda _: None, OPTIONS)
    run_chat(chat, iter(["one " * 300, "Hi"]), said.append)
    assert "the model's context is 256" in said[1] and "/new" in said[1]
    assert chat.messages[0]["content"] == "Hi"


@pytest.mark.parametrize(
    "stride", [997, pytest.param(53, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.parametrize("kv", ["device", "host"])
def test_after_an_interrupt_at_any_line_the_next_turn_is_right(
    engine: StreamingEngine, monkeypatch: pytest.MonkeyPatch, stride: int, kv: str
) -> None:
    monkeypatch.setattr(interrupter, "LIBRARY", str(ROOT / "layer_streamer" / "llm"))
    options = OPTIONS | {"max_new_tokens": 4}
    right = engine.generate([{"role": "user", "content": "Hello"}], **options)
    number, fired = stride // 2, True
    with StreamingEngine(engine.model, device="cpu", kv=kv) as small:
        while fired:
            chat = Chat(small, lambda _: None, options)
            with suppress(KeyboardInterrupt), interrupter.Interrupter(number, "line") as at:
                chat.answer("Hello")
            sys.settrace(None)
            fired = at.fired
            again = Chat(small, lambda _: None, options)
            assert again.answer("Hello") and again.messages[1]["content"] == right
            assert len(list(small._runner.kv.rows)) == 1
            number += stride
