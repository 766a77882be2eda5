"""How the bytes of steps are cut: into parts, which a slot of host memory holds, and into jobs.

A part is a whole step where slots are as large as that, and what fits a slot of the ring otherwise.
A job is what one thread reads of a part at a stretch. Pure but for :func:`read_extent`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ..planning.layout import PAGE, Copy, Layout, align_up
from .files import OpenFiles
from .schedule import Orders


class Extent(NamedTuple):
    """Adjacent bytes of a file, and where they come to lie in a slot."""

    path: Path
    offset: int
    start: int
    """In the slot."""
    length: int
    """Whole pages, where reads are direct."""
    wanted: int
    """Bytes that must be there, from ``start`` on; a direct read may reach beyond."""

    @property
    def nbytes(self) -> int:
        """Of payload."""
        return self.wanted


def read_extent(files: OpenFiles, extent: Extent, slot: memoryview) -> None:
    """Bring it into a slot. Raises what reads raise."""
    path, offset, start, length, wanted = extent
    files.read_into(path, slot[start : start + length], offset, wanted)


@dataclass(frozen=True, slots=True)
class Part:
    """As much of a step as one slot holds: what is read, then what is copied out."""

    extents: tuple[Extent, ...]
    copies: tuple[Copy, ...]
    """``src`` counts from the begin of the slot. Of a whole step: its layout's own."""
    copy_nbytes: int
    chunk: int
    """Bytes of ``extents`` that one job reads at most."""
    num_jobs: int
    ends: tuple[int, ...]
    """Bytes up to the end of each of ``extents``."""

    def job(self, j: int) -> Sequence[Extent]:
        """What its ``j``-th job reads; small extents share one."""
        if self.num_jobs == 1:
            return self.extents
        ends, chunk = self.ends, self.chunk
        begin = j * chunk
        end = begin + chunk if j < self.num_jobs - 1 else ends[-1]
        extents = []
        i = bisect_right(ends, begin)
        while begin < end:
            path, offset, start, length, wanted = self.extents[i]
            skipped = begin - ends[i] + length
            taken = (end if end < ends[i] else ends[i]) - begin
            filled = wanted - skipped
            extents.append(
                Extent(
                    path, offset + skipped, start + skipped, taken,
                    taken if taken < filled else filled,
                )
            )  # fmt: skip
            begin += taken
            i += 1
        return extents


class Cutter:
    """Cuts steps into parts that fit slots of ``slot_nbytes`` (whole pages); None: one part each.

    ``aligned``: read in the whole pages that hold the payload, as direct reads need them. All lies
    in a slot at the file's phase, one read after the other: where a layout has it, if all fits.
    """

    def __init__(self, slot_nbytes: int | None, chunk: int, *, aligned: bool) -> None:
        self._slot_nbytes = slot_nbytes
        self._aligned = aligned
        self._chunk = chunk // PAGE * PAGE if aligned else chunk

    def cut(self, layout: Layout) -> list[Part]:
        """The parts of a step, in the order of its reads.

        Of one that reads nothing: an empty part where slots hold whole steps, else none.
        """
        groups = self._group(layout)
        if not groups[0] and self._slot_nbytes is not None:
            return []
        if len(groups) == 1:
            return [self._part(groups[0], layout.copies)]
        copies = sorted(layout.copies, key=lambda copy: copy.src)
        return [self._part(group, tuple(_clip(copies, group))) for group in groups]

    def _group(self, layout: Layout) -> list[list[_Placed]]:
        groups: list[list[_Placed]] = [[]]
        size = layout.host_nbytes if self._slot_nbytes is None else self._slot_nbytes
        room = size
        for read in layout.reads:
            lead = read.offset % PAGE if self._aligned else 0
            begin, end = read.offset - lead, read.offset + read.nbytes
            while begin < end:
                if room < PAGE:
                    groups.append([])
                    room = size
                phase = begin % PAGE
                wanted = min(room - phase, end - begin)
                length = align_up(wanted, PAGE) if self._aligned else wanted
                extent = Extent(read.path, begin, size - room + phase, length, wanted)
                groups[-1].append(_Placed(extent, read.slot_offset + begin - read.offset))
                begin += wanted
                room -= align_up(phase + length, PAGE)
        return groups

    def _part(self, group: Sequence[_Placed], copies: tuple[Copy, ...]) -> Part:
        extents = tuple(placed.extent for placed in group)
        ends = tuple(accumulate(extent.length for extent in extents))
        num_jobs = -(-ends[-1] // self._chunk) if ends else 0
        copy_nbytes = sum(copy.nbytes for copy in copies)
        return Part(extents, copies, copy_nbytes, self._chunk, num_jobs, ends)


class _Placed(NamedTuple):
    """An extent, and where its bytes would lie in a slot that holds the whole step."""

    extent: Extent
    slot_offset: int


class Parts:
    """The parts of a lane's steps. Immutable: cut once, whatever slot they come to lie in."""

    def __init__(self, layouts: Sequence[Layout], indices: Sequence[int], cutter: Cutter) -> None:
        self._parts = {index: cutter.cut(layouts[index]) for index in indices}
        self.counts = {index: len(parts) for index, parts in self._parts.items()}
        """By index of a step, how many it has."""

    def find(self, orders: Orders, k: int, number: int) -> tuple[int, Part]:
        """The ``k``-th part of a run of these orders, one of step ``number``: its place in that,
        and itself."""
        place = k - orders.read.before(number)
        return place, self._parts[orders.index(number)][place]


def _clip(copies: Sequence[Copy], group: Sequence[_Placed]) -> Iterator[Copy]:
    """What of the copies out of a whole step's slot comes from these extents."""
    for extent, first in group:
        last = first + extent.wanted
        at = bisect_right(copies, first, key=lambda copy: copy.src + copy.nbytes)
        while at < len(copies) and copies[at].src < last:
            copy = copies[at]
            begin, end = max(copy.src, first), min(copy.src + copy.nbytes, last)
            if begin < end:
                yield Copy(extent.start + begin - first, copy.dst + begin - copy.src, end - begin)
            at += 1
