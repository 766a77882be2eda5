"""Rows for requests: new ones, with what others that began alike have computed, or the kept one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..kv.blocks import BLOCK
from ..kv.kept import KeptRow
from ..kv.rows import Row, Rows
from ..request import Request


class Places:
    """Gives requests their rows, and notes what is in them. Thread rules: that of the passes."""

    def __init__(self, rows: Rows, alike: float) -> None:
        """``alike``: tokens of a text up to which a key is the same whatever follows."""
        self._rows, self._alike = rows, alike
        self.kept = KeptRow(rows, alike)

    def take(self, request: Request, running: Iterable[Request]) -> Row | None:
        """A row for a request; None: not now. That is also so while one that runs is about to
        compute what both begin with."""
        if request.keeps:
            return self.kept.take(request.prompt_ids, request.places)
        self.kept.forget()
        if not self._shares(request):
            return self._rows.add(request.places)
        ids = request.prompt_ids[:-1]  # the logits of the last one are needed
        there = self._rows.there(ids, request.salt)
        for other in running:
            common = common_blocks(ids, other.prompt_ids) * BLOCK if self._shares(other) else 0
            computed = 0 if other.row is None else other.row.length
            if common > max(there, computed) and other.salt == request.salt:
                return None
        return self._rows.add(request.places, ids, request.salt)

    def note(self, request: Request) -> None:
        """A pass has appended tokens to its row: others may make use of them, unless it failed."""
        if request.row is None or not self._shares(request):
            return
        if request.error is None:
            self._rows.note(request.row, request.known, request.salt)
        else:
            self._rows.forget(request.row)

    def forget(self) -> None:
        """Nothing that has ended is of use any more."""
        self.kept.forget()
        self._rows.forget_ended()

    def _shares(self, request: Request) -> bool:
        return self._rows.shares and not request.keeps and request.places <= self._alike


def common_blocks(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many whole blocks two texts begin with alike."""
    count = 0
    for end in range(BLOCK, min(len(ids), len(others)) + 1, BLOCK):
        if list(ids[end - BLOCK : end]) != list(others[end - BLOCK : end]):
            break
        count += 1
    return count
