"""What has come for one request, and has not been fetched yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

from .pieces import Piece


class Mailbox:
    """Of each of its texts one piece at most waits: what passes bring meanwhile is joined to it.

    So a client that reads slowly holds no more than its texts, and nobody waits for it. Thread
    rules: the event loop's.
    """

    def __init__(self, count: int) -> None:
        """``count``: how many texts there are."""
        self._pieces: dict[int, Piece] = {}
        self._open = set(range(count))
        self._there = asyncio.Event()

    @property
    def open(self) -> frozenset[int]:
        """Those whose last piece has not come."""
        return frozenset(self._open)

    def put(self, index: int, piece: Piece) -> None:
        """A text's next piece; none comes after its last."""
        if index not in self._open:
            return
        if piece.ends:
            self._open.discard(index)
        if (known := self._pieces.get(index)) is not None:
            known.join(piece)
        else:
            self._pieces[index] = piece
        self._there.set()

    @property
    def ended(self) -> bool:
        """True: all has been fetched."""
        return not self._open and not self._pieces

    async def take(self, seconds: float | None = None) -> list[tuple[int, Piece]]:
        """All that is there, as soon as there is something; nothing when all has ended, or if there
        is nothing for so long."""
        if not self._pieces and self._open:
            with suppress(TimeoutError):
                # Not wait_for(): before Python 3.12 it may swallow a cancellation.
                async with asyncio.timeout(seconds):
                    await self._there.wait()
        self._there.clear()
        pieces, self._pieces = self._pieces, {}
        return sorted(pieces.items())

    def fail(self, error: Exception) -> None:
        """End all texts that have not ended."""
        for index in sorted(self._open):
            self.put(index, Piece(error=error))

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._open))
