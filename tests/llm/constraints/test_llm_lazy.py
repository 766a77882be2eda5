"""A text that is free up to a mark, held behind it, and free again."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from byte_model import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from layer_streamer.llm.constraints.lazy import LazyMatcher
from layer_streamer.llm.constraints.matcher import Matcher
from layer_streamer.llm.constraints.vocabulary import Vocabulary
from layer_streamer.llm.drafts.tree import Tree
from layer_streamer.llm.reading.begun import CallForm, form_of, matcher_of
from layer_streamer.llm.reading.coder import Coder
from layer_streamer.llm.reading.found import Call, overlap
from layer_streamer.llm.reading.tagged import VALUE_END
from layer_streamer.llm.text.following import follow
from layer_streamer.llm.text.sampling import Sampler, Sampling

HERMES, LIST, CODER = (form_of(family, "") for family in ("hermes", "mistral", "coder"))
UNIT = {"enum": ["celsius", "kelvin"]}
TOOLS: list[dict[str, Any]] = [
    {"function": {"name": "heat", "parameters": {
        "type": "object", "properties": {"unit": {"$ref": "#/$defs/Unit"}}, "required": ["unit"],
        "additionalProperties": False, "$defs": {"Unit": UNIT}}}},
    {"function": {"name": "wait", "parameters": {
        "type": "object", "properties": {"long": {"type": "boolean"}}, "required": ["long"],
        "additionalProperties": False}}},
]  # fmt: skip
ARGUMENTS = [("heat", {"unit": "celsius"}), ("heat", {"unit": "kelvin"}),
             ("wait", {"long": True}), ("wait", {"long": False})]  # fmt: skip
JOINED = 'll>\n{"name": '


def vocabulary(*added: str) -> Vocabulary:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return Vocabulary(tokenizer, len(tokenizer), [257])


PLAIN = vocabulary()
MARKED = vocabulary("<tool_call>", "</tool_call>")
WIDE = vocabulary(JOINED)


def lazy(known: Vocabulary, form: CallForm | None = HERMES, tools: Any = TOOLS) -> LazyMatcher:
    assert form is not None
    matcher = matcher_of(form, tools, known)
    assert matcher is not None
    return LazyMatcher(matcher, known, form.mark)


def written(known: Vocabulary, held: LazyMatcher, begin: bytes, seed: int = 0) -> bytes:
    """The text that random scores make of a beginning, while it is held; what would go on for ever
    is likely to end."""
    sampler = Sampler(Sampling(temperature=1.0), seed=seed, constraint=held)
    dice, text = torch.Generator().manual_seed(seed), begin
    for token in known.cut(begin):
        sampler.take(token)
    while held.acts:
        assert len(text) < 10_000
        scores = torch.randn(known.size, generator=dice)
        scores[VALUE_END[overlap(text.decode("latin-1"), (VALUE_END,))].encode()[0]] += 9
        token = sampler.take(int(sampler.choose(scores)))
        assert isinstance(token, int)
        text += known.spelled(token)
    return text


@pytest.mark.parametrize("known", [PLAIN, MARKED], ids=["letters", "one token"])
def test_a_call_that_has_begun_is_one_of_a_known_tool(known: Vocabulary) -> None:
    found = []
    for seed in range(5):
        text = written(known, lazy(known), b"Well. <tool_call>", seed).decode()
        before, _, rest = text.partition("<tool_call>")
        assert before == "Well. " and rest.endswith("</tool_call>")
        call = json.loads(rest.removesuffix("</tool_call>"))
        assert list(call) == ["name", "arguments"]
        found.append((call["name"], call["arguments"]))
    assert all(one in ARGUMENTS for one in found) and len({name for name, _ in found}) == 2


def test_calls_in_a_list_are_of_known_tools() -> None:
    for seed in range(2):
        text = written(PLAIN, lazy(PLAIN, LIST), b"[TOOL_CALLS]", seed).decode()
        calls = json.loads(text.removeprefix("[TOOL_CALLS]").partition("<|im_end|>")[0])
        assert calls and all((call["name"], call["arguments"]) in ARGUMENTS for call in calls)


def test_a_list_of_calls_where_one_is_allowed_has_one_and_ends_its_text() -> None:
    form = form_of("mistral", None, several=False)
    assert form is not None and form.ends
    for seed in range(3):
        held = lazy(PLAIN, form)
        held.ends_the_text = form.ends
        text = written(PLAIN, held, b"[TOOL_CALLS]", seed).decode()
        calls = json.loads(text.removeprefix("[TOOL_CALLS]").partition("<|im_end|>")[0])
        assert len(calls) == 1
        assert held.ends_at(held._count) and not held.ends_at(held._count - 1)


@settings(max_examples=30)
@given(st.lists(st.sampled_from([*"<tool_ca>", "<tool_", "tool_call>", "a", "é", "<<", "\n"])))
def test_a_text_is_held_from_its_mark_on_and_never_before(pieces: Sequence[str]) -> None:
    held, text = lazy(PLAIN), b""
    for byte in "".join(pieces).encode():
        held.accept(byte)
        text += bytes([byte])
        if b"<tool_call>" in text:
            assert held.acts == text.endswith(b"<tool_call>")
            return
        assert not held.acts and not held.forced() and not held.ends_at(len(text))


@pytest.mark.parametrize("known", [PLAIN, MARKED], ids=["letters", "one token"])
def test_behind_a_call_the_text_is_free_and_another_may_begin(known: Vocabulary) -> None:
    held = lazy(known)
    text = written(known, held, b"<tool_call>")
    text = written(known, held, b" and then <tool_call>")
    assert b"</tool_call>" in text and not held.acts
    free = torch.randn(known.size)
    assert held.mask(free) is free


def test_a_token_that_goes_beyond_the_mark_is_the_beginning_of_the_call() -> None:
    held = lazy(WIDE)
    for token in [*b"<tool_ca", WIDE.cut(JOINED.encode())[-1]]:
        held.accept(token)
    assert WIDE.spelled(WIDE.size - 1) == JOINED.encode() and held.acts
    assert bytes(held.forced()) == b'"'
    for byte in b'"wait", "arguments": {"long": true}}</tool_call>':
        held.accept(byte)
    assert not held.acts


@pytest.mark.parametrize("rest", ["x", "[", '{"nane', " " * 9, "\n{}"])
def test_what_no_call_begins_with_is_free_text(rest: str) -> None:
    known = vocabulary(f">{rest}")
    held = lazy(known)
    for token in [*b"<tool_call", known.size - 1]:
        held.accept(token)
    assert known.spelled(known.size - 1).decode() == f">{rest}" and not held.acts


def test_a_free_text_costs_no_mask_and_takes_the_likeliest_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = lazy(PLAIN)

    def computed(*_: Any) -> Any:
        raise AssertionError

    for name in ("mask", "allowed", "forced", "accept"):
        monkeypatch.setattr(Matcher, name, computed)
    sampler = Sampler(constraint=held)
    for byte in b"It is <tool> and _call> and more.":
        assert sampler.takes_likeliest
        assert sampler.take(byte) == byte
        assert held.forced() == []


def test_what_a_draft_takes_across_the_mark_is_what_comes_without_it() -> None:
    text = [*b'a<tool_call>\n{"name": "wait", "arguments": {"long": true}}</tool_call>b']
    for seed in range(4):
        draw = random.Random(seed)
        dice = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(text) + 1, PLAIN.size, generator=dice)
        for place, token in enumerate(text):
            logits[place, token] += 9 * (draw.random() < 0.97)
        alone, sampler = [], Sampler(constraint=lazy(PLAIN))
        for row in logits:
            ((token,),) = follow(row[None], [sampler], [Tree()])
            alone.append(token)
            if alone != text[: len(alone)]:
                break
        (together,) = follow(logits, [Sampler(constraint=lazy(PLAIN))], [Tree.chain(text)])
        assert together == alone


def test_a_schema_that_cannot_be_compiled_leaves_its_arguments_free_and_the_others_held() -> None:
    odd = {"function": {"name": "odd", "parameters": {"properties": {"a": {"type": "nonsense"}}}}}
    held = lazy(PLAIN, tools=[TOOLS[1], odd])
    for byte in b'<tool_call>{"name": "odd", "arguments": {"any": [1]}}</tool_call>':
        held.accept(byte)
    assert not held.acts
    for byte in b'<tool_call>{"name": "wait", "arguments": {"':
        held.accept(byte)
    assert bytes(held.forced()).startswith(b'long"')


def test_a_text_that_can_no_longer_be_followed_is_free_and_no_error() -> None:
    held = lazy(PLAIN)
    for byte in b"<tool_call>":
        held.accept(byte)
    held.accept(ord("x"))  # which no sampler would have chosen
    assert not held.acts


def test_only_forms_that_a_grammar_can_say_are_held() -> None:
    assert form_of("mistral", "[TOOL_CALLS] [") == LIST
    assert form_of("mistral", "[TOOL_CALLS]name[ARGS]") is None
    assert [form_of(family, "") for family in ("llama", "generic")] == [None] * 2


PAINT = {"function": {"name": "paint", "parameters": {
    "type": "object", "required": ["colour", "count", "size"], "properties": {
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 12},
        "why": {"type": "string"}, "size": {"type": "array", "maxItems": 2, "items": {
            "$ref": "#/$defs/Side"}}, "any/~": {"type": "object", "additionalProperties": False},
    }, "$defs": {"Side": {"enum": [1, 2]}}}}}  # fmt: skip


def test_a_call_in_tags_has_what_is_required_and_of_its_type() -> None:
    names = set()
    for seed in range(6):
        text = written(PLAIN, lazy(PLAIN, CODER, [PAINT, *TOOLS]), b"<tool_call>", seed)
        (call,) = Coder([PAINT, *TOOLS]).push(text.decode("utf-8", "replace"))
        assert isinstance(call, Call)
        names.add(call.name)
        given = json.loads(call.arguments)
        if call.name != "paint":
            continue
        assert given["colour"] in ("red", "blue") and 1 <= given["count"] <= 12
        assert set(given["size"]) <= {1, 2} and given.get("any/~", {}) == {}
        assert isinstance(given.get("why", ""), str)
    assert "paint" in names and len(names) > 1


def test_a_text_in_tags_may_have_anything_in_it_but_its_end() -> None:
    held = lazy(PLAIN, CODER, [{"function": {"name": "f", "parameters": {
        "properties": {"a": {"type": "string"}}, "required": ["a"]}}}])  # fmt: skip
    value = '<b>"é\n\n</parameter>'
    call = f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</function>\n</tool_call>"
    for place, byte in enumerate(call.encode()):
        assert held.acts == (place >= len("<tool_call>"))
        held.accept(byte)
    assert not held.acts
    for byte in b"<tool_call><":
        held.accept(byte)
    assert bytes(held.forced()) == b"function=f>\n<parameter=a>\n"


@pytest.mark.parametrize("key", ["a>b", "a\nb", "", "<"])
def test_a_parameter_that_tags_cannot_name_leaves_its_tool_free(key: str) -> None:
    odd = {"function": {"name": "f", "parameters": {"properties": {key: {}}, "required": [key]}}}
    held = lazy(PLAIN, CODER, [odd])
    call = b"<tool_call><function=f>\n<parameter=x>\n1\n</parameter>\n</function></tool_call>"
    for place, byte in enumerate(call):
        assert held.acts == (place >= len("<tool_call>"))
        held.accept(byte)
    assert not held.acts
