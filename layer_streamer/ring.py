"""A small pinned ring through which layers pass part by part, instead of slots for whole layers.

All of it stays in the CPU's cache: a part is on its way to the device before it has gone to memory.
Where a read is itself a copy (out of the page cache, or by a hypervisor), it is faster, too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from .clock import PassClock
from .device import Device, Stream
from .files import OpenFiles
from .layout import Layout
from .memory import HostArena
from .pieces import Part, RingCutter, SlotPiece
from .pool import DevicePool, HostPool
from .schedule import Order, Orders
from .worker import LaneRun, Progress, Run

TIMED = 8
"""One part in so many of a step has its copies timed."""


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


class RingRun(LaneRun):
    """How far the parts of one lane have come in a run, beside its steps.

    Ownership: ``begun`` belongs to the copier; all else to the carriers, under ``lock``, but for
    ``complete``, out of which the copier takes what it has seen.
    """

    __slots__ = ("_left", "_orders", "begun", "complete", "held", "lock", "newest", "parts_taken")

    def __init__(self, run: Run, copied: Progress, orders: Orders) -> None:
        super().__init__(run, copied, copied, copied)
        self.lock = threading.Lock()
        self.begun = 0
        """The lane's steps whose device slots may be written."""
        self.parts_taken = 0
        """Parts that a carrier has begun with."""
        self.held = 0
        """Those of them whose copies have not been enqueued."""
        self.newest = -1
        """The last step of which a part has been taken."""
        self.complete: set[int] = set()
        """Steps whose copies have all been enqueued, or have failed."""
        self._left: dict[int, int] = {}
        self._orders = orders

    def take(self) -> tuple[int, int, bool]:
        """The next part's number, its step's, and whether it is that one's first. Locked."""
        read, k = self._orders.read, self.parts_taken
        number = read.number(k)
        first = read.before(number) == k
        if first:
            self._left[number] = read.before(number + 1) - k
            self.newest = number
        self.parts_taken, self.held = k + 1, self.held + 1
        return k, number, first

    def leave(self, number: int) -> bool:
        """A part of this step is dealt with; True if it was the last one. Locked."""
        self.held -= 1
        self._left[number] -= 1
        if self._left[number]:
            return False
        del self._left[number]
        return True


class Ring(HostPool):
    """Slots for parts. Times some parts' copies, since those of one step lie far apart.

    Ownership: a slot belongs to one carrier's thread, which fills it, copies out of it and waits.
    """

    def __init__(self, name: str, arena: HostArena, device: Device) -> None:
        super().__init__(name, arena, device)
        self._begun = [device.new_event() for _ in range(self.count)]
        self._timed: list[tuple[PassClock, int, int] | None] = [None] * self.count
        self._lock = threading.Lock()

    def time_copy(
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
            with self._lock:
                clock.add_copy(index, nbytes, seconds)


class Crossing:
    """How a part crosses: read into a slot of the ring, copied to its step's slot on the device.

    Thread rules: any thread, each with slots of the ring of its own. The copies' ``stream`` belongs
    to the copier, which changes it while none may be enqueued.
    """

    def __init__(
        self,
        parts: Parts,
        ring: Ring,
        pool: DevicePool,
        device: Device,
        files: OpenFiles,
        orders: Orders,
    ) -> None:
        self.ring, self.files, self.orders = ring, files, orders
        self.stream: Stream
        self._parts, self._pool, self._device = parts, pool, device

    def enter_thread(self, stream: Stream) -> None:
        """Make the device and its copy stream the calling thread's current ones."""
        self._device.enter_thread(stream)

    def pieces(self, k: int, slot: int) -> Sequence[SlotPiece]:
        """What brings the ``k``-th part of a run into a slot of the ring."""
        return self._parts[k].cut(self.ring.arena.bytes[slot])

    def enqueue(self, k: int, number: int, slot: int, clock: PassClock, stream: Stream) -> None:
        """Enqueue the copies out of the slot on the thread's current stream."""
        part, index = self._parts[k], number % self.orders.length
        if (k - self.orders.read.before(number)) % TIMED == 0:
            self.ring.time_copy(slot, part.copy_nbytes, index, clock, stream)
        n = self.orders.copied.before(number)
        target, source = self._pool.slots[n % self._pool.count].memory, self.ring.arena.slots[slot]
        copy = self._device.copy_pinned if self.ring.arena.pinned else self._copy
        try:
            for extent in part.copies:
                dst = target[extent.dst : extent.dst + extent.nbytes]
                copy(dst, source[extent.src : extent.src + extent.nbytes], stream)
        finally:
            self.ring.copy_enqueued(slot, stream)

    def _copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        self._device.copy(dst, src)
