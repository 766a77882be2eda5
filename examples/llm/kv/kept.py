"""The row of the last prompt, kept for what the next one has in common with it."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Row, Rows


class KeptRow:
    """At most one row, with the tokens that it holds. Thread rules: one thread."""

    def __init__(self, rows: Rows, capacity: int, alike: float) -> None:
        """``capacity``: the row's. ``alike``: tokens up to which a key is the same in any text;
        beyond, a text is prefilled as a whole."""
        self._rows, self._capacity, self._alike = rows, capacity, alike
        self._ids: list[int] = []
        self.row: Row | None = None

    def take(self, ids: Sequence[int]) -> Row:
        """The row, cut back to what it has in common with these tokens; or a new one."""
        if self.row is None:
            self.row, self._ids = self._rows.add(self._capacity), []
            assert self.row is not None
        row, same = self.row, 0
        if max(row.length, len(ids)) <= self._alike:
            # The last token is computed in any case: its logits are needed.
            for a, b in zip(self._ids[: row.length], ids[:-1], strict=False):
                if a != b:
                    break
                same += 1
        self._rows.truncate(row, same)
        self._ids = list(ids)
        return row

    def note(self, ids: Sequence[int]) -> None:
        """These are the tokens by now."""
        self._ids = list(ids)

    def forget(self) -> None:
        """Keep nothing. Idempotent."""
        if self.row is not None:
            self._rows.drop(self.row)
            self.row = None
