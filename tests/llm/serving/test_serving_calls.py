"""Calls of tools in texts of five families, however the texts are cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.llm.constraints.schema import Nodes, parts_of, read_schema, refer
from layer_streamer.llm.reading.families import family_of, new_call_id, parser_of
from layer_streamer.llm.reading.forced import forced_schema
from layer_streamer.llm.reading.found import Call
from layer_streamer.llm.reading.generic import generic_schema, instructions

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "deep": {"type": "object"}}}}}
    for name in ("weather", "find")
]  # fmt: skip
ARGUMENTS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    ),
    max_size=3,
)
CALLS = st.lists(st.tuples(st.sampled_from(["weather", "find"]), ARGUMENTS), min_size=1, max_size=3)
NASTY = st.lists(st.sampled_from([
    "<tool_call>", "</tool_call>", "{", "}", '"', "\\", "[TOOL_CALLS]", "[ARGS]", "name", ";",
    '{"name": "find", "arguments": {}}', '{"name": "find", "parameters": {}}', "<function=f>",
    "<parameter=a>", "</parameter>", "</function>", "<|python_tag|>", "<|eom_id|>", "[", "]",
    '{"response": "', '{"tool_call": {"name": "find"}}', "\\ud83d", "\\ude00", " ", "\n", "a",
    "<tool_", "call>", "<|eom", "_id|>",
]), max_size=12).map("".join)  # fmt: skip
FAMILIES = ("coder", "hermes", "mistral", "llama", "generic", "forced")


def found(family: str, pieces: Sequence[str]) -> list[str | Call]:
    """What a parser finds; neighbouring texts as one."""
    parser = parser_of(family, TOOLS, forced=family == "forced")
    merged: list[str | Call] = []
    for one in [one for piece in pieces for one in parser.push(piece)] + parser.finish():
        if isinstance(one, str) and merged and isinstance(merged[-1], str):
            merged[-1] += one
        else:
            merged.append(one)
    return merged


def cut(text: str, places: Sequence[int]) -> list[str]:
    """The text in pieces."""
    edges = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def written(family: str, calls: Sequence[tuple[str, Any]]) -> str:
    """As a model of the family writes them."""
    if family == "hermes":
        one = "<tool_call>\n{}\n</tool_call>"
        return "\n".join(one.format(json.dumps({"name": n, "arguments": a})) for n, a in calls)
    if family == "llama":
        return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)
    if family == "mistral":
        return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)
    if family == "forced":
        return json.dumps([{"name": n, "arguments": a} for n, a in calls])
    assert family == "generic"
    return json.dumps({"tool_call": {"name": calls[0][0], "arguments": calls[0][1]}})


def read(found: Sequence[str | Call]) -> list[Any]:
    return [(c.name, json.loads(c.arguments)) if isinstance(c, Call) else c for c in found]


@pytest.mark.parametrize("family", ["hermes", "llama", "mistral", "forced", "generic"])
@settings(max_examples=30, deadline=None)
@given(calls=CALLS, places=st.lists(st.integers(0, 400), max_size=8))
def test_calls_are_read_whatever_they_hold_and_however_they_are_cut(
    family: str, calls: list[tuple[str, Any]], places: list[int]
) -> None:
    expected = calls[:1] if family == "generic" else calls
    assert read(found(family, cut(written(family, calls), places))) == expected


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(text=NASTY, places=st.lists(st.integers(0, 200), max_size=10))
def test_what_is_found_does_not_go_by_the_cuts(family: str, text: str, places: list[int]) -> None:
    whole = found(family, [text])
    assert found(family, cut(text, places)) == whole
    assert found(family, list(text)) == whole


@pytest.mark.parametrize("family", ["coder", "hermes", "mistral", "llama", "forced"])
@settings(max_examples=30, deadline=None)
@given(text=NASTY)
def test_a_text_without_calls_is_passed_on_whole(family: str, text: str) -> None:
    text = text.replace("<|eom_id|>", "")
    told = found(family, [text])
    if all(isinstance(one, str) for one in told):
        assert "".join(map(str, told)) == text


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("hermes", 'Well.\n\n<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>\nSo.'),
        ("mistral", 'Well. [TOOL_CALLS] [{"name": "find", "arguments": {}}] So.'),
        ("llama", 'Well. <|python_tag|>{"name": "find", "parameters": {}}<|eom_id|> So.'),
        ("coder", "Well. <tool_call>\n<function=find>\n</function>\n</tool_call> So."),
        ("coder", "Well. <function=find></function>So."),
    ],
)
def test_text_around_a_call_is_told_without_the_white_space_between(family: str, text: str) -> None:
    assert read(found(family, list(text))) == ["Well.", ("find", {}), "So."]


def test_values_of_xml_calls_have_the_types_of_the_schema() -> None:
    given = {"city": "12", "days": "3", "deep": '{"a": [1]}', "other": "True", "more": "x < y\n"}
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in given.items())
    text = f"<tool_call>\n<function=weather>\n{parameters}</function>\n</tool_call>"
    assert read(found("coder", list(text))) == [
        ("weather", {"city": "12", "days": 3, "deep": {"a": [1]}, "other": True, "more": "x < y\n"})
    ]


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("hermes", '<tool_call>{"name": "find", "arguments": {"city": "</tool_call>"}}'),
        ("hermes", '<tool_call>{"name": "find", "arguments": "{\\"city\\": \\"</tool_call>\\"}"}'),
        ("mistral", '[TOOL_CALLS]find[CALL_ID]abc123def[ARGS]{"city": "</tool_call>"}'),
        ("mistral", '[TOOL_CALLS]find{"city": "</tool_call>"}'),
        ("llama", '<|python_tag|> {"name": "find", "arguments": {"city": "</tool_call>"}}'),
    ],
)
def test_models_that_write_calls_a_little_otherwise_are_understood(family: str, text: str) -> None:
    assert read(found(family, list(text))) == [("find", {"city": "</tool_call>"})]


def test_a_response_of_the_generic_way_comes_as_it_is_written() -> None:
    text = 'a "b" \\ \n é 😀 \x7f ]}'
    parser = parser_of("generic", TOOLS, forced=False)
    pieces = [parser.push(piece) for piece in json.dumps({"response": text})]
    assert "".join(str(one) for piece in pieces for one in piece) == text
    assert sum(map(bool, pieces)) > len(text) // 2, "it was held back"


def test_a_long_call_is_read_in_a_time_that_goes_by_its_length() -> None:
    text = written("hermes", [("find", {"city": '\\"{' * 10_000})])
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    assert read(found("hermes", pieces)) == [("find", {"city": '\\"{' * 10_000})]


@pytest.mark.parametrize(
    ("template", "family"),
    [
        (None, "generic"), ("{{ messages }}", "generic"),
        ("'<tool_call>\\n' ... <function=", "coder"), ("<tool_call>", "hermes"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"), ("<|python_tag|>", "llama"),
        ('Environment: ipython ... "parameters": dict', "llama"),
    ],
)  # fmt: skip
def test_the_chat_template_tells_the_family(template: str | None, family: str) -> None:
    assert family_of(template) == family


def test_call_ids_are_those_that_templates_take() -> None:
    ids = {new_call_id("mistral") for _ in range(50)}
    assert len(ids) == 50 and all(len(i) == 9 and i.isalnum() and i.isascii() for i in ids)
    assert new_call_id("hermes") != new_call_id("hermes")


def test_schemas_of_forced_calls_name_each_tool_with_its_parameters() -> None:
    several = forced_schema(TOOLS, None, several=True)
    assert [one["properties"]["name"]["const"] for one in several["items"]["anyOf"]] == [
        "weather", "find",
    ]  # fmt: skip
    one = forced_schema(TOOLS, "find", several=True)
    assert one["properties"]["arguments"] == TOOLS[1]["function"]["parameters"]
    assert forced_schema(TOOLS, None, several=False) == several["items"]


def refers(name: str) -> dict[str, Any]:
    """A tool whose schema refers to its own parts, and to itself."""
    parameters = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:{name}",
        "type": "object", "required": ["unit"], "additionalProperties": False,
        "properties": {"unit": {"$ref": "#/$defs/Unit"}, "inner": {"$ref": "#"}},
        "$defs": {"Unit": {"enum": [f"{name} 1", f"{name} 2"]}},
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize("tools", [[refers("f")], [refers("f"), refers("g")]])
def test_what_a_tools_schema_refers_to_goes_with_it(tools: list[dict[str, Any]]) -> None:
    before = json.dumps(tools)
    for schema in (
        forced_schema(tools, None, several=True), forced_schema(tools, None, several=False),
        forced_schema(tools, "f", several=True), generic_schema(tools),
    ):  # fmt: skip
        pending, units, names = [("", schema)], set(), set()
        for pointer, part in pending:
            if "$ref" in part:
                _, target = refer(schema, pointer, part["$ref"])
                assert target.get("required") == ["unit"] or "enum" in target
                units |= {unit[0] for unit in target.get("enum", [])}
            names |= {part["const"]} if "const" in part else set()
            pending += [(pointer + at, inner) for at, inner in parts_of(part)]
        assert units == names
        assert Nodes(read_schema(schema)).depth
    assert json.dumps(tools) == before


def test_a_model_that_knows_no_tools_is_told_of_them() -> None:
    assert all(f'"name": "{name}"' in instructions(TOOLS) for name in ("weather", "find"))
    assert {next(iter(o["properties"])) for o in generic_schema(TOOLS)["anyOf"]} == {
        "tool_call", "response",
    }  # fmt: skip
