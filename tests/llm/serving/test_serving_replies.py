"""The shapes of replies, and how streams are written."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.llm.reading.choice_text import ChoiceText
from layer_streamer.llm.reading.hermes import Hermes
from layer_streamer.llm.reading.reasoning import ReasoningSplitter
from layer_streamer.llm.serving.api_error import ApiError
from layer_streamer.llm.serving.replying.replies import (
    Envelope,
    chat_logprobs,
    delta_message,
    message,
    plain_logprobs,
    timings,
    usage,
)
from layer_streamer.llm.serving.replying.sse import DONE, PING, event
from layer_streamer.llm.serving.working.pieces import Account, Piece, ScoredToken

ANY_TEXT = st.text(st.characters())


@given(text=ANY_TEXT)
def test_an_event_is_one_line_whatever_its_text(text: str) -> None:
    written = event({"text": text})
    assert written.startswith(b"data: ") and written.endswith(b"\n\n")
    line = written[6:-2].decode("ascii")
    assert len(line.splitlines()) == 1
    assert json.loads(line) == {"text": text}


def test_pings_are_comments_and_the_end_is_openais() -> None:
    assert PING.startswith(b":") and PING.endswith(b"\n\n") and DONE == b"data: [DONE]\n\n"


def test_an_error_has_openais_shape() -> None:
    body = ApiError(400, "n: too many", param="n", code="invalid_value").body
    assert body == {"error": {"message": "n: too many", "type": "invalid_request_error",
                              "param": "n", "code": "invalid_value"}}  # fmt: skip


TEXT = '<think>hm</think> Well. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@given(st.lists(st.integers(0, len(TEXT)), max_size=6))
def test_where_one_call_is_allowed_nothing_behind_the_first_is_told(places: list[int]) -> None:
    text = f"{TEXT} And again. {TEXT}"
    edges = [0, *sorted(places), len(text)]
    one = ChoiceText(ReasoningSplitter(inside=False), Hermes(), several=False)
    deltas = [one.push(text[a:b]) for a, b in pairwise(edges)]
    deltas.append(one.finish())
    assert [call.name for delta in deltas for call in delta.calls] == ["f"]
    assert "".join(delta.answer for delta in deltas).strip() == one.whole.answer.strip() == "Well."
    assert [call.name for call in one.whole.calls] == ["f"]
    assert one.reason("stop") == one.reason("length") == "tool_calls"


@given(st.lists(st.integers(0, len(TEXT)), max_size=6))
def test_what_a_stream_brings_together_is_the_whole_answer(places: list[int]) -> None:
    edges = [0, *sorted(places), len(TEXT)]
    one = ChoiceText(ReasoningSplitter(inside=False), Hermes())
    deltas = [one.push(TEXT[a:b]) for a, b in pairwise(edges)]
    deltas.append(one.finish())
    envelope = Envelope("chat.completion", "m", "hermes")
    streamed: dict[str, Any] = {}
    calls: list[Any] = []
    for delta in deltas:
        shape = delta_message(envelope, delta, len(calls))
        calls += shape.pop("tool_calls", [])
        for name, text in shape.items():
            streamed[name] = streamed.get(name, "") + text
    assert streamed == {"reasoning_content": "hm", "content": "Well."}
    assert [call["index"] for call in calls] == [0]
    whole = message(envelope, one.whole)
    assert whole["content"] == "Well." and whole["reasoning_content"] == "hm"
    (call,) = whole["tool_calls"]
    assert call["function"] == calls[0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert one.reason("stop") == "tool_calls" and one.reason("length") == "length"


def test_chunks_and_documents_say_what_they_are() -> None:
    chat, plain = Envelope("chat.completion", "m"), Envelope("text_completion", "m")
    assert chat.chunk([])["object"] == "chat.completion.chunk"
    assert plain.chunk([])["object"] == plain.document([])["object"] == "text_completion"
    assert chat.id.startswith("chatcmpl-") and plain.id.startswith("cmpl-")
    assert chat.chunk([], usage=None)["usage"] is None


def test_logprobs_of_minus_infinity_are_numbers_that_json_has() -> None:
    token = ScoredToken("a", [97], -0.5, (ScoredToken("b", [98], -math.inf),))
    (entry,) = chat_logprobs([token])["content"]
    assert entry["bytes"] == [97] and entry["top_logprobs"][0]["logprob"] == -9999.0
    plain = plain_logprobs([token, token], offset=3)
    assert plain["text_offset"] == [3, 4] and plain["top_logprobs"][0] == {"b": -9999.0}
    json.dumps([entry, plain], allow_nan=False)


def test_prompts_count_once_however_many_texts_are_made_of_them() -> None:
    accounts = [Account(10, 3), Account(10, 4), Account(7, 1), Account(7, 2, cached_tokens=5)]
    found = usage(accounts, n=2)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (17, 10)
    assert found["total_tokens"] == 27


def test_timings_are_those_of_texts_side_by_side_and_divide_by_nothing() -> None:
    found = timings([Account(4, 5, 0, 1.0, 2.0, 5, 8, 3), Account(4, 3, 0, 2.0, 1.0, 9)])
    assert found["prompt_ms"] == found["predicted_ms"] == 2000.0
    assert found["predicted_per_second"] == pytest.approx(3.0)
    assert (found["passes"], found["draft_n"], found["draft_n_accepted"]) == (9, 8, 3)
    assert all(math.isfinite(value) for value in timings([]).values())


@given(st.lists(st.tuples(st.text(), st.integers(0, 5)), min_size=1))
def test_pieces_that_wait_become_one_with_nothing_lost(parts: list[tuple[str, int]]) -> None:
    pieces = [Piece(text, tokens) for text, tokens in parts]
    pieces[-1].finish_reason = "stop"
    first, *others = pieces
    for piece in others:
        first.join(piece)
    assert first.text == "".join(text for text, _ in parts)
    assert first.tokens == sum(tokens for _, tokens in parts)
    assert first.ends and first.finish_reason == "stop"
