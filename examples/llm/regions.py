"""Which part of a fixed number of token places belongs to which row. Pure bookkeeping."""

from __future__ import annotations

BLOCK = 256
"""Tokens; regions begin and end at multiples of it, and host memory grows by it."""


def round_up(count: int, unit: int = BLOCK) -> int:
    """The next multiple of ``unit``, at least one."""
    return max(-(-count // unit), 1) * unit


class Regions:
    """First fit over ``capacity`` token places, a multiple of BLOCK."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: list[tuple[int, int]] = []
        """(start, end) of each region, in order."""

    @property
    def used(self) -> int:
        """Places that are taken."""
        return sum(end - start for start, end in self._taken)

    def take(self, count: int) -> int | None:
        """Start of ``count`` places rounded up to blocks; None if there is no such gap."""
        count, start = round_up(count), 0
        for index, (first, end) in enumerate([*self._taken, (self.capacity, self.capacity)]):
            if first - start >= count:
                self._taken.insert(index, (start, start + count))
                return start
            start = end
        return None

    def give_back(self, start: int) -> None:
        """Free the region that begins at ``start``."""
        (index,) = (i for i, region in enumerate(self._taken) if region[0] == start)
        del self._taken[index]
