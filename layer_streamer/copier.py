"""Host to device: the stage that copies, and the memcpy stage before it.

Rules that the order of events rests on: an event is waited on only after a count has been seen
that is raised after its record; the copy stream waits for the caller's work on a slot before it
overwrites it; a host slot is filled again only when the device has read it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from .config import OnCopy
from .device import Device, Stream
from .pool import DevicePool, DeviceSlot, HostPool, Source
from .schedule import Order, Orders, Schedule
from .worker import Bell, Control, LaneRun, Stage


class Memcpy(Stage):
    """Moves steps from pageable to pinned slots."""

    def __init__(
        self,
        control: Control,
        lane_idx: int,
        schedule: Schedule,
        order: Order,
        source: HostPool,
        target: HostPool,
    ) -> None:
        super().__init__("layer-streamer-memcpy", control, lane_idx)
        self.source_bell = Bell()
        self.target_bell = Bell()
        self.freed: Callable[[LaneRun], int] = lambda lane_run: 0
        """How many of the lane's steps from disk have been copied out of the target."""
        self._schedule = schedule
        self._order = order
        self._source = source
        self._target = target

    def process(self, lane_run: LaneRun) -> None:
        run, n = lane_run.run, 0
        while self.await_source(lane_run, n) and self.await_slot(lane_run, n):
            number = self._order.number(n)
            if number not in run.failures:
                try:
                    self._move(lane_run, n, number)
                except BaseException as error:
                    run.failures.setdefault(number, error)
            lane_run.staged.advance()
            self.source_bell.ring()
            self.target_bell.ring()
            n += 1

    def await_source(self, lane_run: LaneRun, n: int) -> bool:
        """Wait until the readers have handed the step on."""
        return self.await_true(lane_run.run, lambda: lane_run.read.out > n)

    def await_slot(self, lane_run: LaneRun, n: int) -> bool:
        """Wait until the copies out of this slot have been enqueued."""
        count = self._target.count
        return self.await_true(lane_run.run, lambda: self.freed(lane_run) > n - count)

    def wait_reusable(self, slot: int) -> None:
        """Block until the device has read what it was to copy from the slot."""
        self._target.wait_reusable(slot)

    def _move(self, lane_run: LaneRun, n: int, number: int) -> None:
        run, index, slot = lane_run.run, self._schedule.index(number), n % self._target.count
        self.wait_reusable(slot)
        in_use = n + 1 - self.freed(lane_run)
        self._schedule.note_peak(run, number, self._order, self._target.name, in_use)
        clock = self._schedule.clock(run, number)
        clock.memcpy_begin[index] = time.perf_counter()
        source = self._source.arena.slots[n % self._source.count]
        target = self._target.arena.slots[slot]
        for read in self._schedule.layouts[index].reads:
            part = slice(read.slot_offset, read.slot_offset + read.nbytes)
            target[part].copy_(source[part])
        clock.memcpy_end[index] = time.perf_counter()


class Target(Protocol):
    """Where copies go and how they are enqueued: a device's slots, or the slots themselves."""

    @property
    def pool_name(self) -> str | None:
        """The pool that copies fill; None if they stay in the one that reads have filled."""

    def await_slot(self, stage: Stage, lane_run: LaneRun, n: int) -> bool: ...
    def order_slot(self, n: int, stream: Stream) -> None: ...
    def enqueue(self, n: int, number: int, stream: Stream) -> None: ...


class DeviceTarget:
    """Copies from host memory to device slots, ordered by events."""

    def __init__(
        self,
        orders: Orders,
        sources: Mapping[int, Source],
        host_pool: HostPool | None,
        pool: DevicePool,
        device: Device,
    ) -> None:
        self._orders = orders
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

    def enqueue(self, n: int, number: int, stream: Stream) -> None:
        """Enqueue a step's copies; a host slot they come from is in use until they have run."""
        index = number % self._orders.length
        target = self._pool.slots[n % self._pool.count]
        if index in self._orders.read:
            assert self._host_pool is not None
            slot = self._orders.read.before(number) % self._host_pool.count
            source = self._host_pool.source(slot, self._orders.layouts[index].copies)
            try:
                self._copy(source, target, stream)
            finally:
                self._host_pool.copy_enqueued(slot, stream)
        elif index in self._sources:
            self._copy(self._sources[index], target, stream)

    def _copy(self, source: Source, target: DeviceSlot, stream: Stream) -> None:
        for dst, src in zip(target.parts(source.copies), source.parts, strict=True):
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

    def enqueue(self, n: int, number: int, stream: Stream) -> None:
        """Move the tensors that are misaligned for their dtype."""
        memory = self._pool.arena.slots[n % self._pool.count]
        for copy in self._orders.layouts[number % self._orders.length].copies:
            source = memory[copy.src : copy.src + copy.nbytes]
            memory[copy.dst : copy.dst + copy.nbytes].copy_(source)


class Copier(Stage):
    """Enqueues every step's copies on its own stream and records when they are done."""

    def __init__(
        self,
        control: Control,
        lane_idx: int,
        schedule: Schedule,
        orders: Orders,
        device: Device,
        target: Target,
    ) -> None:
        super().__init__("layer-streamer-copy", control, lane_idx)
        self.source_bell = Bell()
        self.target_bell = Bell()
        self.stream = device.new_stream()
        self._next_stream: Stream | None = None
        self._schedule = schedule
        self.slots: Sequence[DeviceSlot] = ()
        self.on_copy: OnCopy | None = None
        self._orders = orders
        self._device = device
        self._target = target
        # Slots come from the constructing thread's stream, where their memory may still be in use.
        self._allocated = device.new_event()
        self._allocated.record(device.current_stream())

    def prepare(self) -> None:
        self._device.enter_thread(self.stream)
        self.order_after_allocation(self.stream)

    def order_after_allocation(self, stream: Stream) -> None:
        """Let the copies wait for whatever used the slots' memory before it was theirs."""
        self._allocated.wait(stream)

    def avoid(self, stream: Stream) -> None:
        """Use another copy stream if ``stream``, the caller's, is the present one.

        torch hands streams out of a small pool in turn, so the caller may be given ours. From the
        caller's thread; takes effect with the next step.
        """
        if self._next_stream is None and stream == self.stream:
            fresh = self._device.new_stream()
            if fresh != stream:
                self._next_stream = fresh

    def process(self, lane_run: LaneRun) -> None:
        n = 0
        while self.await_source(lane_run, n) and self._target.await_slot(self, lane_run, n):
            number = self._orders.copied.number(n)
            try:
                self._copy(lane_run, n, number)
            except BaseException as error:
                lane_run.run.failures.setdefault(number, error)
            lane_run.copied.advance()
            self.source_bell.ring()
            self.target_bell.ring()
            n += 1

    def await_source(self, lane_run: LaneRun, n: int) -> bool:
        """Wait until the step before has handed this step on, if it comes from disk."""
        number = self._orders.copied.number(n)
        if number % self._orders.length not in self._orders.read:
            return self.await_true(lane_run.run, lambda: True)
        k = self._orders.read.before(number)
        return self.await_true(lane_run.run, lambda: lane_run.staged.out > k)

    def _copy(self, lane_run: LaneRun, n: int, number: int) -> None:
        if self._next_stream is not None:
            self._change_stream(self._next_stream)
        run, index = lane_run.run, self._schedule.index(number)
        clock, slot = self._schedule.clock(run, number), self.slots[n % len(self.slots)]
        if self._target.pool_name is not None:
            in_use = n + 1 - self._orders.released(lane_run)
            self._schedule.note_peak(
                run, number, self._orders.copied, self._target.pool_name, in_use
            )
        self._target.order_slot(n, self.stream)
        clock.copy_begin[index].record(self.stream)
        if number not in run.failures:
            self._target.enqueue(n, number, self.stream)
            if self.on_copy is not None:
                self.on_copy(self._schedule.steps[index].layer_idx, self.stream)
        clock.copy_end[index].record(self.stream)
        slot.ready.record(self.stream)

    def _change_stream(self, fresh: Stream) -> None:
        moved = self._device.new_event()
        moved.record(self.stream)
        moved.wait(fresh)
        self.stream, self._next_stream = fresh, None
        self._device.enter_thread(fresh)
