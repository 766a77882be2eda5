"""What a parser of calls finds in a text, and how it is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool, whole."""

    name: str
    arguments: str
    """The JSON of an object."""


@dataclass(frozen=True, slots=True)
class Thought:
    """Reasoning, where that stands among calls and text."""

    text: str


Found = str | Call | Thought
"""Text that is no call, a call, or what led to them."""


class CallParser(Protocol):
    """Reads a text that comes in pieces, cut anywhere: what it finds does not go by the cuts.

    A call is told when it has come to its end and can be read: what looked like one and is none is
    text, with nothing of it lost. The white space before a call goes with it.
    """

    def push(self, text: str) -> list[Found]:
        """What one more piece brings."""
        ...

    def finish(self) -> list[Found]:
        """What was held back, at the end of the text."""
        ...


def call_of(value: Any, *names: str) -> Call | None:
    """A call out of JSON: ``{"name": ..., "arguments": {...}}``; None if it is none.

    ``names``: of the arguments, the first that is there. They may be JSON within a string.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = next((value[name] for name in names if name in value), {})
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    if not value["name"] or not isinstance(arguments, Mapping):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def read_json(text: str) -> Any:
    """The value; None if it is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> None:
    """NaN and infinities are no JSON."""
    raise ValueError(name)


_MARKS = re.compile(r'["\\{}\[\]]')
_ENDS = re.compile(r'["\\]')


class JsonEnd:
    """Finds where an object or a list ends, in a text that grows. Looks at each character once."""

    def __init__(self, start: int = 0) -> None:
        """``start``: where its first bracket is."""
        self._at, self._depth, self._in_string = start, 0, False

    def find(self, text: str) -> int | None:
        """The place behind its last bracket; None: not there yet."""
        while True:
            mark = (_ENDS if self._in_string else _MARKS).search(text, self._at)
            if mark is None:
                self._at = len(text)
                return None
            character = mark.group()
            if character == "\\":
                if mark.end() == len(text):
                    self._at = mark.start()
                    return None
                self._at = mark.end() + 1
                continue
            self._at = mark.end()
            if character == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if character in "{[" else -1
                if self._depth <= 0:
                    return self._at


def overlap(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of a text that is a beginning of one of the marks."""
    longest = max(map(len, marks), default=1) - 1
    for length in range(min(len(text), longest), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return length
    return 0
