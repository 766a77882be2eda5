"""Schemas of every kind, what is like them, and texts that are chosen at random."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from layer_streamer.llm.constraints.constraint import constraint_of
from layer_streamer.llm.constraints.matcher import Matcher
from layer_streamer.llm.constraints.vocabulary import Vocabulary


def an_object(**properties: Any) -> dict[str, Any]:
    """Of which all properties are needed, and no others are there."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def a_text(**more: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": 6} | more


SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": an_object(
        person=an_object(name=a_text(), home=an_object(city=a_text(), zip=a_text(minLength=2))),
        active={"type": "boolean"},
    ),
    "arrays": {"type": "array", "minItems": 2, "maxItems": 4,
               "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    "enums": an_object(color={"enum": ["red", "green", None, 3]}, size={"enum": ["S", "M"]}),
    "const": an_object(name={"const": "get_weather"}, arguments=an_object(unit={"const": 1})),
    "numbers": an_object(
        a={"type": "integer", "minimum": -3, "maximum": 120},
        b={"type": "number", "minimum": 0.25, "maximum": 0.75},
        c={"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 11},
    ),
    "patterns": an_object(
        code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,4}$"},
        day={"type": "string", "pattern": r"^20\d\d-(0[1-9]|1[0-2])$"},
    ),
    "any of": an_object(
        value={"anyOf": [{"type": "null"}, a_text(), an_object(k={"type": "boolean"})]}
    ),
    "references": {
        "$defs": {"node": an_object(
            leaf={"type": "boolean"}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
        )},
        "$ref": "#/$defs/node",
    },
    "more properties": {
        "type": "object", "properties": {"id": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["id"], "additionalProperties": {"type": "boolean"}, "maxProperties": 3,
    },
    "unicode": an_object(**{
        "die größe": {"enum": ["漢字", "\U0001f600", "é\"\\"]},
        "東 京": {"type": "string", "pattern": "^[äöü漢]{1,3}$"},
    }),
}  # fmt: skip
STRING = re.compile(r'"(?:\\.|[^"\\])*"')
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def is_like(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> bool:
    """True if a value is as a schema of the kinds above says, which are looked at one by one."""
    root = schema if root is None else root
    for key, asked in schema.items():
        if key == "$ref" and not is_like(value, root["$defs"][asked.rpartition("/")[2]], root):
            return False
        if key == "anyOf" and not any(is_like(value, one, root) for one in asked):
            return False
        if key in CHECKS and not CHECKS[key](value, asked):
            return False
    return _parts_are_like(value, schema, root)


def _parts_are_like(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    if isinstance(value, list):
        return all(is_like(item, schema.get("items", {}), root) for item in value)
    if not isinstance(value, dict):
        return True
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for key, item in value.items():
        part = known.get(key, others)
        if part is False or not is_like(item, part, root):
            return False
    return all(key in value for key in schema.get("required", ()))


def _has_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        fits = isinstance(value, int if name == "integer" else int | float)
        return fits and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, TYPES[name])


CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "type": _has_type,
    "enum": lambda value, asked: any(value == one and type(value) is type(one) for one in asked),
    "const": lambda value, asked: value == asked and type(value) is type(asked),
    "minimum": lambda value, asked: value >= asked,
    "maximum": lambda value, asked: value <= asked,
    "exclusiveMinimum": lambda value, asked: value > asked,
    "exclusiveMaximum": lambda value, asked: value < asked,
    "minLength": lambda value, asked: len(value) >= asked,
    "maxLength": lambda value, asked: len(value) <= asked,
    "pattern": lambda value, asked: re.search(asked, value) is not None,
    "minItems": lambda value, asked: len(value) >= asked,
    "maxItems": lambda value, asked: len(value) <= asked,
    "maxProperties": lambda value, asked: len(value) <= asked,
}


def matcher_of(vocabulary: Vocabulary, **asked: Any) -> Matcher:
    """What ``schema=``, ``regex=`` or ``grammar=`` holds a row to."""
    constraint = constraint_of(**asked)
    assert constraint is not None
    return Matcher.of(constraint, vocabulary)


def random_ids(
    matcher: Matcher, size: int, seed: int, *, likelier: Sequence[int] = (), most: int = 4_000
) -> list[int]:
    """Tokens of a text that the constraint allows, by random scores; the end is not among them.
    ``likelier``: tokens that are chosen more often, so that what has no bound ends."""
    dice, ids = torch.Generator().manual_seed(seed), list[int]()
    while not matcher.ended and len(ids) < most:
        scores = torch.randn(size, generator=dice)
        scores[list(likelier)] += 2
        token = int(matcher.mask(scores).argmax())
        matcher.accept(token)
        ids.append(token)
    return ids


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def check_document(text: str, schema: Mapping[str, Any]) -> None:
    """Fails unless a text is a JSON document as the schema says, without spaces between parts."""
    document = json.loads(text)
    assert is_like(document, schema), text
    assert not re.search(r"\s", STRING.sub("", text)), text
