"""How many threads compute layers in host memory, by how long passes took.

More are not always faster: those that launch, copy and read want cores, too, and so do others on a
machine that is shared. One that waits for its core holds all others up at the end of a product.
"""

from __future__ import annotations

from collections.abc import Sequence

SHARES = (1.0, 0.75, 0.5, 0.375)
"""Of as many as there may be: the numbers that are tried."""
TRIES = 3
"""Passes of each, of which the fastest counts: what makes one slow is most often something else."""
AGAIN = 2048
"""Passes after which all are tried anew: who else computes there comes and goes."""


class Crew:
    """Numbers of threads, of which the one is kept with which passes took least. Pure.

    Thread rules: one thread.
    """

    def __init__(self, most: int, shares: Sequence[float] = SHARES) -> None:
        numbers = {max(1, round(most * share)) for share in shares}
        self._numbers = sorted(numbers, reverse=True)
        self._heard: dict[int, list[float]] = {}
        self._passes = 0
        """Since all had been tried."""

    @property
    def tries(self) -> bool:
        """True: passes are to be heard of, until it is known which number is best."""
        return len(self._numbers) > 1 and self._untried() is not None

    @property
    def number(self) -> int:
        """Of threads, for the next pass."""
        untried = self._untried()
        if untried is not None:
            return untried
        return min(self._numbers, key=lambda number: min(self._heard[number]))

    def hear(self, number: int, seconds: float) -> None:
        """How long a pass took that had so many threads."""
        if self.tries:
            self._heard.setdefault(number, []).append(seconds)

    def count(self) -> None:
        """A pass has begun, heard of or not."""
        if self.tries:
            return
        self._passes += 1
        if self._passes > AGAIN:
            self._heard.clear()
            self._passes = 0

    def _untried(self) -> int | None:
        few = (n for n in self._numbers if len(self._heard.get(n, ())) < TRIES)
        return next(few, None)
