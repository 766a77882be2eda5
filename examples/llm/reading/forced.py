"""Calls that a constraint makes sure of: the whole text is their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from ..constraints.schema import parts_of
from .found import Found, call_of, read_json


def call_schema(
    tools: Sequence[Mapping[str, Any]], name: str | None = None, *, at: str = ""
) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools, or of the one of that name; ``at``: where it
    will stand in another one, as a pointer."""
    known = [tool["function"] for tool in tools]
    known = [function for function in known if name in (None, function["name"])]
    calls = []
    for number, function in enumerate(known):
        there = f"{at}/anyOf/{number}" if len(known) > 1 else at
        parameters = function.get("parameters") or {"type": "object"}
        call = {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": moved(parameters, f"{there}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        calls.append(call)
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def moved(schema: Mapping[str, Any], pointer: str) -> dict[str, Any]:
    """A schema that is to stand there in another one: what it refers to goes with it."""
    found = {k: v for k, v in deepcopy(dict(schema)).items() if k not in ("$id", "$schema")}
    waiting = [found]
    while waiting:
        part = waiting.pop()
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            part["$ref"] = f"#{pointer}{reference[1:]}"
        waiting += [inner for _, inner in parts_of(part)]
    return found


def forced_schema(
    tools: Sequence[Mapping[str, Any]], name: str | None, *, several: bool
) -> dict[str, Any]:
    """That of a text that is nothing but calls: one if a name was asked for, or if only one may
    be; else a list."""
    if name is not None or not several:
        return call_schema(tools, name)
    return {"type": "array", "items": call_schema(tools, at="/items"), "minItems": 1}


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
            return list[Found](read)
        return [text] if text else []
