"""Calls that a constraint makes sure of: the whole text is their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .found import Call, Found, call_of, read_json


def call_schema(tools: Sequence[Mapping[str, Any]], name: str | None = None) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools, or of the one of that name."""
    known = [tool["function"] for tool in tools]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in known
        if name in (None, function["name"])
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def forced_schema(
    tools: Sequence[Mapping[str, Any]], name: str | None, *, several: bool
) -> dict[str, Any]:
    """That of a text that is nothing but calls: one if a name was asked for, or if only one may
    be; else a list."""
    call = call_schema(tools, name)
    if name is not None or not several:
        return call
    return {"type": "array", "items": call, "minItems": 1}


class Forced:
    """Reads such a text at its end. One that was cut is text."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def push(self, text: str) -> list[Found]:
        """Nothing yet."""
        self._pieces.append(text)
        return []

    def finish(self) -> list[Found]:
        """The calls."""
        text, self._pieces = "".join(self._pieces), []
        value = read_json(text)
        items = value if isinstance(value, list) else [value]
        calls = [call_of(item, "arguments") for item in items]
        read = [call for call in calls if call is not None]
        if read and len(read) == len(calls):
            return list[Call | str](read)
        return [text] if text else []
