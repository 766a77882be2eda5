"""Calls that a model has begun by itself: held to the schemas of the tools from there on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ...constraints.constraint import Constraint
from ...constraints.matcher import Matcher
from ...constraints.schema import read_schema
from ...constraints.vocabulary import Vocabulary
from .forced import call_schema
from .hermes import CLOSING, OPENING
from .mistral import MARK

AS_WRITTEN = {
    "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True,
}  # fmt: skip
"""As templates show calls to models, whatever else a schema asks for."""
SPACE = r"/[ \n]{0,4}/"


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a family writes calls behind a mark, if a grammar can say it."""

    mark: str
    closing: str = ""
    """What follows a call."""
    is_list: bool = False
    """Several calls, as one list."""


def form_of(family: str, template: str | None) -> CallForm | None:
    """None: its calls are read, but not held to anything."""
    if family == "hermes":
        return CallForm(OPENING, CLOSING)
    if family == "mistral" and "[ARGS]" not in (template or ""):
        return CallForm(MARK, is_list=True)
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
    if form.is_list:
        items = call_schema(tools, at="/items")
        schema: dict[str, Any] = {"type": "array", "items": items, "minItems": 1}
    else:
        schema = call_schema(tools)
    document = read_schema(schema) | {"x-guidance": AS_WRITTEN}
    lark = f"start: {SPACE} %json {json.dumps(document)}"
    if form.closing:
        special = vocabulary.special(form.closing)
        closing = json.dumps(form.closing) if special is None else f"<[{special}]>"
        lark += f" {SPACE} {closing}"
    return Matcher.of(Constraint.of_lark(lark), vocabulary)
