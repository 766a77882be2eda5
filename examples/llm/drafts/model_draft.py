"""Drafts by another model of the same vocabulary, all of which is on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..kv.rows import Row
from ..passes.runner import Runner
from .steps import Steps
from .tree import NOTHING, Tree

AHEAD = 256
"""Tokens more than it has that a row gets room for, at least."""


class ModelDraft:
    """Proposes what the draft model would write itself.

    It has keys and values of its own for the rows that it drafts for. Those of a row that has ended
    are kept while there is room: a row that begins as that one does goes on from there. Thread
    rules: one thread.
    """

    weighs = True

    def __init__(self, runner: Runner, steps: Steps, max_length: int) -> None:
        """``runner``: of the draft model; ``steps``: its. ``max_length``: most tokens of a row
        there; no draft goes beyond."""
        self._steps, self._rows, self._max_length = steps, runner.kv.rows, max_length
        self._held: dict[int, _Held] = {}
        """By the row's key."""
        self._left: list[_Held] = []
        """Of rows that have ended, the newest last."""

    def propose(self, key: int, ids: Sequence[int], most: int) -> Tree:
        """As :class:`Drafter` says; nothing for a row that there is no room for."""
        most = min(most, self._max_length - len(ids))
        held = self._take(key, ids, len(ids) + most) if most > 0 else None
        if held is None:
            return NOTHING
        try:
            same = self._rows.truncate(held.row, min(held.common(ids), len(ids) - 1))
            behind = ids[same : len(ids)]
            found = self._steps.draft(held.row, behind, most)
        except BaseException:  # what the row holds is not known any more
            self._rows.drop(held.row)
            raise
        held.ids[same:] = [*behind, *found.trunk().tokens[:-1]]
        held.sure = len(ids)
        self._held[key] = held
        return found

    def accepted(self, key: int, proposed: int, agreed: int) -> None:
        """As :class:`Drafter` says: it sees by the next ids."""

    def forget(self, key: int) -> None:
        """As :class:`Drafter` says; what was computed for the row is kept while there is room."""
        held = self._held.pop(key, None)
        if held is not None:
            held.sure = 0
            self._left.append(held)

    def _take(self, key: int, ids: Sequence[int], places: int) -> _Held | None:
        """What is there for the row, out of the table, with so many places; None: no room."""
        held = self._held.pop(key, None)
        if held is not None:
            if held.row.capacity >= places:
                return held
            self._rows.drop(held.row)
        fit = [held for held in self._left if held.row.capacity >= places]
        best = max(fit, key=lambda held: held.common(ids), default=None)
        if best is not None and best.common(ids):
            self._left.remove(best)
            return best
        while True:
            capacity = min(max(2 * len(ids), places + AHEAD), self._max_length)
            row = self._rows.add(capacity) or self._rows.add(places)
            if row is not None:
                return _Held(row)
            if not self._left:
                return None
            self._rows.drop(self._left.pop(0).row)


@dataclass(eq=False, slots=True)
class _Held:
    """What the draft model has of a row."""

    row: Row
    ids: list[int] = field(default_factory=list)
    """Of which it has keys and values, a draft at the end."""
    sure: int = 0
    """How many of them were the row's text, and are if its last one is."""

    def common(self, ids: Sequence[int]) -> int:
        """How many ids are the same from the first on."""
        same = min(self.sure, len(self.ids))
        if len(ids) < same or (same and ids[same - 1] != self.ids[same - 1]):
            same = 0
        for mine, token in zip(self.ids[same:], ids[same : len(self.ids)], strict=False):
            if mine != token:
                break
            same += 1
        return same
