"""Drafts by the model's own weights in fewer bits, over its own keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..kv.rows import Row, Rows
from .steps import Steps
from .tree import NOTHING, Tree


class SelfDraft:
    """Proposes what the model's own weights, rounded, would write.

    The draft reads the keys and values that the model has committed and appends its own, which the
    model's next pass overwrites; so there is nothing to catch up with, and no prompt to take.
    Thread rules: one thread, between passes of the model.
    """

    weighs = True

    def __init__(self, steps: Steps, rows: Rows, by_key: Mapping[int, Row]) -> None:
        """``steps``: of a runner over the model's own cache, whose ``rows`` these are; ``by_key``:
        which of them a key names."""
        self._steps, self._rows, self._by_key = steps, rows, by_key

    def propose(self, key: int, ids: Sequence[int], most: int) -> Tree:
        """As :class:`Drafter` says."""
        row = self._by_key[key]
        length = row.length
        most = min(most, row.capacity - len(ids))
        if most < 1:
            return NOTHING
        try:
            return self._steps.draft(row, ids[length : len(ids)], most)
        finally:
            self._rows.truncate(row, length)

    def accepted(self, key: int, proposed: int, agreed: int) -> None:
        """As :class:`Drafter` says."""

    def forget(self, key: int) -> None:
        """As :class:`Drafter` says."""
