"""Calls that a model has begun by itself: held to the schemas of the tools from there on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ...constraints.constraint import Constraint
from ...constraints.matcher import Matcher
from ...constraints.vocabulary import Vocabulary
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


def form_of(family: str, template: str | None) -> CallForm | None:
    """None: its calls are read, but not held to anything."""
    if family == "hermes":
        return CallForm(OPENING, _object, CLOSING)
    if family == "coder":
        return CallForm(OPENING, tagged_calls, CLOSING)
    if family == "mistral" and "[ARGS]" not in (template or ""):
        return CallForm(MARK, _list)
    return None


def matcher_of(
    form: CallForm, tools: Sequence[Mapping[str, Any]], vocabulary: Vocabulary
) -> Matcher | None:
    """What a begun call is held to. Arguments whose schema cannot be compiled may be any object;
    None if nothing can."""
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
        special = vocabulary.special(form.closing)
        lark += f" {SPACE} {json.dumps(form.closing) if special is None else f'<[{special}]>'}"
    return Matcher.of(Constraint.of_lark(lark), vocabulary)


def _object(tools: Sequence[Mapping[str, Any]]) -> str:
    return f"start: {SPACE} {as_json(call_schema(tools))}"


def _list(tools: Sequence[Mapping[str, Any]]) -> str:
    calls = {"type": "array", "items": call_schema(tools, at="/items"), "minItems": 1}
    return f"start: {SPACE} {as_json(calls)}"
