"""The page cache before a measured run: holding the checkpoint's files, or nothing of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ...checkpoint.manifest import FileStamp
from ...machine.hostmem import available_host_bytes
from ...measuring.sampling import run_jobs
from ...transport.files import OpenFiles

CHUNK_NBYTES = 8 << 20
WINDOW_NBYTES = 1 << 30
"""Bytes of a file whose pages are asked about at a time."""
THREADS = 4
MARGIN = 0.1
"""Part of the free memory that filling the page cache leaves alone."""
ENOUGH = 0.99
"""The share of the files from which on the page cache counts as warm."""

_LOWEST_BIT = bytes(number & 1 for number in range(256))


class PageCache:
    """What of a checkpoint's files is in the page cache, and how that is changed.

    Thread rules: one thread.
    """

    def __init__(self, stamps: Mapping[Path, FileStamp]) -> None:
        self._files = OpenFiles(stamps)
        self._sizes = {path: stamp.size for path, stamp in stamps.items()}

    def share(self) -> float | None:
        """The part of the files that is cached; None where the system does not tell."""
        cached = pages = 0
        for path, size in self._sizes.items():
            for offset in range(0, size, WINDOW_NBYTES):
                nbytes = min(WINDOW_NBYTES, size - offset)
                found = _resident(self._files.descriptor(path), offset, nbytes)
                if found is None:
                    return None
                cached, pages = cached + found[0], pages + found[1]
        return cached / pages if pages else 1.0

    def drop(self) -> str:
        """Drop the files' pages. What has stayed, in words; "" if nothing to speak of."""
        for path in self._sizes:
            descriptor = self._files.descriptor(path)
            # Pages that are not yet written cannot be dropped. Where this cannot be asked for (of a
            # read-only file system, say), nothing is unwritten.
            with suppress(OSError):
                os.fsync(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        share = self.share()
        if share is None or share <= 1 - ENOUGH:
            return ""
        return f"cold: {share:.0%} of the checkpoint's files stayed in the page cache (in use?)"

    def fill(self) -> str:
        """Read the files unless they are cached. What could not be done, in words; "" if they are
        cached."""
        share = self.share()
        if share is not None and share >= ENOUGH:
            return ""
        missing = sum(self._sizes.values()) * (1 - (share or 0))
        if missing > available_host_bytes() * (1 - MARGIN):
            return "warm: the page cache has no room for the checkpoint's files"
        self._read()
        share = self.share()
        if share is None or share >= ENOUGH:
            return ""
        return f"warm: only {share:.0%} of the checkpoint's files are in the page cache"

    def _read(self) -> None:
        """Read the files and forget them."""
        chunks = [
            (self._files.descriptor(path), offset)
            for path, size in self._sizes.items()
            for offset in range(0, size, CHUNK_NBYTES)
        ]
        buffers = [bytearray(CHUNK_NBYTES) for _ in range(THREADS)]

        def read(worker: int, number: int) -> None:
            descriptor, offset = chunks[number]
            os.preadv(descriptor, [buffers[worker]], offset)

        run_jobs(read, len(chunks), THREADS)


def _resident(descriptor: int, offset: int, nbytes: int) -> tuple[int, int] | None:
    """(cached, all) pages of a part of a file; a look through mincore(2) does not change them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore") or not _may_look(descriptor):
        return None
    pages = -(-nbytes // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    with mmap.mmap(descriptor, nbytes, mmap.MAP_PRIVATE, offset=offset) as mapping:
        first = ctypes.c_byte.from_buffer(mapping)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), vector
        )
        del first
    return None if failed else (bytes(vector).translate(_LOWEST_BIT).count(1), pages)


def _may_look(descriptor: int) -> bool:
    """Linux tells only those who own a file or may write it."""
    return os.fstat(descriptor).st_uid == os.geteuid() or os.geteuid() == 0
