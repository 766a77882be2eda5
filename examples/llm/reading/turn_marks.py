"""Where turns end, in the tokens of a model that answers in channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..text.tokenizer import rendered_ids, shown_text, template_of
from .families import HARMONY, family_of
from .harmony import FINAL
from .heads import END, MESSAGE, START, TURN_ENDS, lead_of


class TurnMarks:
    """Of any other model it knows none. Thread rules: any number of threads."""

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: transformers', or DirectTokenizer."""
        channels = family_of(template_of(tokenizer)) == HARMONY
        marks = {START, END, *TURN_ENDS} if channels else set[str]()
        added = getattr(tokenizer, "added_tokens_decoder", {}) if marks else {}
        self._ids = {token.content: int(i) for i, token in added.items() if token.content in marks}
        self._tokenizer = tokenizer

    def stops(self, known: frozenset[int]) -> frozenset[int]:
        """The ids that end a text: those that are known, and those of the marks at which others are
        to speak, of which some configs have only one. That of a message ends none: the next one
        follows."""
        ends = {self._ids[mark] for mark in TURN_ENDS if mark in self._ids}
        return (known | ends) - {self._ids.get(END, -1)}

    def lead(self, ids: Sequence[int]) -> str:
        """The head of a message in which a prompt ends, or the beginning of one; "" for none."""
        start = self._ids.get(START)
        if start is None or start not in ids:
            return ""
        known = list(ids)
        last = len(known) - 1 - known[::-1].index(start)
        return lead_of(shown_text(self._tokenizer, known[last:]))

    def primed(self, ids: Sequence[int]) -> list[int]:
        """The prompt, with the head of an answer's message behind it if it leaves off in one that
        does not say what it is of."""
        lead = self.lead(ids)
        if not lead or MESSAGE in lead:
            return list(ids)
        return [*ids, *rendered_ids(self._tokenizer, FINAL)]
