"""Host memory that is reserved as addresses, and taken and page-locked block by block.

A device copies from page-locked memory by itself, at the full speed of the link. What has not been
asked for takes no memory: a cache may be promised room for a long context and pay for a short one.
"""

from __future__ import annotations

import logging
import mmap
import sys
from itertools import pairwise

import numpy as np
import torch

from .tokens import Numbers

logger = logging.getLogger(__name__)

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Linux's flag: no swap is set aside for what is never touched."""
MADV_WIPEONFORK = 18
"""Of Linux: a forked child sees zeros, so that no copy-on-write moves pages under a transfer."""
REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable."""
LOCKED_AT_ONCE = 4 << 20
"""Bytes up to which threads are not worth their start."""
HUGE_ARENA = 64 << 20
"""Arenas from this size on ask for huge pages, of which each takes 2 MiB at once."""


class GrowingMemory:
    """An anonymous mapping of ``nbytes``, of which blocks are taken as they are reached.

    Thread rules: :meth:`reach` and :meth:`close` from one thread; others may read and copy what
    has been reached before they heard of it. The mapping goes when the last view of it does.
    """

    def __init__(self, nbytes: int, block_nbytes: int, device: torch.device) -> None:
        """``block_nbytes``: a multiple of the page size; ``device``: for which to page-lock."""
        self._block, self._device = block_nbytes, device
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        mapping = mmap.mmap(-1, -(-nbytes // block_nbytes) * block_nbytes, flags=flags)
        _advise(mapping)
        with torch.inference_mode(False):
            self.memory = torch.from_numpy(np.frombuffer(mapping, dtype=np.uint8))
        self._reached = np.zeros(len(mapping) // block_nbytes, dtype=bool)
        self._borders = np.zeros(0, dtype=np.int64)
        """Where each segment that was taken as one begins, in order: no copy may cross one. It is
        replaced as a whole, for other threads that read it."""
        self._locked: list[int] = []
        """Those of them that are page-locked."""
        self._pins = device.type == "cuda"

    @property
    def nbytes(self) -> int:
        """Bytes that have been taken."""
        return int(self._reached.sum()) * self._block

    @property
    def refused(self) -> bool:
        """True: what a device is to copy from is not page-locked."""
        return self._device.type == "cuda" and not self._pins

    def reach(self, runs: Numbers) -> None:
        """Take the blocks of runs of bytes, (first, count) each, that have not been taken yet."""
        firsts, lasts = runs[:, 0] // self._block, -(-runs.sum(1) // self._block)
        missing = np.append(0, np.cumsum(~self._reached))
        wanted = missing[lasts] > missing[firsts]
        for first, last in zip(firsts[wanted].tolist(), lasts[wanted].tolist(), strict=True):
            self._reach(first, last)

    def _reach(self, first: int, last: int) -> None:
        while first < last:
            if self._reached[first]:
                first += 1
                continue
            after = first
            while after < last and not self._reached[after]:
                after += 1
            self._take(first, after)
            first = after

    def pieces(self, runs: Numbers) -> Numbers:
        """Runs of bytes, (first, count) each, cut where page-locked segments meet: (n, 2)."""
        borders, starts, ends = self._borders, runs[:, 0], runs.sum(1)
        before = np.searchsorted(borders, starts, side="right")
        counts = np.searchsorted(borders, ends) - before
        if not counts.any():
            return runs
        found = []
        for start, end, index, count in zip(starts, ends, before, counts, strict=True):
            cuts = [start, *borders[index : index + count], end]
            found += [(first, after - first) for first, after in pairwise(cuts)]
        return np.array(found, dtype=np.int64)

    def close(self) -> None:
        """Give the page locks back, and the memory, but for others' views; no copy may be under
        way. Idempotent."""
        while self._locked:
            offset = self._locked.pop()
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr() + offset)
        self.memory = self.memory.new_empty(0)

    def _take(self, first: int, after: int) -> None:
        offset, nbytes = first * self._block, (after - first) * self._block
        # Noted first: an interrupt in between leaves memory that is not locked, which only costs
        # time, and never a lock that is not given back.
        self._borders = np.sort(np.append(self._borders, offset))
        self._reached[first:after] = True
        if nbytes > LOCKED_AT_ONCE:  # by several threads; locking takes its pages with one
            self.memory[offset : offset + nbytes].zero_()
        if self._pins:
            self._locked.append(offset)
            if not self._register(offset, nbytes):
                self._pins = False
                self._locked.remove(offset)

    def _register(self, offset: int, nbytes: int) -> bool:
        with torch.cuda.device(self._device):
            address = self.memory.data_ptr() + offset
            code = torch.cuda.cudart().cudaHostRegister(address, nbytes, REGISTER_PORTABLE)
            if int(code) == 0:
                return True
            try:  # the error stays with the thread until the next launch looks at it
                torch.zeros(1, dtype=torch.float32, device=self._device).add_(1)
            except RuntimeError as error:
                logger.debug("taken after a refused page lock: %s", error)
        logger.warning("page-locking host memory was refused (%s): copies are slower", code)
        return False


def _advise(mapping: mmap.mmap) -> None:
    wanted = [MADV_WIPEONFORK]
    if len(mapping) >= HUGE_ARENA and hasattr(mmap, "MADV_HUGEPAGE"):
        wanted.append(mmap.MADV_HUGEPAGE)
    for advice in wanted:
        try:
            mapping.madvise(advice)
        except (OSError, AttributeError) as error:
            logger.debug("madvise(%d) was refused: %s", advice, error)
