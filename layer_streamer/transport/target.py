"""Where the copier's copies go and how they are enqueued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..devices.device import Device, Stream
from .clock import PassClock
from .parts import Parts
from .pool import DevicePool, DeviceSlot, HostPool, Source
from .schedule import Orders
from .stage import LaneRun, Stage


class Target(Protocol):
    """Where copies go and how they are enqueued: a device's slots, or the slots themselves."""

    @property
    def pool_name(self) -> str | None:
        """The pool that copies fill; None if they stay in the one that reads have filled."""

    def await_slot(self, stage: Stage, lane_run: LaneRun, n: int) -> bool: ...
    def order_slot(self, n: int, stream: Stream) -> None: ...

    def enqueue_read(self, n: int, k: int, index: int, clock: PassClock, stream: Stream) -> None:
        """Enqueue the copies of the lane's ``k``-th part from disk, of step ``index``."""

    def enqueue(self, n: int, index: int, stream: Stream) -> None:
        """Enqueue the copies of a step that comes from no disk."""


class DeviceTarget:
    """Copies from host memory to device slots, ordered by events."""

    def __init__(
        self,
        orders: Orders,
        parts: Parts,
        sources: Mapping[int, Source],
        host_pool: HostPool | None,
        pool: DevicePool,
        device: Device,
    ) -> None:
        self._orders = orders
        self._parts = parts
        self._sources = sources
        self._host_pool = host_pool
        self._pool = pool
        self._device = device

    @property
    def pool_name(self) -> str | None:
        return self._pool.name

    def await_slot(self, stage: Stage, lane_run: LaneRun, n: int) -> bool:
        """Wait until the caller has given this slot's last step back."""
        run, before, count = lane_run.run, self._orders.copied.before, self._pool.count
        return stage.await_true(run, lambda: before(run.released) > n - count)

    def order_slot(self, n: int, stream: Stream) -> None:
        """Let the copies wait for the caller's work on the slot."""
        self._pool.slots[n % self._pool.count].order_after_uses(stream)

    def enqueue_read(self, n: int, k: int, index: int, clock: PassClock, stream: Stream) -> None:
        """Enqueue a part's copies; the host slot they come from is in use until they have run."""
        assert self._host_pool is not None
        part, slot = self._parts[k], k % self._host_pool.count
        if not part.whole:
            self._host_pool.copy_begins(slot, part.copy_nbytes, index, clock, stream)
        try:
            source = self._host_pool.source(slot, part)
            target = self._pool.slots[n % self._pool.count]
            self._copy(source, target, stream, kept=part.whole)
        finally:
            self._host_pool.copy_enqueued(slot, stream)

    def enqueue(self, n: int, index: int, stream: Stream) -> None:
        if index in self._sources:
            target = self._pool.slots[n % self._pool.count]
            self._copy(self._sources[index], target, stream, kept=True)

    def _copy(self, source: Source, target: DeviceSlot, stream: Stream, *, kept: bool) -> None:
        for dst, src in zip(target.parts(source.copies, kept=kept), source.parts, strict=True):
            if source.pinned:
                self._device.copy_pinned(dst, src, stream)
            else:
                self._device.copy(dst, src)


class UnifiedTarget:
    """Moves misaligned tensors to their aligned place within the slot they were read into."""

    pool_name = None

    def __init__(self, orders: Orders, pool: HostPool) -> None:
        self._orders = orders
        self._pool = pool

    def await_slot(self, stage: Stage, lane_run: LaneRun, n: int) -> bool:
        """The slot is free: the step has been read into it."""
        return True

    def order_slot(self, n: int, stream: Stream) -> None:
        """Nothing runs on the slot: work on the CPU is done when its call returns."""

    def enqueue_read(self, n: int, k: int, index: int, clock: PassClock, stream: Stream) -> None:
        """Move the tensors that are misaligned for their dtype."""
        memory = self._pool.arena.slots[n % self._pool.count]
        for copy in self._orders.layouts[index].copies:
            source = memory[copy.src : copy.src + copy.nbytes]
            memory[copy.dst : copy.dst + copy.nbytes].copy_(source)

    def enqueue(self, n: int, index: int, stream: Stream) -> None:
        """What was not read needs no move."""
