"""Host to device: the stage that copies, and the memcpy stage before it.

Rules that the order of events rests on: an event is waited on only after a count has been seen
that is raised after its record; the copy stream waits for the caller's work on a slot before it
overwrites it; a host slot is filled again only when the device has read it.
"""

from __future__ import annotations

import time
from typing import Protocol

from .config import OnCopy
from .device import Device, Stream
from .layout import Layout
from .pool import DevicePool, DeviceSlot, HostPool
from .schedule import Schedule
from .worker import Bell, Control, Run, Stage


class Memcpy(Stage):
    """Moves steps from pageable to pinned slots."""

    def __init__(
        self, control: Control, schedule: Schedule, source: HostPool, target: HostPool
    ) -> None:
        super().__init__("layer-streamer-memcpy", control)
        self.source_bell = Bell()
        self.target_bell = Bell()
        self._schedule = schedule
        self._source = source
        self._target = target

    def process(self, run: Run) -> None:
        number = 0
        while self.await_source(run, number) and self.await_slot(run, number):
            if number not in run.failures:
                try:
                    self._move(run, number)
                except BaseException as error:
                    run.failures.setdefault(number, error)
            run.staged.advance()
            self.source_bell.ring()
            self.target_bell.ring()
            number += 1

    def await_source(self, run: Run, number: int) -> bool:
        """Wait until the readers have handed the step on."""
        return self.await_true(run, lambda: run.read.out > number)

    def await_slot(self, run: Run, number: int) -> bool:
        """Wait until the copies out of this slot have been enqueued."""
        return self.await_true(run, lambda: run.copied.done > number - self._target.count)

    def wait_reusable(self, slot: int) -> None:
        """Block until the device has read what it was to copy from the slot."""
        self._target.wait_reusable(slot)

    def _move(self, run: Run, number: int) -> None:
        index = self._schedule.index(number)
        slot = number % self._target.count
        self.wait_reusable(slot)
        in_use = number + 1 - run.copied.done
        self._schedule.note_peak(run, number, self._target.name, in_use)
        clock = self._schedule.clock(run, number)
        clock.memcpy_begin[index] = time.perf_counter()
        source = self._source.arena.slots[number % self._source.count]
        target = self._target.arena.slots[slot]
        for read in self._schedule.layouts[index].reads:
            part = slice(read.slot_offset, read.slot_offset + read.nbytes)
            target[part].copy_(source[part])
        clock.memcpy_end[index] = time.perf_counter()


class Target(Protocol):
    """Where copies go and how they are enqueued: a device's slots, or the slots themselves."""

    pool_name: str | None
    """The pool that copies fill; None if they stay in the one that reads have filled."""

    def await_slot(self, stage: Stage, run: Run, number: int) -> bool: ...
    def order_slot(self, number: int, stream: Stream) -> None: ...
    def enqueue(self, number: int, layout: Layout, stream: Stream) -> None: ...


class DeviceTarget:
    """Copies from host slots to device slots, ordered by events."""

    pool_name: str | None = "device"

    def __init__(self, source: HostPool, pool: DevicePool, device: Device) -> None:
        self._source = source
        self._pool = pool
        self._device = device

    def await_slot(self, stage: Stage, run: Run, number: int) -> bool:
        """Wait until the caller has given this slot's last step back."""
        return stage.await_true(run, lambda: run.released > number - self._pool.count)

    def order_slot(self, number: int, stream: Stream) -> None:
        """Let the copies wait for the caller's work on the slot."""
        self._pool.slots[number % self._pool.count].order_after_uses(stream)

    def enqueue(self, number: int, layout: Layout, stream: Stream) -> None:
        """Enqueue a step's copies; its source slot is in use until they have run."""
        slot = number % self._source.count
        source, target = self._source.arena.slots[slot], self._slot(number).memory
        try:
            for copy in layout.copies:
                self._device.copy(
                    target[copy.dst : copy.dst + copy.nbytes],
                    source[copy.src : copy.src + copy.nbytes],
                )
        finally:
            self._source.copy_enqueued(slot, stream)

    def _slot(self, number: int) -> DeviceSlot:
        return self._pool.slots[number % self._pool.count]


class UnifiedTarget:
    """Moves misaligned tensors to their aligned place within the slot they were read into."""

    pool_name: str | None = None

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool

    def await_slot(self, stage: Stage, run: Run, number: int) -> bool:
        """The slot is free: the step has been read into it."""
        return True

    def order_slot(self, number: int, stream: Stream) -> None:
        """Nothing runs on the slot: work on the CPU is done when its call returns."""

    def enqueue(self, number: int, layout: Layout, stream: Stream) -> None:
        """Move the tensors that are misaligned for their dtype."""
        memory = self._pool.arena.slots[number % self._pool.count]
        for copy in layout.copies:
            source = memory[copy.src : copy.src + copy.nbytes]
            memory[copy.dst : copy.dst + copy.nbytes].copy_(source)


class Copier(Stage):
    """Enqueues every step's copies on its own stream and records when they are done."""

    def __init__(
        self,
        control: Control,
        schedule: Schedule,
        device: Device,
        target: Target,
        slots: list[DeviceSlot],
        on_copy: OnCopy | None,
    ) -> None:
        super().__init__("layer-streamer-copy", control)
        self.source_bell = Bell()
        self.target_bell = Bell()
        self.stream = device.new_stream()
        self._next_stream: Stream | None = None
        self._schedule = schedule
        self._device = device
        self._target = target
        self._slots = slots
        self._on_copy = on_copy
        # Slots come from the constructing thread's stream, where their memory may still be in use.
        self._allocated = device.new_event()
        self._allocated.record(device.current_stream())

    def prepare(self) -> None:
        self._device.enter_thread(self.stream)
        self.order_after_allocation(self.stream)

    def order_after_allocation(self, stream: Stream) -> None:
        """Let the copies wait for whatever used the slots' memory before it was theirs."""
        stream.wait_event(self._allocated)

    def avoid(self, stream: Stream) -> None:
        """Use another copy stream if ``stream``, the caller's, is the present one.

        torch hands streams out of a small pool in turn, so the caller may be given ours. From the
        caller's thread; takes effect with the next step.
        """
        if self._next_stream is None and stream == self.stream:
            fresh = self._device.new_stream()
            if fresh != stream:
                self._next_stream = fresh

    def process(self, run: Run) -> None:
        number = 0
        while self.await_source(run, number) and self._target.await_slot(self, run, number):
            try:
                self._copy(run, number)
            except BaseException as error:
                run.failures.setdefault(number, error)
            run.copied.advance()
            self.source_bell.ring()
            self.target_bell.ring()
            number += 1

    def await_source(self, run: Run, number: int) -> bool:
        """Wait until the step before has handed this step on."""
        return self.await_true(run, lambda: run.staged.out > number)

    def _copy(self, run: Run, number: int) -> None:
        if self._next_stream is not None:
            self._change_stream(self._next_stream)
        index = self._schedule.index(number)
        clock, layout = self._schedule.clock(run, number), self._schedule.layouts[index]
        slot = self._slots[number % len(self._slots)]
        if self._target.pool_name is not None:
            in_use = number + 1 - run.released
            self._schedule.note_peak(run, number, self._target.pool_name, in_use)
        self._target.order_slot(number, self.stream)
        clock.copy_begin[index].record(self.stream)
        if number not in run.failures:
            self._target.enqueue(number, layout, self.stream)
            if self._on_copy is not None:
                self._on_copy(self._schedule.steps[index].layer_idx, self.stream)
        clock.copy_end[index].record(self.stream)
        slot.ready.record(self.stream)

    def _change_stream(self, fresh: Stream) -> None:
        moved = self._device.new_event()
        moved.record(self.stream)
        fresh.wait_event(moved)
        self.stream, self._next_stream = fresh, None
        self._device.enter_thread(fresh)
