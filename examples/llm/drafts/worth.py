"""What a source of drafts has been worth: how far to ask it, and when to leave it alone.

Everything is in seconds. A token that the model agrees with saves its share of a pass; a draft
costs the time of making it, and what its pass took longer.
"""

from __future__ import annotations

import math

from .pace import FASTER, SLOWER, Pace

SHARE = 0.02
"""Of the time since it last paid that a source may lose."""
ADVANCE = 0.75
"""Of a pass: what it may lose beyond that."""
MEMORY = 32
"""Drafts after which an earlier one counts a third."""
PRIOR = 4
"""Tokens that a source is taken to get right for one that it does not, before it is known."""
LENGTHS = (1, 2, 4, 8, 16, 32, 64)
"""Of drafts that are weighed."""


class Worth:
    """One source's. Thread rules: one thread."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._right = self._wrong = 0.0
        """Tokens that the model agreed with, and drafts that it did not follow to their ends."""
        self._token_seconds = 0.0
        self._loss = self._since = 0.0
        self.promise = math.inf
        """Seconds that a draft has saved on average, lately; infinite before the first."""

    @property
    def pays(self) -> bool:
        """False: it has lost more than it may, and is to be left alone for now."""
        return self._loss <= self._since * SHARE + self._pace.seconds(1) * ADVANCE

    @property
    def likelihood(self) -> float:
        """That the model agrees with the next token of a draft, if it has with those before."""
        right = self._right + PRIOR
        return right / (right + self._wrong + 1)

    def length(self, most: int, rows: int) -> int:
        """Of the next draft, at most ``most``: what promises most tokens a second, beside ``rows``
        that get one each anyway."""
        pace, likely, each = self._pace, self.likelihood, self._token_seconds
        best, rate = 0, rows / max(pace.seconds(rows), 1e-9)
        for length in sorted({n for n in LENGTHS if n < most} | {most}):
            gained = length if likely >= 1 else likely * (1 - likely**length) / (1 - likely)
            seconds = max(pace.seconds(rows + length) + length * each, 1e-9)
            if (rows + gained) / seconds >= rate:
                best, rate = length, (rows + gained) / seconds
        return best

    def hear(
        self, proposed: int, agreed: int, seconds: float, rows: int, *, whole: bool | None = None
    ) -> None:
        """Of a draft of so many tokens, that took so long to make, beside so many rows. ``whole``:
        the model agreed with a whole branch; None: of a chain, which ``agreed`` tells."""
        keep = 1 - 1 / MEMORY
        self._right = self._right * keep + agreed
        whole = agreed == proposed if whole is None else whole
        self._wrong = self._wrong * keep + (not whole)
        known, each = self._token_seconds, seconds / proposed
        known = known or each
        self._token_seconds = known + (each - known) * (FASTER if each < known else SLOWER)
        plain, longer = self._pace.seconds(rows), self._pace.seconds(rows + proposed)
        saved = agreed * plain / rows - seconds - max(longer - plain, 0.0)
        known = saved if self.promise == math.inf else self.promise
        self.promise = known + (saved - known) / 8
        self.lose(-saved)

    def lose(self, seconds: float) -> None:
        """So much was lost; less than none: gained."""
        self._loss = max(self._loss + seconds, 0.0)
        if self._loss == 0:
            self._since = 0.0

    def wait(self, seconds: float) -> None:
        """So much time has gone by."""
        self._since += seconds
