"""Calls that a model has begun by itself: held to the schemas of the tools from there on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..constraints.constraint import Constraint
from ..constraints.matcher import Matcher
from ..constraints.vocabulary import Vocabulary
from .channelled import CHANNEL_MARKS, TO, channelled_calls, whole_channelled_calls
from .forced import call_schema
from .hermes import CLOSING, OPENING
from .mistral import MARK
from .tagged import SPACE, as_json, tagged_calls


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a family writes calls behind a mark, if a grammar can say it."""

    mark: str
    grammar: Callable[[Sequence[Mapping[str, Any]]], str]
    """In Lark, of calls of these tools; ValueError for what is beyond a bound."""
    closing: str = ""
    """What follows a call."""
    ends: bool = False
    """So does the end of the text."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """What the grammar has rules of, by their names: special tokens, where there are such."""
    whole: bool = False
    """The text is nothing but a call, and held from its beginning on."""


def form_of(family: str, template: str | None, *, several: bool = True) -> CallForm | None:
    """None: its calls are read, but not held to anything. Not ``several``: one ends its text."""
    if family == "hermes":
        return CallForm(OPENING, _object, CLOSING, ends=not several)
    if family == "coder":
        return CallForm(OPENING, tagged_calls, CLOSING, ends=not several)
    if family == "mistral" and "[ARGS]" not in (template or ""):
        return CallForm(MARK, _list if several else _list_of_one, ends=not several)
    if family == "harmony":
        return CallForm(TO, channelled_calls, ends=True, marks=CHANNEL_MARKS)
    return None


WHOLE = CallForm("", whole_channelled_calls, ends=True, marks=CHANNEL_MARKS, whole=True)
"""Of a text of gpt-oss that has to call."""


def matcher_of(
    form: CallForm, tools: Sequence[Mapping[str, Any]], vocabulary: Vocabulary
) -> Matcher | None:
    """What a begun call is held to. Arguments whose schema cannot be compiled may be any object;
    None if nothing can. ValueError for what a whole text cannot be held to."""
    if form.whole:
        return _compiled(form, tools, vocabulary)
    with suppress(ValueError):
        return _compiled(form, tools, vocabulary)
    with suppress(ValueError):
        return _compiled(form, [_sound(form, tool, vocabulary) for tool in tools], vocabulary)
    return None


def _sound(form: CallForm, tool: Mapping[str, Any], vocabulary: Vocabulary) -> Mapping[str, Any]:
    try:
        _compiled(form, [tool], vocabulary)
    except ValueError:
        return {"function": {"name": tool["function"]["name"]}}
    return tool


def _compiled(
    form: CallForm, tools: Sequence[Mapping[str, Any]], vocabulary: Vocabulary
) -> Matcher:
    lark = form.grammar(tools)
    if form.closing:
        lark += f" {SPACE} {_mark(form.closing, vocabulary)}"
    rules = [f"{name}: {_mark(mark, vocabulary)}" for name, mark in form.marks.items()]
    return Matcher.of(Constraint.of_lark("\n".join([lark, *rules])), vocabulary)


def _mark(text: str, vocabulary: Vocabulary) -> str:
    special = vocabulary.special(text)
    return json.dumps(text) if special is None else f"<[{special}]>"


def _object(tools: Sequence[Mapping[str, Any]]) -> str:
    return f"start: {SPACE} {as_json(call_schema(tools))}"


def _list(tools: Sequence[Mapping[str, Any]], **bounds: int) -> str:
    calls = {"type": "array", "items": call_schema(tools, at="/items"), "minItems": 1, **bounds}
    return f"start: {SPACE} {as_json(calls)}"


def _list_of_one(tools: Sequence[Mapping[str, Any]]) -> str:
    return _list(tools, maxItems=1)
