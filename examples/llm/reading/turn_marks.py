"""Where turns end, in the tokens of a model that answers in channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .families import HARMONY, family_of
from .heads import END, START, TURN_ENDS, lead_of


class TurnMarks:
    """Of any other model it knows none. Thread rules: any number of threads."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        """``tokenizer``: transformers', or DirectTokenizer."""
        marks = {START, END, *TURN_ENDS} if family_of(template) == HARMONY else set[str]()
        added = getattr(tokenizer, "added_tokens_decoder", {}) if marks else {}
        self._ids = {token.content: int(i) for i, token in added.items() if token.content in marks}

    def stops(self, known: frozenset[int]) -> frozenset[int]:
        """The ids that end a text: those that are known, and those of the marks at which others are
        to speak, of which some configs have only one. That of a message ends none: the next one
        follows."""
        ends = {self._ids[mark] for mark in TURN_ENDS if mark in self._ids}
        return (known | ends) - {self._ids.get(END, -1)}

    def lead(self, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
        """The head of a message in which a prompt ends, or the beginning of one; "" for none."""
        start = self._ids.get(START)
        if start is None or start not in ids:
            return ""
        known = list(ids)
        return lead_of(decode(known[len(known) - 1 - known[::-1].index(start) :]))
