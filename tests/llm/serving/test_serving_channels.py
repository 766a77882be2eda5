"""gpt-oss behind the server: a tiny model whose tokenizer has the marks of channels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from channel_models import (
    ANSWER,
    CHANNEL,
    END,
    MARKS,
    MESSAGE,
    RETURN,
    START,
    THOUGHT,
    TO,
    Script,
    channel_model,
)
from serving import Running, events, serving, wait_for
from small_engine import drafts_always, make_engine

from layer_streamer.llm.serving.asking.bodies import ChatBody
from layer_streamer.llm.serving.asking.order import Order, order_of_chat
from layer_streamer.llm.serving.asking.tooling import fitted
from layer_streamer.llm.serving.streamed import StreamedEngine
from layer_streamer.llm.serving.working.served import Ready

CHAT = "/v1/chat/completions"
PARAMETERS = {
    "type": "object", "properties": {"unit": {"$ref": "#/$defs/Unit"}, "deep": {"type": "boolean"}},
    "required": ["unit", "deep"], "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["celsius", "kelvin"]}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name in ("heat", "cool")
]
CALLING = f"{THOUGHT} to=functions.heat<|channel|>commentary json<|message|>"


class Saying(StreamedEngine):
    """Its texts are what their prompts say, if they do."""

    def prepare(self, order: Order) -> Sequence[Ready]:
        found = super().prepare(order)
        text = str(order.prompts[0][-1]["content"]).partition("SAY ")[2]
        if text:
            tokens = self._engine.vocabulary.cut(text.encode())
            for one in found:
                one.request.sampler.constraint = Script(tokens)
        return found


def opened(path: Path) -> Saying:
    return Saying(drafts_always(make_engine(path, max_length=768, kv_tokens=2048)), "oss")


@pytest.fixture(scope="module")
def oss(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = channel_model(tmp_path_factory.mktemp("oss"))
    with serving(lambda: opened(path)) as running:
        wait_for(lambda: running.worker.status == "ready")
        yield running


def says(text: str, **more: Any) -> dict[str, Any]:
    """A body to which the answer is this text."""
    return {"messages": [{"role": "user", "content": f"SAY {text}"}], "max_tokens": 300, **more}


def reply(running: Running, body: dict[str, Any]) -> Any:
    status, data = running.post(CHAT, body)
    assert status == 200, data
    return json.loads(data)


def streamed(running: Running, body: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The message that the deltas of a stream make, and its chunks."""
    status, data = running.post(CHAT, body | {"stream": True})
    assert status == 200, data
    found: dict[str, Any] = {}
    chunks = events(data)
    for chunk in chunks:
        for name, value in chunk["choices"][0]["delta"].items():
            found[name] = found[name] + value if name in found else value
    return found, chunks


def prepared(running: Running, **body: Any) -> Ready:
    engine = running.worker.engine
    assert isinstance(engine, StreamedEngine)
    template = engine.facts.template
    (ready,) = engine.prepare(fitted(order_of_chat(ChatBody(**body)), template))
    return ready


def test_channels_are_the_fields_of_a_reply_and_of_a_stream(oss: Running) -> None:
    (choice,) = reply(oss, says(ANSWER))["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "Well, 😀."
    assert choice["message"]["reasoning_content"] == "Hm, é."
    found, chunks = streamed(oss, says(ANSWER))
    assert (found["content"], found["reasoning_content"]) == ("Well, 😀.", "Hm, é.")
    told = [c["choices"][0]["delta"].get("reasoning_content") for c in chunks]
    assert len(list(filter(None, told))) >= 5, "it comes as it is made"


def test_a_call_ends_its_turn_even_if_the_config_does_not_say_so(oss: Running) -> None:
    call = '{"unit": "kelvin", "deep": true}'
    body = says(f"{CALLING}{call}<|call|><|start|>more", tools=TOOLS)
    (choice,) = reply(oss, body)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (made,) = choice["message"]["tool_calls"]
    assert made["function"] == {"name": "heat", "arguments": call}
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "Hm, é."
    found, chunks = streamed(oss, body)
    assert found["tool_calls"][0]["function"] == made["function"] and not found["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_end_of_a_message_ends_no_turn_whatever_the_config_says(tmp_path: Path) -> None:
    with serving(lambda: opened(channel_model(tmp_path, [RETURN, END]))) as running:
        wait_for(lambda: running.worker.status == "ready")
        message = reply(running, says(ANSWER))["choices"][0]["message"]
        assert message["content"] == "Well, 😀."


@pytest.mark.parametrize("choice", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_a_call_without_tools_is_text(oss: Running, choice: dict[str, Any]) -> None:
    (found,) = reply(oss, says(f"{CALLING}{{}}<|call|>", **choice))["choices"]
    assert found["finish_reason"] == "stop" and "tool_calls" not in found["message"]
    head = CALLING.removeprefix(THOUGHT)
    assert found["message"]["content"] == f"<|start|>assistant{head}{{}}"


def test_a_text_that_is_cut_in_its_reasoning_has_no_answer(oss: Running) -> None:
    (found,) = reply(oss, says(ANSWER, max_tokens=14))["choices"]
    assert found["finish_reason"] == "length"
    assert found["message"]["reasoning_content"] == "Hm, "
    assert not found["message"]["content"]


def test_logprobs_in_channels_are_of_every_token(oss: Running) -> None:
    found = reply(oss, says(ANSWER, logprobs=True))
    tokens = [one["token"] for one in found["choices"][0]["logprobs"]["content"]]
    assert len(tokens) == found["usage"]["completion_tokens"]
    assert [token for token in tokens if token in MARKS] == [
        "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>",
        "<|return|>",
    ]  # fmt: skip


def test_a_stop_string_ends_a_text_in_channels(oss: Running) -> None:
    (found,) = reply(oss, says(ANSWER, stop=["l, "]))["choices"]
    assert found["finish_reason"] == "stop" and found["message"]["content"] == "Wel"


def begins_calls(**more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "temperature": 1,
        "logit_bias": {str(TO): 100}, "max_tokens": 200, **more,
    }  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"parallel_tool_calls": False}])
def test_calls_that_are_begun_in_channels_are_of_known_tools(
    oss: Running, more: dict[str, Any]
) -> None:
    for seed in range(3):
        (one,) = reply(oss, begins_calls(seed=seed, **more))["choices"]
        (call,) = one["message"]["tool_calls"]
        check(call, ("heat", "cool"))
        assert one["finish_reason"] == "tool_calls" and not one["message"]["content"]


def check(call: Any, names: Sequence[str]) -> None:
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] in names and set(arguments) == {"unit", "deep"}
    assert arguments["unit"] in ("celsius", "kelvin") and arguments["deep"] in (True, False)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ("heat", "cool")),
        ({"type": "function", "function": {"name": "cool"}}, ("cool",)),
    ],
)
def test_a_call_that_is_asked_for_comes_in_its_channel(
    oss: Running, choice: Any, names: Sequence[str]
) -> None:
    asked = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "max_tokens": 200,
             "tool_choice": choice, "temperature": 1, "logprobs": True}  # fmt: skip
    seen = set()
    for seed in range(3):
        (one,) = reply(oss, asked | {"seed": seed})["choices"]
        (call,) = one["message"]["tool_calls"]
        check(call, names)
        seen.add(call["function"]["name"])
        assert one["finish_reason"] == "tool_calls" and one["message"]["content"] is None
        text = "".join(token["token"] for token in one["logprobs"]["content"])
        name = call["function"]["name"]
        head = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        assert text.startswith(f"{head}{{") and text.endswith("}<|call|>")


def test_a_tool_whose_schema_is_wrong_is_named_before_a_call_in_its_channel(oss: Running) -> None:
    wrong = {"type": "object", "properties": {"a": {"type": "nonsense"}}}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in (("good", {"type": "object"}), ("odd", wrong))
    ]
    body = says("", tools=tools, tool_choice="required")
    status, data = oss.post(CHAT, body)
    assert status == 400, data
    assert json.loads(data)["error"]["param"] == "tools[1].function.parameters", data


def test_a_mark_outside_of_heads_begins_no_call(oss: Running) -> None:
    held = prepared(oss, **begins_calls()).request.sampler.constraint
    for token in (CHANNEL, *b"analysis", MESSAGE, TO, 65, END, START, *b"assistant"):
        held.accept(token)
        assert not held.acts
    held.accept(TO)
    assert held.acts


def test_what_is_constrained_is_the_answer_in_its_channel(oss: Running) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 40}
    (one,) = reply(oss, asked | {"response_format": form})["choices"]
    assert set(json.loads(one["message"]["content"])) == {"a"}
    assert "reasoning_content" not in one["message"] and one["finish_reason"] == "stop"
    ready = prepared(oss, **asked, response_format=form)
    assert list(ready.ids[-7:]) == [CHANNEL, *b"final", MESSAGE]
    free = prepared(oss, **asked)
    assert list(ready.ids[:-7]) == list(free.ids)


def test_a_message_that_is_continued_goes_on_in_its_channel(oss: Running) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Well"}]
    asked = {"messages": messages, "continue_final_message": True, "max_tokens": 8}
    bias = {str(token): -100 for token in range(258, 266)}
    (one,) = reply(oss, asked | {"logit_bias": bias, "temperature": 1})["choices"]
    assert one["message"]["content"] and "reasoning_content" not in one["message"]
    ready = prepared(oss, **asked, response_format={"type": "json_object"})
    assert bytes(ready.ids[-4:]) == b"Well"


def test_messages_and_effort_reach_the_template_as_it_reads_them(oss: Running) -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": '{"a": 1}'}}
        for name in ("heat", "cool")
    ]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "See.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "cool", "content": "two"},
        {"role": "tool", "tool_call_id": "heat", "content": "one"},
        {"role": "assistant", "content": "So.", "reasoning": "Yes."},
    ]
    body = {"messages": messages, "tools": TOOLS, "reasoning_effort": "high"}
    engine, ready = oss.worker.engine, prepared(oss, **body)
    _, data = oss.post("/tokenize", {"messages": messages})
    assert json.loads(data)["count"] == len(ready.ids) + len("medium") - len("high")
    assert engine.detokenize(ready.ids) == (
        "<|start|>system<|message|>high<|end|><|start|>user<|message|>?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Hm.\n\nSee.<|end|>"
        '<|start|>assistant to=functions.heat<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        "<|start|>tool<|message|>one<|end|>"
        '<|start|>assistant to=functions.cool<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        "<|start|>tool<|message|>two<|end|>"
        "<|start|>assistant<|channel|>final<|message|>So.<|end|><|start|>assistant"
    )
