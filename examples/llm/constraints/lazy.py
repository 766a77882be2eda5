"""One row that is held to a constraint where its text asks for it, and free elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .matcher import Matcher
from .vocabulary import Vocabulary


class LazyMatcher:
    """Free up to a mark in the text; behind it held to a constraint, to its end; then free again.

    While the text is free nothing is computed of what may follow. Where the constraint cannot be
    followed any further, the text is free again, too: it has not asked for an error.

    Ownership: one row's. Thread rules: the thread that runs passes.
    """

    def __init__(
        self,
        matcher: Matcher,
        vocabulary: Vocabulary,
        mark: str,
        heard: Callable[[str], str] = lambda text: text,
    ) -> None:
        """``matcher``: at the beginning, what is held to from behind each ``mark`` on. ``heard``
        gets the text piece by piece, each byte as a character, and gives what of it counts: a mark
        in a model's reasoning is none."""
        self._begins, self._vocabulary, self._heard = matcher, vocabulary, heard
        self._mark = mark.encode()
        self.ends_the_text = False
        """What was held to its end is the end of the text."""
        self._held: Matcher | None = None
        self._count = 0
        """Tokens that were accepted."""
        self._complete: int | None = None
        """How many of them are the complete text."""
        self._tail = b""
        """The end of the text, in which a mark may have begun."""

    @property
    def acts(self) -> bool:
        """True: the text is held at present."""
        return self._held is not None

    def mask(self, scores_V: torch.Tensor) -> torch.Tensor:
        """As :meth:`.matcher.Matcher.mask` says; scores as they are where the text is free."""
        if self._held is not None:
            try:
                return self._held.mask(scores_V)
            except ValueError:
                self._held = None
        return scores_V

    def accept(self, token: int) -> None:
        """The row goes on with this token."""
        self._count += 1
        if self._held is None:
            self._listen(self._vocabulary.spelled(token))
            return
        try:
            self._held.accept(token)
        except ValueError:
            self._held = None
        else:
            if self._held.ended:
                self._held = None
                if self.ends_the_text and self._complete is None:
                    self._complete = self._count

    def ends_at(self, count: int) -> bool:
        """True if the first ``count`` accepted tokens are the complete text; else a text that is
        free ends where the model ends it."""
        return self._complete == count

    def forced(self) -> list[int]:
        """Tokens that have to follow; none where the text is free."""
        if self._held is None:
            return []
        try:
            return self._held.forced()
        except ValueError:
            self._held = None
            return []

    def _listen(self, piece: bytes) -> None:
        text = self._tail + self._heard(piece.decode("latin-1")).encode("latin-1")
        at = text.find(self._mark)
        if at < 0:
            self._tail = text[-len(self._mark) + 1 :]
            return
        self._tail, rest = b"", text[at + len(self._mark) :]
        held = self._begins.copy()
        if held.lead(rest) if rest else True:
            self._held = held
