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
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.manifest import TensorSpec
from ..devices.device import Device
from ..errors import ReadError
from ..machine.libc import in_memory, populate
from ..planning.layout import PAGE, Copy, Layout, Read, Step, View
from .files import OpenFiles
from .memory import PageLocks, Watch, view_tensor
from .parts import Extent
from .pool import Source, cut_source
from .tasks import run_all
from .weights import Weights

logger = logging.getLogger(__name__)

MERGE_GAP = 1 << 20
"""Extents this many bytes apart are mapped and page-locked as one."""
POPULATE_CHUNK = 16 << 20
"""Bytes that one thread faults in at a time."""
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Linux's flag, which the mmap module of Python 3.11 does not name."""
UNSUPPORTED = (None, errno.EINVAL, errno.ENOSYS)
"""Of errno, where the system cannot populate; any other one tells of the pages."""


class _Pages:
    """Memory of a read-only mapping, as numpy takes it.

    The array keeps this object, and with it the mapping. Said to be writable, because torch warns
    of arrays that are not. Nobody is handed it: a write through it kills the process.
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
    mapping: mmap.mmap
    memory: torch.Tensor
    """uint8."""


class MappedFiles:
    """The ranges of a checkpoint's files that some reads cover, mapped into memory.

    Thread rules: built and closed by one thread; populated by any. Nothing is read until then.
    Errors: OSError where the file system cannot map, CheckpointChangedError for a file that shrank.

    ``handed_out``: what is viewed in them is; else a device copies from them (see map_range).
    """

    def __init__(
        self, files: OpenFiles, reads: Iterable[Read], *, handed_out: bool = False
    ) -> None:
        self._files = files
        self.regions = [
            map_range(files, path, start, end, handed_out=handed_out)
            for path, start, end in merge_ranges(reads)
        ]
        self._places = [(str(region.path), region.offset) for region in self.regions]
        self._locks: PageLocks | None = None

    @property
    def pinned(self) -> bool:
        """True while the pages are locked."""
        return bool(self._locks)

    @property
    def nbytes(self) -> int:
        return sum(region.memory.nbytes for region in self.regions)

    def find(self, path: Path, offset: int) -> Region:
        """The region that has this byte of the file."""
        # Ranges of a file are in order and apart, so the last that begins by then has it.
        return self.regions[bisect_right(self._places, (str(path), offset)) - 1]

    def view(self, step: Step) -> tuple[Weights, Watch]:
        """A step's tensors over the files' own pages, where they lie aligned for their dtypes."""
        specs = step.tensors.items()
        regions = {id(r): r for r in (self._region_of(spec) for _, spec in specs if spec.nbytes)}
        watch = Watch([region.memory for region in regions.values()])
        memories = dict(zip(regions, watch.memory, strict=True))
        tensors = {}
        for key, spec in specs:
            memory, offset = torch.empty(0, dtype=torch.uint8, device="cpu"), 0
            if spec.nbytes:
                region = self._region_of(spec)
                memory, offset = memories[id(region)], spec.offset - region.offset
            view = View(key, spec.dtype, spec.shape, offset, spec.nbytes)
            tensors[key] = view_tensor(memory, view)
        return Weights(tensors), watch

    def _region_of(self, spec: TensorSpec) -> Region:
        return self.find(spec.path, spec.offset)

    def fault_in(self, extent: Extent | Read) -> None:
        """Before a look at these bytes. ReadError; CheckpointChangedError where a look would kill.

        Any thread.
        """
        region, start, nbytes = self._pages_of(extent)
        if not in_memory(region.memory.data_ptr() + start, nbytes):
            populate_range(self._files, region, start, nbytes)

    def prepare_look(self, reads: Iterable[Read]) -> None:
        """Before a look at these, by the thread that looks. Errors as of :meth:`fault_in`."""
        for read in reads:
            self.fault_in(read)
        self._files.check_unchanged({read.path for read in reads})

    def _pages_of(self, extent: Extent | Read) -> tuple[Region, int, int]:
        """Its region, where in it the first of its pages begins, and bytes from there."""
        region = self.find(extent.path, extent.offset)
        place = extent.offset - region.offset
        start = place // PAGE * PAGE
        return region, start, place + extent.nbytes - start

    def restore(self, reads: Iterable[Read]) -> None:
        """Have the (handed out) pages that hold these reads be the file's again, faulted in."""
        for read in reads:
            region, start, nbytes = self._pages_of(read)
            region.mapping.madvise(mmap.MADV_DONTNEED, start, nbytes)
            self.fault_in(read)

    def source(self, layout: Layout, segment: int) -> Source:
        """Where a step's bytes lie, as they are copied; pages are pinned in segments."""
        copies, parts = list[Copy](), list[torch.Tensor]()
        inside: list[list[Copy]] = [[] for _ in layout.reads]
        begins = [read.slot_offset for read in layout.reads]
        for copy in layout.copies:
            inside[bisect_right(begins, copy.src) - 1].append(copy)
        for read, of_read in zip(layout.reads, inside, strict=True):
            region = self.find(read.path, read.offset)
            base = read.offset - region.offset - read.slot_offset
            cut = cut_source(region.memory, base, tuple(of_read), segment, pinned=True)
            copies += cut.copies
            parts += cut.parts
        # As one object if nothing was split: what goes to the same places is looked up by it.
        same = tuple(copies) == layout.copies
        return Source(layout.copies if same else tuple(copies), tuple(parts), pinned=True)

    def check_populates(self) -> None:
        """Raises OSError if pages cannot be populated, so that a look at them might kill."""
        # A page of each file tells: it is the kernel or the file system that cannot.
        for region in {region.path: region for region in self.regions}.values():
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
        self._locks = PageLocks(device)
        return self._locks.take([region.memory for region in self.regions], read_only=True)

    def close(self) -> None:
        """Give the page locks back. Pages go when the last view of them does. Idempotent."""
        if self._locks is not None:
            self._locks.close()

    def _read_ahead_and_populate(self, region: Region, start: int) -> int:
        nbytes = min(POPULATE_CHUNK, region.memory.nbytes - start)
        # Faults read a few pages at a time; this has the disk read the chunk in large requests.
        if hasattr(os, "posix_fadvise"):
            descriptor = self._files.descriptor(region.path)
            os.posix_fadvise(descriptor, region.offset + start, nbytes, os.POSIX_FADV_WILLNEED)
        with suppress(OSError):
            populate_range(self._files, region, start, nbytes)
        return nbytes


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


def map_range(files: OpenFiles, path: Path, start: int, end: int, *, handed_out: bool) -> Region:
    """Map a file from ``start``, which a page begins at, to ``end``.

    Pages that are handed out are copied on a write, which is not to reach the file nor to kill the
    process. Pages that a device copies from are read-only: to lock ones that are copied on a write
    would copy them all. Without a reserve of memory: more may be mapped than is free.
    Errors: OSError, CheckpointChangedError, ReadError.
    """
    flags, access = mmap.MAP_SHARED, mmap.PROT_READ
    if handed_out:
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", MAP_NORESERVE)
        access = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        mapping = mmap.mmap(
            files.descriptor(path), end - start, flags=flags, prot=access, offset=start
        )
    except ValueError as error:
        # What Python says of a range beyond the end of the file.
        files.check_unchanged([path])
        raise ReadError(f"{path}: bytes {start} to {end} cannot be mapped: {error}") from error
    pages: Any = mapping if handed_out else np.asarray(_Pages(mapping))
    with torch.inference_mode(False):
        memory = torch.from_numpy(np.frombuffer(pages, dtype=np.uint8))
    return Region(path, start, mapping, memory)
