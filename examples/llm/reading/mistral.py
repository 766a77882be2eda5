"""Mistral: ``[TOOL_CALLS]`` and a list of objects, or ``[TOOL_CALLS]name[ARGS]{...}``."""

from __future__ import annotations

import re

from .found import Call, JsonEnd, call_of, read_json
from .marked import Marked, skip_space

MARK = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]+)?(?:\[ARGS\])?\s*(?=\{)")
_BEGINNING = re.compile(r"\s*[\w.-]{0,64}(?:\[[A-Z_]{0,7}\]?[\w-]{0,64}){0,2}\s*")


class Mistral(Marked):
    """Both ways of writing them; ids within are left out, since the caller makes its own."""

    marks = (MARK,)
    hidden = ("</s>",)

    def __init__(self) -> None:
        super().__init__()
        self._end: JsonEnd | None = None

    def restart(self) -> None:
        """The next value begins anew."""
        self._end = None

    def read(self, text: str, *, ended: bool) -> tuple[list[Call], int] | int | None:
        """A list, or one call."""
        no_call, name = len(MARK), None
        start = skip_space(text, no_call)
        if not text.startswith("[", start):
            named = _NAMED.match(text, no_call)
            if named is None:
                may_come = not ended and _BEGINNING.fullmatch(text, no_call)
                return None if may_come else no_call
            name, start = named[1], named.end()
        if self._end is None:
            self._end = JsonEnd(start)
        end = self._end.find(text)
        if end is None:
            return no_call if ended else None
        value = read_json(text[start:end])
        if name is not None:
            value = [{"name": name, "arguments": value}]
        calls = [call_of(item, "arguments", "parameters") for item in value or ()]
        read = [call for call in calls if call is not None]
        return no_call if not read or len(read) < len(calls) else (read, end)
