"""Qwen3-Coder and later: ``<function=NAME>`` with a ``<parameter=KEY>`` for each argument.

Values are text: their types are those that the tool's schema names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .found import Call, read_json
from .hermes import CLOSING, OPENING
from .marked import Marked, closed, skip_space

FUNCTION, END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


class _NoCallError(Exception):
    """It is none."""


class _CutError(Exception):
    """It is not all there."""


class Coder(Marked):
    """The calls of tools whose parameters are known."""

    marks = (OPENING, FUNCTION)

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """``tools``: as OpenAI's API writes them."""
        super().__init__()
        self._types = {tool["function"]["name"]: _types(tool) for tool in tools}

    def read(self, text: str, *, ended: bool) -> tuple[list[Call], int] | int | None:
        """One function."""
        wrapped = text.startswith(OPENING)
        no_call = len(OPENING if wrapped else FUNCTION)
        try:
            name, at = _named(text, skip_space(text, no_call) if wrapped else 0, FUNCTION)
            given, at = self._arguments(text, at)
        except _NoCallError:
            return no_call
        except _CutError:
            return no_call if ended else None
        if wrapped:
            behind = closed(text, at, CLOSING, ended=ended)
            if behind is None:
                return None
            at = behind
        types = self._types.get(name, {})
        arguments = {key: _typed(value, types.get(key)) for key, value in given.items()}
        return [Call(name, json.dumps(arguments, ensure_ascii=False))], at

    def _arguments(self, text: str, at: int) -> tuple[dict[str, str], int]:
        found: dict[str, str] = {}
        while True:
            at = skip_space(text, at)
            if text.startswith(END, at):
                return found, at + len(END)
            if END.startswith(text[at:]):
                raise _CutError
            key, at = _named(text, at, PARAMETER)
            end = text.find(PARAMETER_END, at)
            if end < 0:
                raise _CutError
            found[key] = text[at:end].removeprefix("\n").removesuffix("\n")
            at = end + len(PARAMETER_END)


def _named(text: str, at: int, mark: str) -> tuple[str, int]:
    """The name in a mark, and the place behind it."""
    if mark.startswith(text[at : at + len(mark)]) and len(text) - at < len(mark):
        raise _CutError
    end = text.find(">", at)
    name = text[at + len(mark) : end if end >= 0 else None]
    if not text.startswith(mark, at) or "<" in name or "\n" in name or (end >= 0 and not name):
        raise _NoCallError
    if end < 0:
        raise _CutError
    return name, end + 1


def _types(tool: Mapping[str, Any]) -> dict[str, Any]:
    parameters = tool["function"].get("parameters") or {}
    known = parameters.get("properties")
    if not isinstance(known, Mapping):
        return {}
    return {key: kind.get("type") for key, kind in known.items() if isinstance(kind, Mapping)}


def _typed(value: str, kind: Any) -> Any:
    """The text itself where the schema says so, or where it is no JSON."""
    if kind == "string":
        return value
    read = read_json(value.strip())
    if read is None and value.strip() != "null":
        return {"true": True, "false": False, "none": None}.get(value.strip().lower(), value)
    return read
