"""What a model thinks before it answers, apart from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..text.tokenizer import shown_text
from .found import overlap

OPENING, CLOSING = "<think>", "</think>"
NEAR = 16
"""Tokens at the end of a prompt in which it is seen whether the model is to think first."""


def thinks(template: str | None) -> bool:
    """True for a chat template that knows of such a part."""
    return CLOSING in (template or "")


def thinks_first(tokenizer: Any, ids: Sequence[int]) -> bool:
    """True for a prompt that ends in the opening mark: the text begins behind it."""
    return shown_text(tokenizer, ids[-NEAR:]).rstrip().endswith(OPENING)


class ReasoningSplitter:
    """Splits a text that comes in pieces, cut anywhere, into (reasoning, answer).

    Reasoning stands at the beginning, between its marks; where the prompt ends in the opening one,
    the text begins inside. The white space around the marks goes with them.
    """

    def __init__(self, *, inside: bool) -> None:
        self._text = ""
        self._state = "reasoning" if inside else "begin"
        self._trims = inside
        """White space at the beginning of what comes is left out."""

    def push(self, text: str) -> tuple[str, str]:
        """What one more piece brings of either."""
        if self._state == "answer" and not self._trims:
            return "", text
        self._text += text
        return self._take()

    def finish(self) -> tuple[str, str]:
        """What was held back."""
        text, self._text = self._text, ""
        if self._state == "reasoning":
            return text.strip() if self._trims else text.rstrip(), ""
        return "", text.lstrip() if self._trims else text

    def _take(self) -> tuple[str, str]:
        if self._state == "begin":
            head = self._text.lstrip()
            if not head or (len(head) < len(OPENING) and OPENING.startswith(head)):
                return "", ""
            if not head.startswith(OPENING):
                self._state, text, self._text = "answer", self._text, ""
                return "", text
            self._text, self._state, self._trims = head[len(OPENING) :], "reasoning", True
        reasoning = self._reasoning() if self._state == "reasoning" else ""
        answer = ""
        if self._state == "answer":
            answer = self._text.lstrip() if self._trims else self._text
            self._text, self._trims = "", self._trims and not answer
        return reasoning, answer

    def _reasoning(self) -> str:
        if self._trims:
            self._text = self._text.lstrip()
            self._trims = not self._text
        at = self._text.find(CLOSING)
        if at >= 0:
            reasoning, self._text = self._text[:at].rstrip(), self._text[at + len(CLOSING) :]
            self._state, self._trims = "answer", True
            return reasoning
        shown = len(self._text[: len(self._text) - overlap(self._text, (CLOSING,))].rstrip())
        reasoning, self._text = self._text[:shown], self._text[shown:]
        return reasoning
