"""The row of the last prompt, kept for what the next one has in common with it."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Row, Rows


class KeptRow:
    """At most one row that nobody uses, with the tokens that it holds. Thread rules: one thread."""

    def __init__(self, rows: Rows, alike: float) -> None:
        """``alike``: tokens up to which a key is the same in any text; beyond, a text is prefilled
        as a whole."""
        self._rows, self._alike = rows, alike
        self._kept: tuple[Row, Sequence[int]] | None = None

    @property
    def row(self) -> Row | None:
        """None: there is none, or it is in use."""
        return None if self._kept is None else self._kept[0]

    def take(self, ids: Sequence[int], capacity: int) -> Row | None:
        """The row, cut back to what it has in common with these tokens; or a new one, of that
        capacity; None if there is no room for it. It is the caller's."""
        kept, self._kept = self._kept, None
        if kept is None or kept[0].capacity < capacity:
            if kept is not None:
                self._rows.drop(kept[0])
            return self._rows.add(capacity)
        (row, held), same = kept, 0
        if max(row.length, len(ids)) <= self._alike:
            # The last token is computed in any case: its logits are needed.
            for a, b in zip(held[: row.length], ids[:-1], strict=False):
                if a != b:
                    break
                same += 1
        self._rows.truncate(row, same)
        return row

    def keep(self, row: Row, ids: Sequence[int]) -> None:
        """Keep a row that begins with these tokens, as far as it has some, in the place of the one
        that is kept."""
        self.forget()
        self._kept = row, list(ids)

    def forget(self) -> None:
        """Keep nothing. Idempotent."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._rows.drop(kept[0])
