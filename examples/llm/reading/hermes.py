"""Hermes, Qwen2.5, Qwen3: JSON between ``<tool_call>`` and ``</tool_call>``."""

from __future__ import annotations

from .found import Call, JsonEnd, call_of, read_json
from .marked import Marked, closed, skip_space

OPENING, CLOSING = "<tool_call>", "</tool_call>"


class Hermes(Marked):
    """A call without its closing mark counts: some models leave it out."""

    marks = (OPENING,)

    def __init__(self) -> None:
        super().__init__()
        self._end: JsonEnd | None = None

    def restart(self) -> None:
        """The next object begins anew."""
        self._end = None

    def read(self, text: str, *, ended: bool) -> tuple[list[Call], int] | int | None:
        """One object."""
        no_call = len(OPENING)
        start = skip_space(text, no_call)
        if start == len(text):
            return no_call if ended else None
        if text[start] != "{":
            return no_call
        if self._end is None:
            self._end = JsonEnd(start)
        end = self._end.find(text)
        if end is None:
            return no_call if ended else None
        behind = closed(text, end, CLOSING, ended=ended)
        if behind is None:
            # So that the next look finds the same end.
            self._end = JsonEnd(start)
            return None
        call = call_of(read_json(text[start:end]), "arguments", "parameters")
        return no_call if call is None else ([call], behind)
