"""How the bytes of a step are cut for the threads that bring them into memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..planning.layout import PAGE, Copy, Layout, Read, align_up
from .files import OpenFiles


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


MAX_KEPT = 1 << 14
"""Pieces that are kept, some 350 bytes each. Those of slots without end would outgrow the slots:
where there are more, cutting them anew is little beside the reads."""


class SlotJobs:
    """The reads that fill slots which hold a step each; cut once, then kept if they are not many.

    Thread rules: one thread.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        slots: Sequence[memoryview],
        cutter: SlotCutter,
        faults: Mapping[int, Sequence[Sequence[Piece]]],
    ) -> None:
        """``faults``: by step, what is done instead of reads."""
        self._layouts, self._slots, self._cutter, self._faults = layouts, slots, cutter, faults
        self._jobs: dict[tuple[int, int], Sequence[Sequence[Piece]]] = {}
        self._room = MAX_KEPT

    def jobs(self, n: int, index: int, slot: int) -> Sequence[Sequence[Piece]]:
        """The jobs that bring step ``index`` of a pass into a slot."""
        jobs = self._jobs.get((index, slot))
        if jobs is None:
            jobs = self._faults.get(index)
            if jobs is None:
                jobs = self._cutter.cut(self._layouts[index].reads, self._slots[slot])
                count = sum(map(len, jobs))
                if count > self._room:
                    return jobs
                self._room -= count
            self._jobs[index, slot] = jobs
        return jobs


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file that one call reads to ``start`` of a ring's slot, ``length`` at most."""

    path: Path
    offset: int
    start: int
    length: int
    wanted: int
    """Bytes of payload; a direct read may reach beyond."""
    slot_offset: int
    """Where these bytes would lie in a slot that holds the whole step."""


@dataclass(frozen=True, slots=True)
class Part:
    """As much of a step as one slot of a ring holds: what is read, then what is copied out."""

    extents: tuple[Extent, ...]
    copies: tuple[Copy, ...]
    """``src`` counts from the begin of the ring's slot."""
    copy_nbytes: int

    def cut(self, slot: memoryview) -> list[SlotPiece]:
        """Its reads into a slot of the ring."""
        return [
            SlotPiece(e.path, e.offset, slot[e.start : e.start + e.length], e.wanted)
            for e in self.extents
        ]


class RingCutter:
    """Cuts steps into parts that fit slots of ``slot_nbytes`` (whole pages).

    ``aligned``: read in the whole pages that hold the payload. Everything lies in a ring's slot at
    the file's phase, small reads one after the other.
    """

    def __init__(self, slot_nbytes: int, *, aligned: bool) -> None:
        self._slot_nbytes = slot_nbytes
        self._aligned = aligned

    def cut(self, layout: Layout) -> list[Part]:
        """The parts of a step, in the order of its reads; none for a step that reads nothing."""
        groups: list[list[Extent]] = []
        room = 0
        for read in layout.reads:
            lead = read.offset % PAGE if self._aligned else 0
            begin, end = read.offset - lead, read.offset + read.nbytes
            while begin < end:
                if room < PAGE:
                    groups.append([])
                    room = self._slot_nbytes
                phase = begin % PAGE
                start = self._slot_nbytes - room + phase
                wanted = min(room - phase, end - begin)
                length = align_up(wanted, PAGE) if self._aligned else wanted
                slot_offset = read.slot_offset + begin - read.offset
                extent = Extent(read.path, begin, start, length, wanted, slot_offset)
                groups[-1].append(extent)
                begin += wanted
                room -= align_up(phase + length, PAGE)
        copies = sorted(layout.copies, key=lambda copy: copy.src)
        parts = []
        for group in groups:
            clipped = tuple(_clip(copies, group))
            parts.append(Part(tuple(group), clipped, sum(copy.nbytes for copy in clipped)))
        return parts


def _clip(copies: Sequence[Copy], extents: Sequence[Extent]) -> Iterator[Copy]:
    """What of the copies out of a whole step's slot comes from these extents."""
    for extent in extents:
        first, last = extent.slot_offset, extent.slot_offset + extent.wanted
        at = bisect_right(copies, first, key=lambda copy: copy.src + copy.nbytes)
        while at < len(copies) and copies[at].src < last:
            copy = copies[at]
            begin, end = max(copy.src, first), min(copy.src + copy.nbytes, last)
            if begin < end:
                src = extent.start + begin - first
                yield Copy(src, copy.dst + begin - copy.src, end - begin)
            at += 1
