"""A small pinned ring through which layers pass part by part, instead of slots for whole layers.

All of it stays in the CPU's cache: a part is on its way to the device before it has gone to memory.
Where a read is itself a copy (out of the page cache, or by a hypervisor), it is faster, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..devices.device import Device, Stream
from ..planning.layout import Layout
from .clock import PassClock
from .memory import HostArena
from .pieces import Part, RingCutter, SlotPiece
from .pool import HostPool
from .schedule import Order
from .target import DeviceTarget


class Parts:
    """The parts of a lane's steps. Immutable."""

    def __init__(
        self, layouts: Sequence[Layout], indices: Sequence[int], cutter: RingCutter
    ) -> None:
        self._parts = {index: cutter.cut(layouts[index]) for index in indices}
        self._length = len(layouts)
        self.order = Order([i for i, parts in self._parts.items() for _ in parts], self._length)
        """Of all of them: what the readers count."""

    def __getitem__(self, k: int) -> Part:
        """The ``k``-th part of a run."""
        number = self.order.number(k)
        return self._parts[number % self._length][k - self.order.before(number)]


class Ring(HostPool):
    """Slots for parts. Times each part's copies, since those of one step lie far apart.

    Ownership: as its base says; :meth:`copy_begins` is called by the copier's thread.
    """

    def __init__(self, name: str, arena: HostArena, device: Device) -> None:
        super().__init__(name, arena, device)
        self._begun = [device.new_event() for _ in range(self.count)]
        self._timed: list[tuple[PassClock, int, int] | None] = [None] * self.count

    def copy_begins(
        self, slot: int, nbytes: int, index: int, clock: PassClock, stream: Stream
    ) -> None:
        """Copies of ``nbytes`` out of a slot follow, for step ``index`` of the clock's pass."""
        self._begun[slot].record(stream)
        self._timed[slot] = (clock, index, nbytes)

    def wait_reusable(self, slot: int) -> None:
        super().wait_reusable(slot)
        timed, self._timed[slot] = self._timed[slot], None
        if timed is not None:
            clock, index, nbytes = timed
            seconds = self._begun[slot].elapsed_time(self._copied[slot]) / 1e3
            clock.add_copy(index, nbytes, seconds)


class RingJobs:
    """The reads that fill a ring's slots."""

    def __init__(self, parts: Parts, slots: Sequence[memoryview]) -> None:
        self._parts = parts
        self._slots = slots

    def jobs(self, k: int, index: int, slot: int) -> Sequence[Sequence[SlotPiece]]:
        """One job, which brings the ``k``-th part of a run into a slot."""
        return (self._parts[k].cut(self._slots[slot]),)


class RingTarget(DeviceTarget):
    """Copies from a ring's slots to device slots, ordered by events."""

    def __init__(self, parts: Parts, ring: Ring, *slots: Any) -> None:
        """``slots``: as for DeviceTarget."""
        super().__init__(*slots)
        self._parts = parts
        self._ring = ring

    def enqueue_read(self, n: int, k: int, index: int, clock: PassClock, stream: Stream) -> None:
        part, slot = self._parts[k], k % self._ring.count
        target, source = self._pool.slots[n % self._pool.count].memory, self._ring.arena.slots[slot]
        self._ring.copy_begins(slot, part.copy_nbytes, index, clock, stream)
        try:
            for copy in part.copies:
                dst = target[copy.dst : copy.dst + copy.nbytes]
                src = source[copy.src : copy.src + copy.nbytes]
                self._copy_bytes(dst, src, stream)
        finally:
            self._ring.copy_enqueued(slot, stream)

    def _copy_bytes(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        if self._ring.arena.pinned:
            self._device.copy_pinned(dst, src, stream)
        else:
            self._device.copy(dst, src)
