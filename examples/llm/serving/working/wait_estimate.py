"""How long passes take, and when there will be room for another text."""

from __future__ import annotations

import math

NEWEST = 0.2
"""How much the newest counts."""
LEAST, MOST = 1, 600
"""Seconds, of what is told to a client: longer ones would give up anyway."""


class WaitEstimate:
    """Running means of what was measured. Thread rules: one thread at a time."""

    def __init__(self) -> None:
        self.pass_seconds: float | None = None
        """None: not known yet."""
        self._passes: float | None = None

    def hear_pass(self, seconds: float) -> None:
        """A pass took so long."""
        self.pass_seconds = _mean(self.pass_seconds, seconds)

    def hear_text(self, passes: int) -> None:
        """A text ended that took so many passes."""
        self._passes = _mean(self._passes, float(passes))

    def retry_after(self, rows: int) -> int:
        """Whole seconds until one of those that wait has a row: the time that a text takes, shared
        by those that are made side by side."""
        if self.pass_seconds is None or self._passes is None:
            return LEAST
        seconds = self.pass_seconds * self._passes / max(rows, 1)
        return min(max(math.ceil(seconds), LEAST), MOST)


def _mean(known: float | None, new: float) -> float:
    return new if known is None else known + NEWEST * (new - known)
