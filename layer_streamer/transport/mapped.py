"""The checkpoint's own pages as host memory: mapped files, faulted in, page-locked or viewed.

The page cache is then the only copy of the model in host memory. A mapped file that shrinks kills
the process when the CPU touches the missing pages, as it does to make a small copy to a GPU; larger
ones the device goes on making from the pages that it holds. So every pass checks the files
(files.OpenFiles), on the CPU each hand-out does too, and populates before it looks: what remains is
the time from there to the look.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..checkpoint.manifest import TensorSpec
from ..devices.device import Device
from ..errors import ReadError
from ..machine.libc import populate
from ..planning.layout import PAGE, Copy, Layout, Read, View
from .files import OpenFiles
from .memory import view_tensor
from .pool import Source, cut_source
from .tasks import run_all

logger = logging.getLogger(__name__)

MERGE_GAP = 1 << 20
"""Extents this many bytes apart are mapped and page-locked as one."""
POPULATE_CHUNK = 16 << 20
"""Bytes that one thread faults in at a time."""
UNSUPPORTED = (None, errno.EINVAL, errno.ENOSYS)
"""Of errno, where the system cannot populate; any other one tells of the pages."""


class _Pages:
    """Memory of a read-only mapping, as numpy takes it.

    The array keeps this object, and with it the mapping. Said to be writable, because torch warns
    of arrays that are not: a write through it kills the process, as the contract of weights says.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (len(mapping),),
            "data": (address, False),
        }


@dataclass(frozen=True, slots=True)
class Region:
    """A page-aligned range of a file, mapped."""

    path: Path
    offset: int
    memory: torch.Tensor
    """uint8, read-only."""

    def holds(self, path: Path, offset: int) -> bool:
        return path == self.path and self.offset <= offset < self.offset + self.memory.nbytes


class MappedFiles:
    """The ranges of a checkpoint's files that some reads cover, mapped into memory.

    Thread rules: built and closed by one thread; populated by any. Nothing is read until then.
    Errors: OSError where the file system cannot map, CheckpointChangedError for a file that shrank.
    """

    def __init__(self, files: OpenFiles, reads: Iterable[Read]) -> None:
        self._files = files
        self.regions = [
            Region(path, start, _map(files, path, start, end))
            for path, start, end in merge_ranges(reads)
        ]
        self._pinned: list[torch.Tensor] = []
        self._device: Device | None = None

    @property
    def nbytes(self) -> int:
        return sum(region.memory.nbytes for region in self.regions)

    def find(self, path: Path, offset: int) -> Region:
        """The region that has this byte of the file."""
        return next(region for region in self.regions if region.holds(path, offset))

    def view(self, spec: TensorSpec) -> torch.Tensor:
        """The tensor over the file's own pages; it lies there aligned for its dtype."""
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=spec.dtype)
        region = self.find(spec.path, spec.offset)
        offset = spec.offset - region.offset
        return view_tensor(region.memory, View("", spec.dtype, spec.shape, offset, spec.nbytes))

    def source(self, layout: Layout, segment: int) -> Source:
        """Where a step's bytes lie, as they are copied; pages are pinned in segments."""
        copies, parts = list[Copy](), list[torch.Tensor]()
        for read in layout.reads:
            region = self.find(read.path, read.offset)
            inside = [copy for copy in layout.copies if read.holds(copy.src)]
            base = read.offset - region.offset - read.slot_offset
            cut = cut_source(region.memory, base, tuple(inside), segment, pinned=True)
            copies += cut.copies
            parts += cut.parts
        # As one object if nothing was split: what goes to the same places is looked up by it.
        same = tuple(copies) == layout.copies
        return Source(layout.copies if same else tuple(copies), tuple(parts), pinned=True)

    def check_populates(self) -> None:
        """Raises OSError if pages cannot be populated, so that a look at them might kill."""
        for region in self.regions:
            populate_range(self._files, region, 0, min(PAGE, region.memory.nbytes))

    def populate_all(self, threads: int, on_done: Callable[[int], object]) -> None:
        """Fault everything in, by several threads; ``on_done(bytes)`` as they arrive.

        Nothing is done where the system cannot: page-locking then does it, on one thread.
        """
        tasks = [
            partial(self._read_ahead_and_populate, region, start)
            for region in self.regions
            for start in range(0, region.memory.nbytes, POPULATE_CHUNK)
        ]
        run_all(tasks, threads, on_done=on_done)
        self._files.check_unchanged()

    def pin(self, device: Device) -> bool:
        """Page-lock every region; False, with nothing locked, if one is refused."""
        self._device = device
        try:
            # An interrupt in the midst of it, on the calling thread, could lose a lock.
            run_all([partial(self._pin_all, device)], 1)
        except BaseException:
            self.close()
            raise
        if len(self._pinned) < len(self.regions):
            self.close()
            return False
        return True

    def _pin_all(self, device: Device) -> None:
        for region in self.regions:
            if not device.pin(region.memory, read_only=True):
                return
            self._pinned.append(region.memory)

    def close(self) -> None:
        """Give the page locks back. Pages go when the last view of them does. Idempotent."""
        while self._pinned:
            try:
                memory = self._pinned.pop()
            except IndexError:
                return  # another thread that closes was first
            assert self._device is not None
            self._device.unpin(memory)

    def _read_ahead_and_populate(self, region: Region, start: int) -> int:
        nbytes = min(POPULATE_CHUNK, region.memory.nbytes - start)
        # Faults read a few pages at a time; this has the disk read the chunk in large requests.
        if hasattr(os, "posix_fadvise"):
            descriptor = self._files.descriptor(region.path)
            os.posix_fadvise(descriptor, region.offset + start, nbytes, os.POSIX_FADV_WILLNEED)
        with suppress(OSError):
            populate_range(self._files, region, start, nbytes)
        return nbytes


@dataclass(frozen=True, slots=True)
class MappedPiece:
    """Bytes of a mapped file that are faulted in before they are looked at."""

    path: Path
    offset: int
    wanted: int
    region: Region

    def make_ready(self, files: OpenFiles) -> None:
        """Raises ReadError; CheckpointChangedError where a look would kill the process."""
        start = (self.offset - self.region.offset) // PAGE * PAGE
        end = self.offset - self.region.offset + self.wanted
        populate_range(files, self.region, start, end - start)


def populate_range(files: OpenFiles, region: Region, start: int, nbytes: int) -> None:
    """Fault in ``nbytes`` from byte ``start`` of a region, a multiple of a page.

    Errors: CheckpointChangedError, ReadError; OSError where the system cannot populate.
    """
    try:
        populate(region.memory.data_ptr() + start, nbytes, write=False)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            raise
        # EFAULT means that a touch would kill: beyond the end of the file, or on a failing disk.
        files.check_unchanged([region.path])
        place = f"{region.path}: {nbytes} mapped bytes at offset {region.offset + start}"
        raise ReadError(f"{place} cannot be read: {error.strerror or error}") from error


def cut_mapped_jobs(
    reads: Sequence[Read], mapped: MappedFiles, chunk: int
) -> list[list[MappedPiece]]:
    """The jobs that fault a step's bytes in, of at most ``chunk`` bytes each."""
    jobs = []
    for read in reads:
        for done in range(0, read.nbytes, chunk):
            offset = read.offset + done
            region = mapped.find(read.path, offset)
            wanted = min(chunk, read.nbytes - done)
            jobs.append([MappedPiece(read.path, offset, wanted, region)])
    return jobs


def merge_ranges(reads: Iterable[Read]) -> list[tuple[Path, int, int]]:
    """(path, start, end) that cover the reads, merged where MERGE_GAP allows.

    A range starts at a page and ends with its last read: the file may end there too.
    """
    ranges: list[tuple[Path, int, int]] = []
    for read in sorted(reads, key=lambda read: (str(read.path), read.offset)):
        start, end = read.offset // PAGE * PAGE, read.offset + read.nbytes
        if ranges and ranges[-1][0] == read.path and start - ranges[-1][2] <= MERGE_GAP:
            path, first, last = ranges[-1]
            ranges[-1] = (path, first, max(last, end))
        else:
            ranges.append((read.path, start, end))
    return ranges


def _map(files: OpenFiles, path: Path, start: int, end: int) -> torch.Tensor:
    try:
        mapping = mmap.mmap(
            files.descriptor(path),
            end - start,
            flags=mmap.MAP_SHARED,
            prot=mmap.PROT_READ,
            offset=start,
        )
    except ValueError as error:
        # What Python says of a range beyond the end of the file.
        files.check_unchanged([path])
        raise ReadError(f"{path}: bytes {start} to {end} cannot be mapped: {error}") from error
    with torch.inference_mode(False):
        return torch.from_numpy(np.asarray(_Pages(mapping)))
