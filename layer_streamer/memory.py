"""Memory that slots live in: exact-size anonymous host memory and device slabs, and who frees it.

An arena owns its memory; slots are views of it. Host memory is never rounded to powers of two, as
torch's ``pin_memory()`` does, and is invisible to a forked child: copy-on-write after a fork would
move the pages away from under a transfer in flight.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import dataclass

import numpy as np
import torch

from .device import Device
from .layout import COPY_ALIGNMENT, PAGE, align_up

logger = logging.getLogger(__name__)

# Not named by the mmap module; the child of a fork sees zeros, the parent keeps its pages.
MADV_WIPEONFORK = 18
HUGE_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a streamer's slots take, bytes."""

    host_bytes: int
    pinned_bytes: int
    """The page-locked part of ``host_bytes``."""
    device_bytes: int


class HostArena:
    """``count`` page-aligned slots of ``slot_nbytes`` bytes in one anonymous mapping.

    Thread rules: constructed and freed by one thread; slots may be read and written by any.
    """

    def __init__(self, count: int, slot_nbytes: int, device: Device, *, pinned: bool) -> None:
        self._device = device
        self.slot_nbytes = align_up(max(slot_nbytes, 1), PAGE)
        self._mapping = mmap.mmap(
            -1, count * self.slot_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self._advise()
        array = np.frombuffer(self._mapping, dtype=np.uint8)
        with torch.inference_mode(False):
            self.memory = torch.from_numpy(array)
            self.slots = _split(self.memory, self.slot_nbytes)
        self._pinned = [self.memory] if pinned and device.pin(self.memory) else []
        whole = memoryview(self._mapping)
        self.bytes = [
            whole[i * self.slot_nbytes : (i + 1) * self.slot_nbytes] for i in range(count)
        ]

    @property
    def pinned(self) -> bool:
        """True while the memory is page-locked."""
        return bool(self._pinned)

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def _advise(self) -> None:
        wanted = [MADV_WIPEONFORK]
        if len(self._mapping) >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            wanted.append(mmap.MADV_HUGEPAGE)
        for advice in wanted:
            try:
                self._mapping.madvise(advice)
            except (OSError, AttributeError) as error:
                logger.debug("madvise(%d) was refused: %s", advice, error)

    def close(self) -> None:
        """Give the page lock back. The memory goes when the last view of it does. Idempotent."""
        while self._pinned:
            try:
                memory = self._pinned.pop()
            except IndexError:
                return  # another thread that closes was first
            self._device.unpin(memory)


def device_slots(count: int, slot_nbytes: int, device: Device) -> list[torch.Tensor]:
    """``count`` uint8 tensors of ``slot_nbytes`` rounded up to the copy alignment, in one slab."""
    stride = align_up(max(slot_nbytes, 1), COPY_ALIGNMENT)
    return _split(allocate(count * stride, device), stride)


def allocate(nbytes: int, device: Device) -> torch.Tensor:
    """Device memory that worker threads may write, also if the caller is in inference mode."""
    with torch.inference_mode(False):
        return device.allocate(nbytes)


def view_tensor(
    memory: torch.Tensor, offset: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """A tensor of ``dtype`` and ``shape`` over ``nbytes`` bytes of ``memory`` (uint8)."""
    # A view made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=memory.device)
        typed: torch.Tensor = memory[offset : offset + nbytes].view(dtype)
        return typed.view(shape)


def _split(memory: torch.Tensor, stride: int) -> list[torch.Tensor]:
    with torch.inference_mode(False):
        return [memory[start : start + stride] for start in range(0, memory.nbytes, stride)]
