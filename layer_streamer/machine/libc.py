"""System calls that Python lacks, or makes with the interpreter's lock held. Linux."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from functools import cache
from typing import Any

import numpy as np

MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
"""Of madvise(2), since Linux 5.14: fault pages in, and say so if that fails."""
AT_EMPTY_PATH = 0x1000
STATX_DIOALIGN = 0x2000
"""Of statx(2), since Linux 6.1; the two alignments are at byte 152 of its record."""

_STATX = struct.Struct("=I148x2I96x")


def populate(address: int, nbytes: int, *, write: bool) -> None:
    """Fault the pages of a mapping in, without the interpreter's lock.

    ``address`` is a multiple of the page size. OSError where it is refused: EINVAL from a kernel
    that is too old, EFAULT for pages beyond the end of a file, where a touch would kill.
    """
    madvise = getattr(_libc(), "madvise", None)
    if madvise is None or sys.platform != "linux":
        raise OSError("pages can be populated on Linux only")
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(address, nbytes, MADV_POPULATE_WRITE if write else MADV_POPULATE_READ):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def in_memory(address: int, nbytes: int) -> bool:
    """True: the pages of a mapping are in memory, so that a look reads nothing. Takes a hundredth
    of the time of :func:`populate`. Linux says so, too, of a file that another user owns and that
    may not be written; False where it says nothing. ``address`` as there."""
    mincore = _mincore()
    if mincore is None or not nbytes:
        return False
    there = np.empty(-(-nbytes // mmap.PAGESIZE), dtype=np.uint8)
    told = there.__array_interface__["data"][0]
    return not mincore(address, nbytes, told) and bool((there & 1).all())


@cache
def _mincore() -> Any:
    """The call, made ready once, for many threads; None where there is none."""
    mincore = getattr(_libc(), "mincore", None)
    if mincore is None or sys.platform != "linux":
        return None
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return mincore


def direct_alignment(descriptor: int) -> int | None:
    """Bytes to which direct reads must be aligned; 0: none are possible; None: unknown."""
    statx = getattr(_libc(), "statx", None)
    if statx is None:
        return None
    statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    record = ctypes.create_string_buffer(_STATX.size)
    if statx(descriptor, b"", AT_EMPTY_PATH, STATX_DIOALIGN, record):
        return None
    mask, memory, offset = _STATX.unpack(record.raw)
    return max(memory, offset) if mask & STATX_DIOALIGN else None


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
