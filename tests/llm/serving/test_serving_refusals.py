"""What is wrong with a constraint: told with the field of the request, and where in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_model
from scripted_served import QUICK, ScriptedServed
from serving import Running, head, serving, wait_for
from small_engine import make_engine

from layer_streamer.llm.batching.asked import Manner
from layer_streamer.llm.batching.job import BatchJob
from layer_streamer.llm.batching.results import Results
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.serving.streamed import StreamedEngine

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
BAD = {"type": "object", "properties": {"a": {"type": "nonsense"}}}


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


GOOD_TOOL, BAD_TOOL = tool("good", {"type": "object"}), tool("bad", BAD)
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}}
NAMED = {"type": "function", "function": {"name": "bad"}}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"grammar": 'root ::= "yes'}, "grammar", "line 1"),
    ({"guided_grammar": "start: nowhere"}, "guided_grammar", "line 1"),
    ({"guided_regex": "a(b"}, "guided_regex", "character 2"),
    ({"guided_json": BAD}, "guided_json", "at /properties/a"),
    ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex", "character 1"),
    ({"structured_outputs": {"json": BAD}}, "structured_outputs.json", "at /properties/a"),
]
WRONG_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": FORMAT}, "response_format", "at /properties/a"),
    ({"tools": [GOOD_TOOL, BAD_TOOL], "tool_choice": "required"},
     "tools[1].function.parameters", "/properties/a"),
    ({"tools": [GOOD_TOOL, BAD_TOOL], "tool_choice": NAMED},
     "tools[1].function.parameters", "/properties/a"),
    ({"tools": [GOOD_TOOL, BAD_TOOL]}, "tools[1].function.parameters", "/properties/a"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("bytes"), max_position_embeddings=2048)


def make(model: Path) -> StreamingEngine:
    return make_engine(model, max_length=1536, kv_tokens=1536)


@pytest.fixture(scope="module")
def small(model: Path) -> Iterator[Running]:
    with serving(lambda: StreamedEngine(make(model), "bytes")) as running:
        wait_for(lambda: running.worker.status == "ready")
        yield running


def said(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "?"}], "max_tokens": 4, **more}


def refusal(status: int, data: bytes) -> Any:
    error = json.loads(data)["error"]
    assert status == 400 and error["type"] == "invalid_request_error", error
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert error["message"].startswith(error["param"])
    return error


@pytest.mark.parametrize(("fields", "param", "where"), WRONG + WRONG_CHATS)
def test_a_chat_with_a_wrong_constraint_is_told_its_field_and_where(
    small: Running, fields: dict[str, Any], param: str, where: str
) -> None:
    error = refusal(*small.post(CHAT, said(stream=True, **fields)))
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert where in error["message"]


@pytest.mark.parametrize(("fields", "param", "where"), WRONG)
def test_a_plain_completion_with_a_wrong_constraint_is_told_its_field_and_where(
    small: Running, fields: dict[str, Any], param: str, where: str
) -> None:
    error = refusal(*small.post(PLAIN, {"prompt": "a", **fields}))
    assert error["param"] == param and where in error["message"]


def test_of_two_constraints_the_second_is_named_as_it_was_sent(small: Running) -> None:
    for fields, param in (
        ({"grammar": 'root ::= "a"', "structured_outputs": {"regex": "b"}},
         "structured_outputs.regex"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a", "guided_grammar": "b"}, "guided_grammar"),
    ):  # fmt: skip
        assert refusal(*small.post(CHAT, said(**fields)))["param"] == param


def test_what_is_wrong_with_a_prompt_names_no_constraint(small: Running) -> None:
    status, data = small.post(PLAIN, {"prompt": [999], "guided_regex": "a"})
    error = json.loads(data)["error"]
    assert status == 400 and "999" in error["message"] and error["param"] is None


def line(number: int, **fields: Any) -> str:
    body = said(**fields)
    return json.dumps({"custom_id": f"{number}", "method": "POST", "url": CHAT, "body": body})


def answered(model: Path, directory: Path, lines: list[str]) -> list[Any]:
    """The responses to lines of a batch, in their order."""
    source, output = directory / "in.jsonl", directory / "out.jsonl"
    source.write_text("\n".join(lines))
    with make(model) as engine, closing(Results(output)) as results:
        BatchJob(engine, source, results, Manner()).run()
    found = [json.loads(one) for one in output.read_text().splitlines()]
    return [one["response"] for one in sorted(found, key=lambda one: one["line"])]


def test_a_line_with_a_wrong_constraint_is_told_its_field_and_where(
    model: Path, tmp_path: Path
) -> None:
    lines = [line(number, **fields) for number, (fields, *_) in enumerate(WRONG + WRONG_CHATS)]
    found = answered(model, tmp_path, [*lines, line(99)])
    assert found.pop()["status_code"] == 200
    for response, (_, param, where) in zip(found, WRONG + WRONG_CHATS, strict=True):
        error = response["body"]["error"]
        assert (response["status_code"], error["param"]) == (400, param)
        assert where in error["message"]


def test_without_llguidance_a_request_is_told_which_extra_brings_it(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    formatted = {"response_format": {"type": "json_object"}}
    for fields, param in (({"guided_regex": "a"}, "guided_regex"), (formatted, "response_format")):
        error = refusal(*small.post(CHAT, said(**fields)))
        assert (error["param"], error["code"]) == (param, "not_installed")
        assert "pip install 'layer-streamer[serve]'" in error["message"]
    assert small.post(CHAT, said())[0] == 200


def test_without_llguidance_a_line_is_told_which_extra_brings_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    bad, good = answered(model, tmp_path, [line(1, guided_regex="a"), line(2)])
    error = bad["body"]["error"]
    assert (bad["status_code"], error["param"]) == (400, "guided_regex")
    assert "pip install 'layer-streamer[serve]'" in error["message"]
    assert good["status_code"] == 200


def test_what_a_body_says_wrong_is_told_before_that_the_queue_is_full() -> None:
    engine = ScriptedServed(rows=1, gate=True)
    full = serving(engine, limits=replace(QUICK, max_waiting=0))
    with full as running, running.connect() as held:
        body = json.dumps({"prompt": "a b c"}).encode()
        named = ("content-type: application/json", f"content-length: {len(body)}")
        held.sendall(head("POST", PLAIN, *named) + body)
        wait_for(lambda: running.worker.load.rows == 1)
        assert running.post(PLAIN, {"prompt": "late"})[0] == 429
        wrong: list[Any] = [b"{", {}, {"prompt": 3}, {"prompt": "x", "n": 10**6}]
        for sent in (*wrong, {"prompt": "x", "repeat_penalty": 0}):
            assert running.post(PLAIN, sent)[0] == 400
