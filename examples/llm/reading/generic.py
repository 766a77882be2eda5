"""Models whose template knows no tools: told in words, and held to one JSON object.

``{"tool_call": {"name": ..., "arguments": {...}}}`` or ``{"response": "..."}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .forced import call_schema
from .found import Found, JsonEnd, call_of, read_json

_RESPONSE = re.compile(r'\s*\{\s*"response"\s*:\s*"')
_STRING_MARK = re.compile(r'["\\]')
_HIGH_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")

_ESCAPES = re.compile(r'(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]')


def generic_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the text is held to."""
    call = call_schema(tools, at="/anyOf/0/properties/tool_call")
    return {"anyOf": [_object("tool_call", call), _object("response", _TEXT)]}


_TEXT = {"type": "string"}


def _object(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": {name: schema}, "required": [name],
        "additionalProperties": False,
    }  # fmt: skip


def instructions(tools: Sequence[Mapping[str, Any]], *, forced: bool = False) -> str:
    """For the model, in its system message."""
    shown = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    call = '{"name": NAME, "arguments": {...}}'
    if forced:
        how = f"Answer with JSON alone: {call}"
    else:
        how = (
            f'Answer with one JSON object alone: {{"tool_call": {call}}} to call one of them, or '
            '{"response": TEXT} to answer by yourself.'
        )
    return f"These functions can be called:\n{shown}\n{how}"


class Generic:
    """The text of a response is passed on as it comes; a call when it is whole."""

    def __init__(self) -> None:
        self._text, self._end = "", JsonEnd()
        self._state = "head"

    def push(self, text: str) -> list[Found]:
        """What one more piece brings."""
        if self._state == "done":
            return []
        self._text += text
        if self._state == "head" and (begin := _RESPONSE.match(self._text)):
            self._text, self._state = self._text[begin.end() :], "response"
        if self._state == "response":
            return self._response()
        return self._head()

    def finish(self) -> list[Found]:
        """What was held back."""
        text, self._text = self._text, ""
        if self._state == "done" or not text:
            return []
        self._state = "done"
        return [text]

    def _head(self) -> list[Found]:
        if not self._text.lstrip().startswith("{"):
            if self._text.strip() or self._state == "text":
                text, self._text, self._state = self._text, "", "text"
                return [text]
            return []
        if self._state == "text":
            text, self._text = self._text, ""
            return [text]
        end = self._end.find(self._text)
        if end is None:
            return []
        value, text = read_json(self._text[:end]), self._text
        self._text, self._state = "", "text"
        given = value.get("tool_call") if isinstance(value, Mapping) else None
        call = call_of(given, "arguments")
        if call is None:
            return [text]
        self._state = "done"
        return [call]

    def _response(self) -> list[Found]:
        """As much of the string as is whole: no escape is cut, nor a pair of them."""
        at, end, last = 0, None, 0
        while (mark := _STRING_MARK.search(self._text, at)) is not None:
            if mark.group() == '"':
                end = mark.start()
                break
            long = 6 if self._text.startswith("\\u", mark.start()) else 2
            if mark.start() + long > len(self._text):
                at = mark.start()
                break
            last, at = mark.start(), mark.start() + long
        else:
            at = len(self._text)
        cut = at if end is None else end
        if end is None and _HIGH_HALF.fullmatch(self._text, last, cut):
            cut = last  # the other half may follow
        raw, self._text = self._text[:cut], self._text[cut:]
        if end is not None:
            self._text, self._state = "", "done"
        text = _ESCAPES.sub(lambda run: _unescaped(run[0]), raw)
        return [text] if text else []


def _unescaped(run: str) -> str:
    """The characters of escapes; half of a pair is none."""
    text = str(json.loads(f'"{run}"'))
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
