"""Rows of a key-value cache: how many tokens each has, and which places they take. Pure.

A *row* is one sequence. In every *span*, which is all layers of one window, it has blocks of token
places, one behind the other wherever they lie. Layers that see everything hold all its tokens
there. Layers with a window hold the last ones in a ring: position p lies where p modulo the ring's
size would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count

from .blocks import BLOCK, free_blocks, round_up

SLACK = BLOCK
"""Tokens that a ring holds beyond its window, at least: a rollback by so many keeps the rest."""

_uids = count()


@dataclass(frozen=True, slots=True)
class Span:
    """The layers of one window."""

    window: int | None
    """Tokens that a query sees, itself and those before it; None: all."""
    places: int
    """Tokens for which there is room, of all rows together."""

    @property
    def ring(self) -> int | None:
        """The most places that a row takes; None: as many as it has tokens."""
        return None if self.window is None else ring_size(self.window)

    def row_places(self, capacity: int) -> int:
        """Places of a row of so many tokens."""
        size = round_up(capacity)
        return size if self.ring is None else min(size, self.ring)


def ring_size(window: int) -> int:
    """Places of a ring: its window and the slack, in whole blocks."""
    return round_up(window + SLACK)


def make_spans(windows: Sequence[int | None], tokens: int, max_rows: int) -> tuple[Span, ...]:
    """The spans of a model's layers, with room for ``tokens`` of all rows together."""
    spans = []
    for window in sorted(set(windows), key=lambda w: (w is not None, w or 0)):
        places = round_up(tokens)
        if window is not None:
            places = min(places, max_rows * ring_size(window))
        spans.append(Span(window, places))
    return tuple(spans)


@dataclass(slots=True, eq=False)
class Row:
    """One sequence. ``blocks``: by span, those that it has, in order."""

    capacity: int
    """The most tokens that it may have."""
    blocks: Mapping[Span, tuple[int, ...]]
    length: int = 0
    """Tokens whose keys and values are in place in every layer."""
    reach: int = 0
    """Tokens up to which places may have been written: a pass that failed wrote beyond length."""
    moved_from: int | None = None
    """From which token on some have moved since the last pass; None: none have."""
    dropped: bool = False
    uid: int = field(default_factory=lambda: next(_uids))

    def places(self, span: Span, first: int, end: int) -> list[tuple[int, int]]:
        """(place, count) of the positions from first to end, as far as the span holds them: of
        those that lie together at once."""
        if span.ring is not None:
            first = max(first, end - self.size(span))
        found: list[tuple[int, int]] = []
        while first < end:
            place, number = self.place(span, first), min(BLOCK - first % BLOCK, end - first)
            if found and sum(found[-1]) == place:
                found[-1] = (found[-1][0], found[-1][1] + number)
            else:
                found.append((place, number))
            first += number
        return found

    def place(self, span: Span, position: int) -> int:
        """Where one position is, or would be."""
        index, offset = divmod(position % self.size(span), BLOCK)
        return self.blocks[span][index] * BLOCK + offset

    def size(self, span: Span) -> int:
        """Places that it has."""
        return len(self.blocks[span]) * BLOCK

    def holds(self, span: Span, first: int, end: int) -> bool:
        """True if the positions from first to end can lie in the span at the same time."""
        return span.ring is None or end - first <= self.size(span)

    def intact(self, length: int) -> bool:
        """True if what a query at position ``length`` sees has not been overwritten."""
        return not any(
            span.window is not None
            and max(0, length - span.window + 1) < self.reach - self.size(span)
            for span in self.blocks
        )


class Rows:
    """Gives rows their blocks.

    Thread rules: one thread. What is taken follows from the rows that are there, so an interrupt
    loses no place.
    """

    def __init__(self, spans: Sequence[Span], max_rows: int) -> None:
        self.spans, self.max_rows = tuple(spans), max_rows
        self._rows: list[Row] = []

    def __iter__(self) -> Iterator[Row]:
        return iter([row for row in self._rows if not row.dropped])

    def add(self, capacity: int) -> Row | None:
        """A row with room for so many tokens; None if there is none at present."""
        rows = list(self)
        if len(rows) >= self.max_rows:
            return None
        blocks: dict[Span, tuple[int, ...]] = {}
        for span in self.spans:
            taken = {block for row in rows for block in row.blocks[span]}
            count = span.row_places(capacity) // BLOCK
            found = free_blocks(taken, span.places // BLOCK, count)
            if found is None:
                return None
            blocks[span] = found
        row = Row(capacity, blocks)
        self._rows = [*rows, row]
        return row

    def drop(self, row: Row) -> None:
        """Free a row's blocks. Idempotent."""
        row.dropped = True

    def truncate(self, row: Row, length: int) -> int:
        """Forget the tokens from ``length`` on; how many are left.

        That is ``length``, or 0 if a window reaches back to tokens that have been overwritten:
        then the row has to be prefilled again.
        """
        if not 0 <= length <= row.length:
            raise ValueError(f"length={length}: the row holds {row.length} tokens")
        if row.intact(length):
            row.length = length
        else:
            row.length = 0
            row.reach = 0
        return row.length


class BlockTable:
    """Rows' blocks as kernels look them up: for each row a line, with a column for its size in a
    span, and its blocks behind that."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._most = {span: (span.ring or span.places) // BLOCK for span in spans}
        widths = [1 + most for most in self._most.values()]
        self.columns = dict(zip(spans, accumulate(widths, initial=0), strict=False))
        self.width = sum(widths)

    def lines(self, rows: Sequence[Row]) -> list[list[int]]:
        """(R, width)."""
        return [[number for span in self._most for number in self._part(row, span)] for row in rows]

    def _part(self, row: Row, span: Span) -> list[int]:
        blocks = row.blocks[span]
        return [row.size(span), *blocks, *([0] * (self._most[span] - len(blocks)))]
