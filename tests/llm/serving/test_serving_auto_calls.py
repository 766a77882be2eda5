"""tool_choice "auto" over a real engine: a call that a model has begun is one of a known tool."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from assets import tiny_checkpoint, tiny_model
from byte_model import TEMPLATE, byte_tokenizer
from serving import Running, events, serving, wait_for
from small_engine import drafts_always, make_engine
from tokenizers import AddedToken

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.serving.asking.bodies import ChatBody
from layer_streamer.llm.serving.asking.order import order_of_chat
from layer_streamer.llm.serving.asking.tooling import fitted
from layer_streamer.llm.serving.streamed import StreamedEngine

CHAT = "/v1/chat/completions"
MARK, END_MARK, THINK, END_THINK = 258, 259, 260, 261
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
PARAMETERS = {
    "type": "object", "properties": {"unit": {"$ref": "#/$defs/Unit"}, "deep": {"type": "boolean"}},
    "required": ["unit", "deep"], "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["celsius", "kelvin"]}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name in ("heat", "cool")
]


def hermes_model(directory: Path, template: str) -> Path:
    """A model that writes what a request's bias says, and its tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer.chat_template = template
    options = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32}
    model = tiny_model("qwen2", eos_token_id=257, max_position_embeddings=2048, **options)
    tokenizer.save_pretrained(tiny_checkpoint(directory, model))
    return directory


def opened(path: Path) -> StreamedEngine:
    return StreamedEngine(drafts_always(make_engine(path, max_length=512, kv_tokens=1024)), "bytes")


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    template = "{# <tool_call> </think> #}" + TEMPLATE
    path = hermes_model(tmp_path_factory.mktemp("hermes"), template)
    with serving(lambda: opened(path)) as running:
        wait_for(lambda: running.worker.status == "ready")
        yield running


def said(**more: Any) -> dict[str, Any]:
    """One that calls whenever it may, and else ends."""
    return {
        "messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "temperature": 1,
        "logit_bias": {str(MARK): 100, "257": 60}, "max_tokens": 120, **more,
    }  # fmt: skip


def chosen(running: Running, body: dict[str, Any]) -> Any:
    status, data = running.post(CHAT, body)
    assert status == 200, data
    return json.loads(data)


@pytest.mark.parametrize("choice", [{"tool_choice": "auto"}, {"temperature": 0}])
def test_calls_that_are_begun_are_of_known_tools_with_their_arguments(
    calling: Running, choice: dict[str, Any]
) -> None:
    for seed in range(2):
        found = chosen(calling, said(seed=seed, **choice))
        (one,) = found["choices"]
        calls = one["message"]["tool_calls"]
        assert calls and found["timings"]["draft_n_accepted"] > 20
        for call in calls:
            assert call["function"]["name"] in ("heat", "cool")
            arguments = json.loads(call["function"]["arguments"])
            assert set(arguments) == {"unit", "deep"}
            assert arguments["unit"] in ("celsius", "kelvin") and arguments["deep"] in (True, False)


def test_where_one_call_is_allowed_the_text_ends_behind_it(calling: Running) -> None:
    body = said(seed=1, max_tokens=400)
    (several,) = chosen(calling, body)["choices"]
    found = chosen(calling, body | {"parallel_tool_calls": False})
    (one,) = found["choices"]
    assert len(several["message"]["tool_calls"]) > 1
    functions = [call["function"] for call in one["message"]["tool_calls"]]
    assert functions == [several["message"]["tool_calls"][0]["function"]]
    assert one["finish_reason"] == "tool_calls" and found["usage"]["completion_tokens"] < 200


def test_a_streamed_call_is_that_of_the_whole_reply(calling: Running) -> None:
    body = said(seed=7)
    whole = chosen(calling, body)["choices"][0]["message"]["tool_calls"]
    status, data = calling.post(CHAT, body | {"stream": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in events(data)]
    streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert status == 200
    assert [c["function"] for c in streamed] == [c["function"] for c in whole]


def test_without_the_mark_the_text_is_that_of_a_request_without_a_call(calling: Running) -> None:
    bias = {str(MARK): -100, str(THINK): -100}
    body = said(seed=3, logit_bias=bias, max_tokens=40)
    with_tools = chosen(calling, body)
    without = chosen(calling, body | {"tool_choice": "none"})
    content = [one["choices"][0]["message"]["content"] for one in (with_tools, without)]
    assert content[0] == content[1] and with_tools["timings"].get("draft_n", 0) == 0


def test_a_mark_in_reasoning_begins_no_call(calling: Running) -> None:
    engine = calling.worker.engine
    assert isinstance(engine, StreamedEngine)
    (ready,) = engine.prepare(fitted(order_of_chat(ChatBody(**said())), engine.facts.template))
    held = ready.request.sampler.constraint
    for token in (THINK, 65, MARK, 66, END_THINK, 10):
        held.accept(token)
        assert not held.acts
    held.accept(MARK)
    assert held.acts


def test_without_llguidance_calls_are_read_and_free(
    calling: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    engine = calling.worker.engine
    assert isinstance(engine, StreamedEngine)
    monkeypatch.setattr(StreamingEngine, "vocabulary", property(_missing))
    assert calling.post(CHAT, said(max_tokens=4))[0] == 200


def _missing(engine: StreamingEngine) -> Any:
    raise ImportError("llguidance")
