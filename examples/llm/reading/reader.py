"""Texts of a model that has no tools to call: what of them is the answer, and what led to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..text.tokenizer import template_of
from .choice_text import ChoiceText
from .families import HARMONY, family_of
from .harmony import Harmony
from .reasoning import ReasoningSplitter, thinks, thinks_first
from .turn_marks import TurnMarks

CONSTRAINTS = ("schema", "regex", "grammar")


class Reader:
    """Of the texts that are asked for with some options of ``generate``, by a model whose prompts
    its chat template writes. Thread rules: any number of threads.

    A text that is held to a form is all answer: no reasoning fits it.
    """

    def __init__(
        self, tokenizer: Any, options: Mapping[str, Any] | None = None, *, raw: bool = False
    ) -> None:
        """``raw``: prompts are none of the template's. Such texts are left as they are, and those
        that are to show special tokens, too."""
        asked = dict(options or {})
        self._constrained = any(asked.get(name) is not None for name in CONSTRAINTS)
        as_is = raw or asked.get("skip_special_tokens") is False
        template = None if as_is else template_of(tokenizer)
        self._in_channels = family_of(template) == HARMONY
        self._splits = thinks(template) and not self._in_channels and not self._constrained
        self._tokenizer, self._marks = tokenizer, TurnMarks(tokenizer)
        self.options: Mapping[str, Any] = asked
        """What the texts are to be asked for with: marks that are special tokens come with them."""
        if self._in_channels:
            self.options = {**asked, "skip_special_tokens": False}

    def begin(self, ids: Sequence[int]) -> list[int]:
        """Where a prompt ends: in the head of an answer, if that is to be held to a form."""
        held = self._in_channels and self._constrained
        return self._marks.primed(ids) if held else list(ids)

    def text(self, ids: Sequence[int]) -> ChoiceText:
        """What takes the text that follows this prompt apart, piece by piece."""
        if self._in_channels:
            return ChoiceText(parser=Harmony((), self._marks.lead(ids)))
        if self._splits:
            return ChoiceText(ReasoningSplitter(inside=thinks_first(self._tokenizer, ids)))
        return ChoiceText()
