"""Tokens of several rows that travel together, and which places they have. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from .blocks import BLOCK
from .rows import Row, Span

Numbers = npt.NDArray[np.int64]
Part = tuple[Row, int, int]
"""Of a row, the tokens from one to another."""


class Tokens:
    """Parts of rows, the same in every layer of a pass: what is found out for one serves all.

    Thread rules: any thread; what two find out at the same time is the same.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = tuple(parts)
        self.ends: Mapping[int, int] = {row.uid: end for row, _, end in self._parts}
        """By row's uid, up to which token."""
        self._runs: dict[Span, Numbers] = {}

    def runs(self, span: Span) -> Numbers:
        """(place, count) of those that lie together, each place once: (n, 2), int64."""
        found = self._runs.get(span)
        if found is None:
            parts = once(self._parts)
            runs = [run for row, first, end in parts for run in row.places(span, first, end)]
            found = np.array(runs, dtype=np.int64).reshape(-1, 2)
            self._runs[span] = found
        return found

    def of_rows_left(self) -> Tokens:
        """Without rows that have been dropped; itself if none has."""
        left = [part for part in self._parts if not part[0].dropped]
        return self if len(left) == len(self._parts) else Tokens(left)


def once(parts: Iterable[Part]) -> list[Part]:
    """Parts without what is at the begin of a row and in common with one before it, whose part has
    it."""
    found: list[Part] = []
    brought: dict[int, tuple[int, int]] = {}
    for row, begin, end in parts:
        # Rows have blocks in common only where no layer has a window: in their only span.
        blocks = next(iter(row.blocks.values()))[: row.known]
        first = begin
        for index in range(begin // BLOCK, len(blocks)):
            start, stop = brought.get(blocks[index], (first + 1, 0))
            if not start <= first < stop:
                break
            first = min(stop, (index + 1) * BLOCK)
        if first < end:
            found.append((row, first, end))
            for block in blocks[first // BLOCK : -(-end // BLOCK)]:
                start, stop = brought.get(block, (first, end))
                meet = start <= end and first <= stop
                brought[block] = (min(start, first), max(stop, end)) if meet else (first, end)
    return found
