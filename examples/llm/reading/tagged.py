"""Grammars of calls as Qwen3-Coder writes them, with a tag for each argument."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..constraints.schema import MOST_NBYTES, read_schema
from .coder import END, FUNCTION, PARAMETER, PARAMETER_END
from .forced import moved

AS_WRITTEN = {
    "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True,
}  # fmt: skip
"""As templates show JSON to models, whatever else a schema asks for."""
VALUE_END = f"\n{PARAMETER_END}\n"
SPACE = r"/[ \n]{0,4}/"
TEXT = rf'text: rest "\n"{chr(10)}rest[suffix={json.dumps(PARAMETER_END)}]: /(?s:.*)/'
"""Rules of a value that is text: up to the first mark of its end."""
KEY = re.compile(r"[^<>\n]+")
JSON_TYPES = {"integer", "number", "boolean", "object", "array", "null"}


def as_json(schema: Mapping[str, Any], **written: Any) -> str:
    """In Lark: JSON of a schema, ``written`` otherwise than templates show it. ValueError for one
    that is beyond a bound."""
    return f"%json {json.dumps(read_schema(schema) | {'x-guidance': AS_WRITTEN | written})}"


def tagged_calls(tools: Sequence[Mapping[str, Any]]) -> str:
    """A grammar of one call of one of the tools, of which those parameters that are required come,
    and all in the order of the schema. ValueError for what is beyond a bound, or cannot be
    written so."""
    found = " | ".join(_call(tool["function"]) for tool in tools)
    if len(found) > MOST_NBYTES:
        raise ValueError(f"tools: {len(found):,} characters, the most are {MOST_NBYTES:,}")
    return f"{TEXT}\nstart: {SPACE} {json.dumps(FUNCTION)} ({found})"


def _call(function: Mapping[str, Any]) -> str:
    parameters = read_schema(function.get("parameters") or {})
    known = parameters.get("properties")
    if not isinstance(known, dict) or not known:
        any_key = f"{json.dumps(PARAMETER)} /{KEY.pattern}/ {json.dumps('>' + chr(10))} text"
        given = f"({any_key})*"
    else:
        given = " ".join(_parameter(parameters, key) for key in known)
    return f"({json.dumps(function['name'] + '>' + chr(10))} {given} {json.dumps(END)})"


def _parameter(parameters: Mapping[str, Any], key: str) -> str:
    if KEY.fullmatch(key) is None:
        raise ValueError(f"tools: parameter {key[:40]!r} cannot be written so")
    begin, part = json.dumps(f"{PARAMETER}{key}>\n"), parameters["properties"][key]
    written = f"({begin} {_value(parameters, key, part)})"
    required = parameters.get("required")
    return written if isinstance(required, list) and key in required else f"{written}?"


def _value(parameters: Mapping[str, Any], key: str, part: Any) -> str:
    """Text where the schema says so, or nothing of a type; else JSON."""
    kind, ends = (part.get("type"), json.dumps(VALUE_END)) if isinstance(part, dict) else (None, "")
    few = part.get("enum") if kind == "string" else None
    if isinstance(few, list) and few and all(isinstance(one, str) for one in few):
        return f"({' | '.join(map(json.dumps, few))}) {ends}"
    if kind not in JSON_TYPES:
        return "text"
    if "$ref" in json.dumps(part):
        step = key.replace("~", "~0").replace("/", "~1")
        whole = moved(parameters, "/$defs/whole")
        part = {"$ref": f"#/$defs/whole/properties/{step}", "$defs": {"whole": whole}}
    return f"{as_json(part)} {ends}"
