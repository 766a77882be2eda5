"""Llama 3: an object with ``name`` and ``parameters``, after ``<|python_tag|>`` or bare."""

from __future__ import annotations

import re

from .found import Call, JsonEnd, call_of, read_json
from .marked import Marked, skip_space

TAG = "<|python_tag|>"
_BETWEEN = re.compile(r"\s*;?\s*")


class Llama(Marked):
    """Without a tag a call stands at the beginning, or behind another and a semicolon."""

    marks = (TAG,)
    hidden = ("<|eom_id|>", "<|eot_id|>")

    def __init__(self) -> None:
        super().__init__()
        self._end: JsonEnd | None = None

    def restart(self) -> None:
        """The next object begins anew."""
        self._end = None

    def unmarked(self, text: str, *, ended: bool) -> int | None:
        """Where a bare object begins."""
        before = _BETWEEN.match(text)
        at = before.end() if before is not None else 0
        if at == len(text):
            return -1 if ended else None
        return at if text[at] == "{" else -1

    def read(self, text: str, *, ended: bool) -> tuple[list[Call], int] | int | None:
        """One object."""
        no_call = len(TAG) if text.startswith(TAG) else 1
        start = skip_space(text, no_call) if no_call > 1 else 0
        if start == len(text):
            return no_call if ended else None
        if text[start] != "{":
            return no_call
        if self._end is None:
            self._end = JsonEnd(start)
        end = self._end.find(text)
        if end is None:
            return no_call if ended else None
        call = call_of(read_json(text[start:end]), "parameters", "arguments")
        return no_call if call is None else ([call], end)
