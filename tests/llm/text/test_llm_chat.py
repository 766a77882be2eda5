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
from layer_streamer.llm.text.chat import COMMANDS, Chat, read_lines, run_chat

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


class Talk:
    """A chat that answers nothing, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.note = ""

    def answer(self, text: str) -> bool:
        self.asked.append(text)
        return True

    def start_over(self) -> None:
        self.asked.append("/new")


def talk(*lines: str | None) -> tuple[list[str], list[str]]:
    """What the model was asked, and what was said, of a chat with these lines (None: Ctrl-C)."""
    chat, said = Talk(), list[str]()
    run_chat(chat, iter(lines), said.append)  # type: ignore[arg-type]
    return chat.asked, said[1:]


def test_lines_are_read_until_the_input_ends() -> None:
    lines = iter(["Hi", KeyboardInterrupt, "Ho", EOFError, "never"])

    def ask() -> str:
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    assert list(read_lines(ask)) == ["Hi", None, "Ho"]


def test_an_empty_line_is_no_turn() -> None:
    assert talk("", "Hi", "  ", "\t", "Ho") == (["Hi", "Ho"], [])


def test_new_forgets_the_conversation_and_exit_ends_the_chat() -> None:
    assert talk("Hi", "/new ", "Ho", "/exit", "never")[0] == ["Hi", "/new", "Ho"]


def test_help_names_every_command() -> None:
    asked, said = talk("/help")
    assert asked == [] and all(name in said[0] for name in COMMANDS)


@pytest.mark.parametrize("text", ["/nwe", "/", "/set temperature 1", "/?"])
def test_an_unknown_command_is_said_to_be_one_and_is_not_sent(text: str) -> None:
    asked, (said,) = talk(text)
    assert asked == [] and said.startswith(f"{text} is no command") and "/new" in said


@pytest.mark.parametrize("text", ["/usr/bin/env: what is it?", " /nwe", "/a\n/b", "a /new"])
def test_what_only_begins_like_a_command_is_sent(text: str) -> None:
    assert talk(text) == ([text], [])


def test_two_interrupts_in_a_row_end_the_chat_where_nothing_is_answered() -> None:
    assert talk(None, "Hi", None, None, "never")[0] == ["Hi"]


def test_an_answer_that_ends_at_the_limit_says_so(engine: StreamingEngine) -> None:
    chat = Chat(engine, lambda _: None, OPTIONS)
    said: list[str] = []
    run_chat(chat, iter(["Hi"]), said.append)
    assert said[1].startswith("(ended at 12 tokens") and "--max-new-tokens" in said[1]


def test_an_answer_may_fill_the_context_and_then_says_so(engine: StreamingEngine) -> None:
    options = {name: OPTIONS[name] for name in ("temperature", "seed")}
    chat, said = Chat(engine, lambda _: None, options), list[str]()
    run_chat(chat, iter(["one " * 50, "Hi"]), said.append)
    assert said[1] == "(ended: the conversation fills its 256 tokens, /new starts over)"
    assert said[2].startswith("error: the conversation does not fit any more") and len(said) == 3


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
