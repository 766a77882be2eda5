"""How the bytes of a step are cut for the threads that bring them into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .files import OpenFiles
from .layout import PAGE, Read, align_up


class Piece(Protocol):
    """Bytes of a file that one call makes ready."""

    @property
    def path(self) -> Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def wanted(self) -> int:
        """Bytes of payload, from ``offset`` on."""

    def make_ready(self, files: OpenFiles) -> None:
        """Bring them into memory. Raises ReadError, CheckpointChangedError."""


@dataclass(frozen=True, slots=True)
class SlotPiece:
    """Bytes that one call reads into a slot."""

    path: Path
    offset: int
    view: memoryview
    wanted: int
    """Bytes of the view that must be filled; a direct read may reach beyond."""

    def make_ready(self, files: OpenFiles) -> None:
        files.read_into(self.path, self.view, self.offset, self.wanted)


class SlotCutter:
    """Cuts reads into slots: ``chunk`` bytes at most for one thread at a stretch.

    ``aligned``: in the whole pages that hold the payload, as direct reads need them; a slot has
    room for these, at the file's phase.
    """

    def __init__(self, chunk: int, *, aligned: bool) -> None:
        self._aligned = aligned
        self._grain = PAGE if aligned else 1
        self._chunk = chunk // self._grain * self._grain

    def cut(self, reads: Sequence[Read], slot: memoryview) -> list[list[SlotPiece]]:
        """The jobs that bring a step's reads into ``slot``; small reads share a job."""
        jobs: list[list[SlotPiece]] = []
        room = 0
        for read in reads:
            lead = read.offset % PAGE if self._aligned else 0
            begin, end = read.offset - lead, read.offset + read.nbytes
            while begin < end:
                if room < self._grain:
                    jobs.append([])
                    room = self._chunk
                wanted = min(room, end - begin)
                length = align_up(wanted, self._grain)
                start = read.slot_offset + begin - read.offset
                jobs[-1].append(SlotPiece(read.path, begin, slot[start : start + length], wanted))
                begin += length
                room -= length
        return jobs
