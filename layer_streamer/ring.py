"""A small pinned ring through which layers pass part by part, instead of slots for whole layers.

All of it stays in the CPU's cache: a part is on its way to the device before it has gone to memory.
Where a read is itself a copy (out of the page cache, or by a hypervisor), it is faster, too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .clock import PassClock
from .device import Device, Stream
from .files import OpenFiles
from .layout import Layout
from .memory import HostArena
from .pieces import Part, RingCutter, SlotPiece
from .pool import DevicePool, HostPool
from .schedule import Order, Orders
from .worker import Bell, LaneRun, Progress, Run

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


@dataclass(frozen=True, slots=True)
class Load:
    """A part on its way."""

    k: int
    """Its number in the run."""
    place: int
    """Its number in its step."""
    number: int
    """Its step's, in the run."""
    n: int
    """Its step's, of those that go through the lane's device slots."""
    slot: int
    """Of the ring."""


class RingRun(LaneRun):
    """How far the parts of one lane have come in a run, beside its steps.

    Ownership: ``begun`` belongs to the copier; all else to the carriers, under ``lock``, but for
    ``complete``, out of which the copier takes what it has seen.
    """

    __slots__ = (
        "_left", "_orders", "asleep", "begun", "complete", "held", "lock", "newest", "parts_taken",
        "waiting",
    )  # fmt: skip

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
        self.waiting: list[Load] = []
        """Parts that were read before their step was begun."""
        self.asleep: set[Bell] = set()
        """Of carriers that find nothing to do; whoever changes that rings."""
        self._left: dict[int, int] = {}
        self._orders = orders

    def wake(self) -> None:
        """Have the carriers that sleep look again. From any thread."""
        for bell in tuple(self.asleep):
            bell.ring()

    def take(self, slot: int) -> Load:
        """The next part, for a slot of the ring. Locked."""
        read, k = self._orders.read, self.parts_taken
        number = read.number(k)
        first = read.before(number)
        if k == first:
            self._left[number] = read.before(number + 1) - k
            self.newest = number
        self.parts_taken, self.held = k + 1, self.held + 1
        return Load(k, k - first, number, self._orders.copied.before(number), slot)

    def may_send(self, load: Load) -> bool:
        """True if the copies of its step may be enqueued."""
        return self.begun > load.n

    def take_waiting(self) -> Load | None:
        """A part that was read and may be sent by now. Locked."""
        for i, load in enumerate(self.waiting):
            if self.may_send(load):
                return self.waiting.pop(i)
        return None

    def leave(self, number: int) -> bool:
        """A part of this step is dealt with; True if it was the last one. Locked."""
        self.held -= 1
        self._left[number] -= 1
        if self._left[number]:
            return False
        del self._left[number]
        return True


class Ring(HostPool):
    """Slots for parts, the one that came free last first: the fewer are in use, the more of them is
    in the processor's cache. Times some parts' copies, since those of one step lie far apart.

    Ownership: a slot belongs to the thread that has taken it until it is given back; :meth:`take`,
    :meth:`send` and :meth:`give_back` from any thread.
    """

    def __init__(self, name: str, arena: HostArena, device: Device) -> None:
        super().__init__(name, arena, device)
        self._begun = [device.new_event() for _ in range(self.count)]
        self._timed: list[tuple[PassClock, int, int] | None] = [None] * self.count
        self._lock = threading.Lock()
        self._free = list(range(self.count))
        self._sent: deque[int] = deque()
        """Slots that the device may still read, in the order of their copies."""

    def take(self) -> int | None:
        """A slot, for which there is :meth:`wait_reusable`; None if all are taken."""
        with self._lock:
            while self._sent and self._copied[self._sent[0]].query():
                self._free.append(self._sent.popleft())
            if self._free:
                return self._free.pop()
            return self._sent.popleft() if self._sent else None

    def can_take(self) -> bool:
        """True unless all slots are taken."""
        return bool(self._free or self._sent)

    def give_back(self, slot: int) -> None:
        """Nothing more is to be copied out of the slot."""
        with self._lock:
            if self._in_flight[slot]:
                self._sent.append(slot)
            else:
                self._free.append(slot)

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

    Thread rules: any thread, each with parts of its own. The copies' ``stream`` belongs to the
    copier, which changes it while none may be enqueued.
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

    def pieces(self, load: Load) -> Sequence[SlotPiece]:
        """What brings a part into its slot of the ring."""
        return self._parts[load.k].cut(self.ring.arena.bytes[load.slot])

    def enqueue(self, load: Load, clock: PassClock, stream: Stream) -> None:
        """Enqueue a part's copies on the thread's current stream."""
        part, slot, ring, pool = self._parts[load.k], load.slot, self.ring, self._pool
        if load.place % TIMED == 0:
            index = load.number % self.orders.length
            ring.time_copy(slot, part.copy_nbytes, index, clock, stream)
        target, source = pool.slots[load.n % pool.count].memory, ring.arena.slots[slot]
        copy = self._device.copy_pinned if ring.arena.pinned else self._copy
        try:
            for extent in part.copies:
                dst = target[extent.dst : extent.dst + extent.nbytes]
                copy(dst, source[extent.src : extent.src + extent.nbytes], stream)
        finally:
            ring.copy_enqueued(slot, stream)

    def _copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        self._device.copy(dst, src)
