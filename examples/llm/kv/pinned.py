"""Host memory that is reserved as addresses, and taken and page-locked block by block.

A device copies from page-locked memory by itself, at the full speed of the link. What has not been
asked for takes no memory: a cache may be promised room for a long context and pay for a short one.
"""

from __future__ import annotations

import logging
import mmap
import sys
from bisect import bisect_right, insort
from collections.abc import Iterator

import numpy as np
import torch

logger = logging.getLogger(__name__)

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Linux's flag: no swap is set aside for what is never touched."""
MADV_WIPEONFORK = 18
"""Of Linux: a forked child sees zeros, so that no copy-on-write moves pages under a transfer."""
REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable."""
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
        self._mapping = mmap.mmap(-1, -(-nbytes // block_nbytes) * block_nbytes, flags=flags)
        self._advise()
        with torch.inference_mode(False):
            self.memory = torch.from_numpy(np.frombuffer(self._mapping, dtype=np.uint8))
        self._reached = [False] * (len(self._mapping) // block_nbytes)
        self._borders: list[int] = []
        """Where each segment that was taken as one begins, in order: no copy may cross one."""
        self._locked: list[int] = []
        """Those of them that are page-locked."""
        self._pins = device.type == "cuda"

    @property
    def nbytes(self) -> int:
        """Bytes that have been taken."""
        return sum(self._reached) * self._block

    @property
    def pinned(self) -> bool:
        """True unless page-locking has been refused, or is not needed (on a CPU)."""
        return self._pins

    def reach(self, start: int, end: int) -> None:
        """Take the blocks of these bytes that have not been taken yet."""
        first, last = start // self._block, -(-end // self._block)
        while first < last:
            if self._reached[first]:
                first += 1
                continue
            after = first
            while after < last and not self._reached[after]:
                after += 1
            self._take(first, after)
            first = after

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The bytes from start to end, cut where page-locked segments meet."""
        index = bisect_right(self._borders, start)
        while index < len(self._borders) and self._borders[index] < end:
            yield start, self._borders[index]
            start = self._borders[index]
            index += 1
        yield start, end

    def close(self) -> None:
        """Give the page locks back; no copy may be under way. Idempotent."""
        while self._locked:
            offset = self._locked.pop()
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr() + offset)

    def _take(self, first: int, after: int) -> None:
        offset, nbytes = first * self._block, (after - first) * self._block
        # Noted first: an interrupt in between leaves memory that is not locked, which only costs
        # time, and never a lock that is not given back.
        insort(self._borders, offset)
        self._reached[first:after] = [True] * (after - first)
        self.memory[offset : offset + nbytes].zero_()  # by several threads; locking uses one
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

    def _advise(self) -> None:
        wanted = [MADV_WIPEONFORK]
        if len(self._mapping) >= HUGE_ARENA and hasattr(mmap, "MADV_HUGEPAGE"):
            wanted.append(mmap.MADV_HUGEPAGE)
        for advice in wanted:
            try:
                self._mapping.madvise(advice)
            except (OSError, AttributeError) as error:
                logger.debug("madvise(%d) was refused: %s", advice, error)
