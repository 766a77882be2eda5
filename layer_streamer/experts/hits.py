"""How many of the experts that were asked for a pool would have had: the simulator's core. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

from .policies import Key, MayGo, Policy
from .slots import SlotTable


class Belady:
    """The one that is asked for again latest goes: no policy hits more often, and none can be this
    one, for it has to know what will be asked for."""

    def __init__(self, asked: Iterable[Key]) -> None:
        """``asked``: every touch to come, in order."""
        self._next_at = list[float]()
        """Of each touch, when the same expert is touched next."""
        last = dict[Key, int]()
        for at, key in enumerate(asked):
            self._next_at.append(float("inf"))
            if key in last:
                self._next_at[last[key]] = at
            last[key] = at
        self.reset()

    def touch(self, key: Key) -> None:
        self._held[key] = self._next_at[self._at]
        heapq.heappush(self._latest, (-self._held[key], key))
        self._at += 1

    def victims(self, may_go: MayGo, count: int = 1) -> list[Key]:
        stay, gone = list[tuple[float, Key]](), list[Key]()
        while self._latest and len(gone) < count:
            negative, key = heapq.heappop(self._latest)
            if self._held.get(key) != -negative:
                continue  # it was touched again since
            if may_go(key):
                gone.append(key)
                del self._held[key]
            else:
                stay.append((negative, key))
        for entry in stay:
            heapq.heappush(self._latest, entry)
        return gone

    def reset(self) -> None:
        """All is to come again."""
        self._at = 0
        self._held = dict[Key, float]()
        self._latest = list[tuple[float, Key]]()


def in_rounds(steps: Iterable[Sequence[Key]], slots: int) -> Iterator[Sequence[Key]]:
    """What is asked for at once, where a step asks for more than there are slots."""
    for keys in steps:
        for begin in range(0, len(keys), slots):
            yield keys[begin : begin + slots]


def count_hits(steps: Iterable[Sequence[Key]], slots: int, policy: Policy) -> int:
    """How many of all that the steps ask for are there when they are asked for.

    A step's experts, which differ, are needed together; a step of more than ``slots`` is taken in
    rounds. The pool is empty at first.
    """
    table, hits = SlotTable(slots, policy), 0
    for keys in in_rounds(steps, slots):
        hits += len(keys) - len(table.place(keys).missing)
        table.settle()
    return hits


def most_hits(steps: Sequence[Sequence[Key]], slots: int) -> int:
    """How many could be at most, with the same rounds."""
    return count_hits(steps, slots, Belady(key for keys in steps for key in keys))
