"""Memory that slots live in: exact-size anonymous host memory and device slabs, and who frees it.

An arena owns its memory; slots are views of it. Host memory is never rounded to powers of two, as
torch's ``pin_memory()`` does, and is invisible to a forked child: copy-on-write after a fork would
move the pages away from under a transfer in flight.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.graph import increment_version

from ..devices.device import Device, Event, Stream
from ..machine.libc import populate
from ..planning.layout import COPY_ALIGNMENT, PAGE, View, align_up
from .tasks import run_all

logger = logging.getLogger(__name__)

_version_of = attrgetter("_version")

# Not named by the mmap module; the child of a fork sees zeros, the parent keeps its pages.
MADV_WIPEONFORK = 18
HUGE_PAGE = 2 << 20
POPULATE_CHUNK = 64 << 20
"""Bytes of memory that one thread faults in at a time."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a streamer takes, bytes. Only static tensors add to it after opening."""

    host_bytes: int
    """Slots, resident layers and static tensors in host memory."""
    pinned_bytes: int
    """The page-locked part of ``host_bytes``."""
    device_bytes: int
    """Slots, resident layers and static tensors on all devices but the CPU."""
    static_bytes: Mapping[str, int] = field(default_factory=dict)
    """By device, the part of these sums that ``load_static`` has put there."""

    def with_statics(self, nbytes: Mapping[str, int]) -> MemoryUse:
        """The same with static tensors of so many bytes by device."""
        on_host = nbytes.get("cpu", 0)
        return replace(
            self,
            host_bytes=self.host_bytes + on_host,
            device_bytes=self.device_bytes + sum(nbytes.values()) - on_host,
            static_bytes=nbytes,
        )


class PageLocks:
    """Page locks on host memory of one device. Given back with this object, if not before.

    Thread rules: taken by one thread; closed by any, by two at once, and again after an interrupt.
    In a forked child, whose they are not, closing does nothing.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pid = os.getpid()
        self._locked: list[torch.Tensor] = []  # last: what goes before has nothing to give back

    def __bool__(self) -> bool:
        return bool(self._locked)

    def take(self, memories: Sequence[torch.Tensor], *, read_only: bool = False) -> bool:
        """Page-lock all of them; False, with none locked, if one is refused."""
        try:
            # An interrupt in the midst of it, on the calling thread, could lose a lock.
            run_all([partial(self._take, memories, read_only)], 1)
        except BaseException:
            self.close()
            raise
        if len(self._locked) < len(memories):
            self.close()
            return False
        return True

    def close(self) -> None:
        """Give them back. Idempotent."""
        if not self._locked or os.getpid() != self._pid:
            return
        # Kept until all are given back: an interrupt in between must not lose one.
        for memory in tuple(self._locked):
            self._device.unpin(memory)
        self._locked.clear()

    def __del__(self) -> None:
        if hasattr(self, "_locked"):
            self.close()

    def _take(self, memories: Sequence[torch.Tensor], read_only: bool) -> None:
        for memory in memories:
            if not self._device.pin(memory, read_only=read_only):
                return
            self._locked.append(memory)


class HostArena:
    """Page-aligned slots of the given sizes in one anonymous mapping of exactly their sum.

    Thread rules: constructed and freed by one thread; slots may be read and written by any.
    """

    def __init__(self, sizes: Sequence[int], device: Device, *, pinned: bool, threads: int) -> None:
        ends = list(accumulate(align_up(max(size, 1), PAGE) for size in sizes))
        self.offsets = [0, *ends[:-1]]
        """Where each slot begins in ``memory``."""
        self._mapping = mmap.mmap(-1, ends[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._advise()
        array = np.frombuffer(self._mapping, dtype=np.uint8)
        with torch.inference_mode(False):
            self.memory = torch.from_numpy(array)
            self.slots = [self.memory[i:j] for i, j in pairwise([0, *ends])]
        whole = memoryview(self._mapping)
        self.bytes = [whole[i:j] for i, j in pairwise([0, *ends])]
        self._locks = PageLocks(device)
        if pinned:
            # Page-locking faults in what is missing, but on one thread.
            populate_memory(self.memory, threads)
            self._locks.take([self.memory])

    @property
    def pinned(self) -> bool:
        """True while the memory is page-locked."""
        return bool(self._locks)

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
        self._locks.close()


class Bounce(NamedTuple):
    """One thread's host memory on the way to a device."""

    slot: torch.Tensor
    stream: Stream
    copied: Event


class Bounces:
    """Host memory for each loading thread, ``chunk`` bytes and the pages at its ends."""

    def __init__(self, device: Device, chunk: int, threads: int, *, pinned: bool) -> None:
        self.unified = device.unified
        self._device = device
        self._allocated = device.new_event()
        self._allocated.record(device.current_stream())
        sizes = [chunk + 2 * PAGE] * threads
        self._arena = HostArena(sizes, device, pinned=pinned, threads=threads)
        self._free = list(self._arena.slots)
        self._local = threading.local()

    def mine(self) -> Bounce:
        """The calling thread's own, on a stream that is made the thread's at the first call."""
        if not hasattr(self._local, "bounce"):
            stream = self._device.new_stream()
            self._device.use_in_this_thread(stream)
            self.order_after_allocation(stream)
            self._local.bounce = Bounce(self._free.pop(), stream, self._device.new_event())
        bounce: Bounce = self._local.bounce
        return bounce

    def order_after_allocation(self, stream: Stream) -> None:
        """Let the copies wait for whatever used the layers' memory before it was theirs."""
        self._allocated.wait(stream)

    def copy(self, bounce: Bounce, dst: torch.Tensor, src: torch.Tensor) -> None:
        """Copy and wait until it has happened; the other threads read meanwhile."""
        self._device.copy(dst, src)
        bounce.copied.record(bounce.stream)
        self.wait_copied(bounce)

    def wait_copied(self, bounce: Bounce) -> None:
        """Block until the device has read the bounce, which is filled again after that."""
        bounce.copied.synchronize()

    def close(self) -> None:
        self._arena.close()


def populate_memory(memory: torch.Tensor, threads: int) -> None:
    """Fault the pages of fresh memory in, by several threads; where that is refused, do nothing."""
    address, nbytes = memory.data_ptr(), memory.nbytes

    def populate_chunk(offset: int) -> None:
        populate(address + offset, min(POPULATE_CHUNK, nbytes - offset), write=True)

    try:
        run_all([partial(populate_chunk, o) for o in range(0, nbytes, POPULATE_CHUNK)], threads)
    except OSError as error:
        logger.debug("populating memory was refused: %s", error)


def device_slots(count: int, slot_nbytes: int, device: Device) -> list[torch.Tensor]:
    """``count`` uint8 tensors of ``slot_nbytes`` rounded up to the copy alignment, in one slab."""
    stride = align_up(max(slot_nbytes, 1), COPY_ALIGNMENT)
    memory = allocate(count * stride, device)
    with torch.inference_mode(False):
        return [memory[start : start + stride] for start in range(0, memory.nbytes, stride)]


def allocate(nbytes: int, device: Device) -> torch.Tensor:
    """Device memory that worker threads may write, also if the caller is in inference mode."""
    with torch.inference_mode(False):
        return device.allocate(nbytes)


class Watch:
    """Memory as it is handed out: knows of writes to it, and has autograd know when it goes.

    :attr:`memory` are the same bytes with a version counter of their own, which all tensors viewed
    there share. So it counts the caller's writes alone: the library's own go through the memory
    that this was made of. What the caller does through ``.data`` is not counted either.

    Ownership: the caller's thread. Every method may be interrupted anywhere, and called again.
    """

    __slots__ = ("_known", "_only", "memory")

    def __init__(self, memories: Sequence[torch.Tensor]) -> None:
        with torch.inference_mode(False):
            self.memory = tuple(memory.data for memory in memories)
        # A slot's: looked at in every layer, and twice as fast so.
        self._only = self.memory[0] if len(self.memory) == 1 else None
        self._known = self._version()

    def written(self) -> bool:
        """True if the caller has written to it since it was known to be as the file has it."""
        return self._version() > self._known

    def expire(self) -> bool:
        """Other bytes will lie there: a backward that needs the present ones is to raise.

        True if the caller has written to it.
        """
        version = self._version()
        written = version > self._known
        # In this order: an interrupt in between must not make the next look see a write.
        self._known = version + len(self.memory)
        increment_version(self._only if self._only is not None else self.memory)
        return written

    def forget(self) -> None:
        """It is going to be filled anew, whatever was written."""
        self._known = self._version()

    def _version(self) -> int:
        if self._only is not None:
            return self._only._version
        return sum(map(_version_of, self.memory))


def view_tensor(memory: torch.Tensor, view: View) -> torch.Tensor:
    """A tensor over bytes of ``memory`` (uint8)."""
    # A view made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        if view.nbytes == 0:
            return torch.empty(view.shape, dtype=view.dtype, device=memory.device)
        raw = memory[view.offset : view.offset + view.nbytes]
        typed: torch.Tensor = raw.view(view.dtype)
        return typed.view(view.shape)
