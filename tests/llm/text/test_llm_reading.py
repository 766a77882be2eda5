"""Chats with models that think before they answer: what is shown, kept, and sent again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from byte_model import byte_tokenizer
from channel_models import ANSWER, Script, channel_model
from paths import ROOT

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.reading.harmony import BETWEEN, FINAL
from layer_streamer.llm.reading.reader import Reader
from layer_streamer.llm.request import Request
from layer_streamer.llm.text.chat import Chat, run_chat

GOLDEN = [
    case
    for case in json.loads((ROOT / "tests/data/harmony.json").read_text(encoding="utf-8"))
    if all(to is None for _, to, _ in case["messages"])
]
"""Made by openai-harmony: texts without calls, and the messages that it finds in them."""
OPTIONS = {"max_new_tokens": 200, "temperature": 0.0}
THINKING = "{% for m in messages %}{{ m.content }}\n{% endfor %}{{ '</think>' if false }}"


class Scripted(StreamingEngine):
    """Its texts are known."""

    script = ""

    def requests(self, prompts: Any, **options: Any) -> Iterator[Request]:
        for request in super().requests(prompts, **options):
            tokens = self.vocabulary.cut(self.script.encode())
            request.sampler.constraint = Script(tokens)  # type: ignore[assignment]
            yield request


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    path = channel_model(tmp_path_factory.mktemp("channels"))
    with Scripted(path, device="cpu") as engine:
        yield engine


class Heard:
    """A chat, and what was said and thought in it."""

    def __init__(self, engine: StreamingEngine, **options: Any) -> None:
        self.said, self.thought = "", ""
        self.chat = Chat(engine, self.say, OPTIONS | options, self.think)

    def say(self, text: str) -> None:
        self.said += text

    def think(self, text: str) -> None:
        self.thought += text


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_a_chat_shows_and_keeps_what_openais_own_reader_finds(
    engine: Scripted, case: dict[str, Any]
) -> None:
    parts = {
        name: BETWEEN.join(text for channel, _, text in case["messages"] if channel == name)
        for name in ("analysis", "final")
    }
    heard, engine.script = Heard(engine), case["text"]
    cut = "final" not in case["text"]  # it was ended where it thinks, and so is this
    if cut:
        heard = Heard(engine, max_new_tokens=len(engine.vocabulary.cut(case["text"].encode())))
    assert heard.chat.answer("Hello")
    assert heard.said == parts["final"] + "\n"
    assert heard.thought == parts["analysis"]
    assert heard.chat.messages[1] == {"role": "assistant", "content": parts["final"]}
    assert bool(heard.chat.note) == cut


def test_the_next_turn_is_sent_the_answer_and_none_of_the_reasoning(engine: Scripted) -> None:
    heard, engine.script = Heard(engine), ANSWER
    asked: list[str] = []
    encode = engine.encode

    def listen(messages: Any, *options: Any) -> list[int]:
        ids = encode(messages, *options)
        asked.append(engine.tokenizer.decode(ids))
        return ids

    engine.encode = listen  # type: ignore[method-assign]
    try:
        assert heard.chat.answer("Hello") and heard.chat.answer("And then?")
    finally:
        del engine.encode  # type: ignore[method-assign]
    assert f"assistant{FINAL}Well, 😀.<|end|><|start|>user" in asked[1]
    assert "analysis" not in asked[1]


def test_ctrl_c_while_the_model_thinks_leaves_an_empty_answer(engine: Scripted) -> None:
    heard, engine.script = Heard(engine), ANSWER
    think = heard.think

    def press(text: str) -> None:
        think(text)
        os.kill(os.getpid(), signal.SIGINT)

    chat = Chat(engine, heard.say, OPTIONS, press)
    assert not chat.answer("Hello")
    assert heard.said == "\n" and "Hm, é.".startswith(heard.thought) and heard.thought
    assert chat.messages[1] == {"role": "assistant", "content": ""}
    chat._think = think
    assert chat.answer("Again?") and chat.messages[3]["content"] == "Well, 😀."


def test_an_answer_that_ends_while_the_model_thinks_says_so(engine: Scripted) -> None:
    heard, engine.script = Heard(engine, max_new_tokens=14), ANSWER
    noted: list[str] = []
    run_chat(heard.chat, iter(["Hello"]), noted.append)
    assert (heard.said, heard.thought) == ("\n", "Hm, ")
    assert noted[1].startswith("(ended at 14 tokens")


def test_who_wants_special_tokens_gets_the_text_as_it_is(engine: Scripted) -> None:
    heard, engine.script = Heard(engine, skip_special_tokens=False), ANSWER
    assert heard.chat.answer("Hello")
    assert (heard.said, heard.thought) == (f"{ANSWER}\n", "")


@pytest.mark.parametrize("options", [{"regex": "[a-c]{3}"}, {"schema": {"const": 7}}])
def test_a_text_in_channels_that_is_held_to_a_form_is_the_answers_message(
    engine: Scripted, options: dict[str, Any]
) -> None:
    reader = Reader(engine.tokenizer, options)
    ids = engine.encode([{"role": "user", "content": "Hello"}])
    begun = reader.begin(ids)
    assert engine.tokenizer.decode(begun) == engine.tokenizer.decode(ids) + FINAL
    assert reader.begin(begun) == begun
    (delta,) = [reader.text(begun).push("abc")]
    assert (delta.answer, delta.reasoning) == ("abc", "")
    assert Reader(engine.tokenizer).begin(ids) == ids
    assert Reader(engine.tokenizer, options, raw=True).begin(ids) == ids


@pytest.mark.parametrize(
    ("prompt", "text", "told"),
    [
        ("x", "<think>\na\n</think>\n\nb", ("b", "a")), ("x<think>\n", "a</think>b", ("b", "a")),
        ("x", "b", ("b", "")), ("x", "b<think>a</think>", ("b<think>a</think>", "")),
        ("x<think>\n\n</think>", "b", ("b", "")), ("x", "<think>a", ("", "a")),
    ],
)  # fmt: skip
def test_reasoning_between_marks_is_told_apart_for_templates_that_know_it(
    prompt: str, text: str, told: tuple[str, str]
) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(prompt)
    for template, want in ((THINKING, told), (tokenizer.chat_template, (text, ""))):
        tokenizer.chat_template = template
        for options in ({}, {"temperature": 1.0}):
            read = Reader(tokenizer, options).text(ids)
            assert not [read.push(piece) for piece in text if not piece]
            for piece in text:
                read.push(piece)
            read.finish()
            assert (read.whole.answer, read.whole.reasoning) == want
    tokenizer.chat_template = THINKING
    for reader in (Reader(tokenizer, {"regex": ".*"}), Reader(tokenizer, raw=True)):
        assert reader.text(ids).push(text).answer == text
        assert "skip_special_tokens" not in reader.options
