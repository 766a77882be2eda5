"""Rows of a key-value cache: how many tokens each has, and which places they take. Pure.

A *row* is one sequence. In every *span*, which is all layers of one window, it has blocks of token
places, one behind the other wherever they lie. Layers that see everything hold all its tokens
there. Layers with a window hold the last ones in a ring: position p lies where p modulo the ring's
size would.

Rows whose texts begin alike have blocks in common, if all layers see everything: a ring is written
over. A block that is known to hold the beginning of a text is kept as long as there are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, islice

from .blocks import BLOCK, free_blocks, round_up
from .prefixes import Prefixes

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
    known: int = 0
    """Blocks of whose text others may make use."""
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
        self.shares = [span.window for span in self.spans] == [None]
        """True: rows that begin alike have blocks in common."""
        self._rows: list[Row] = []
        self._prefixes = Prefixes()

    def __iter__(self) -> Iterator[Row]:
        return iter([row for row in self._rows if not row.dropped])

    def add(self, capacity: int, ids: Sequence[int] = (), salt: bytes = b"") -> Row | None:
        """A row with room for so many tokens; None if there is none at present. It has as many of
        its first ``ids``, in whole blocks, as were noted of any text with that salt."""
        rows = list(self)
        if len(rows) >= self.max_rows:
            return None
        shared = self._prefixes.find(ids[:capacity], salt) if self.shares else ()
        blocks: dict[Span, tuple[int, ...]] = {}
        for span in self.spans:
            taken = {*shared, *(block for row in rows for block in row.blocks[span])}
            count = span.row_places(capacity) // BLOCK - len(shared)
            found = self._take(taken, span.places // BLOCK, count)
            if found is None:
                return None
            blocks[span] = shared + found
        there = len(shared) * BLOCK
        row = Row(capacity, blocks, length=there, reach=there, known=len(shared))
        self._rows = [*rows, row]
        return row

    def there(self, ids: Sequence[int], salt: bytes = b"") -> int:
        """How many of its first tokens a new row of this text would have."""
        return len(self._prefixes.find(ids, salt)) * BLOCK if self.shares else 0

    def forget(self, row: Row) -> None:
        """What the row holds is of no use to others that may come."""
        if self.shares:
            (blocks,) = row.blocks.values()
            self._prefixes.forget(blocks[: row.known])

    def forget_ended(self) -> None:
        """What only rows that have ended held is of no use any more."""
        used = {block for row in self for blocks in row.blocks.values() for block in blocks}
        self._prefixes.forget(self._prefixes.blocks - used)

    def note(self, row: Row, ids: Sequence[int], salt: bytes = b"") -> None:
        """The row's text is ``ids``, as far as it has got: others that begin so may have its whole
        blocks from now on, also after its end."""
        known = min(len(ids), row.length) // BLOCK
        if self.shares and known > row.known:
            (blocks,) = row.blocks.values()
            self._prefixes.note(ids[: known * BLOCK], blocks, salt)
            row.known = known

    def drop(self, row: Row) -> None:
        """Free a row's blocks. Idempotent."""
        row.dropped = True

    def truncate(self, row: Row, length: int) -> int:
        """Forget the tokens from ``length`` on; how many are left.

        That is ``length``, or 0 if a window reaches back to tokens that have been overwritten:
        then the row has to be prefilled again. What others may have made use of is theirs no more;
        ValueError if they have.
        """
        if not 0 <= length <= row.length:
            raise ValueError(f"length={length}: the row holds {row.length} tokens")
        if length < row.known * BLOCK:
            self._disown(row, length // BLOCK)
        if row.intact(length):
            row.length = length
        else:
            row.length = 0
            row.reach = 0
        return row.length

    def _take(self, taken: set[int], total: int, count: int) -> tuple[int, ...] | None:
        """Blocks that are free, of texts that have ended if need be: of those unused longest."""
        kept = self._prefixes.blocks if self.shares else set[int]()
        lacking = count - (total - len(taken | kept))
        if lacking > 0:
            gone = set(islice(self._prefixes.oldest(taken), lacking))
            if len(gone) < lacking:
                return None
            self._prefixes.forget(gone)
            kept -= gone
        return free_blocks(taken | kept, total, count)

    def _disown(self, row: Row, known: int) -> None:
        """No other row may have the row's blocks from ``known`` on, which it will write to."""
        (span,) = self.spans
        gone = set(row.blocks[span][known : row.known])
        if any(gone.intersection(other.blocks[span]) for other in self if other is not row):
            raise ValueError(f"rows have blocks in common from token {known * BLOCK} on")
        self._prefixes.forget(gone)
        row.known = known


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
