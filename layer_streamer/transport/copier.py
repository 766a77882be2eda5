"""Host to device: the stage that copies, and the memcpy stage before it.

Rules that the order of events rests on: an event is waited on only after a count has been seen
that is raised after its record; the copy stream waits for the caller's work on a slot before it
overwrites it; a host slot is filled again only when the device has read it.
"""

from __future__ import annotations

import time
import weakref
from functools import partial

import torch

from ..devices.device import Stream
from ..planning.options import OnCopy
from .lane_memory import LaneMemory
from .pool import DeviceSlot, Source
from .stage import LaneRun, Post, Run, Stage


class Listener:
    """The caller's on_copy: the streamer has it, and the threads only know of it.

    It may lead back to the streamer, as a method of what owns it does: held by a thread, it would
    keep the streamer from ever being collected. While a pass runs, the streamer is held.
    """

    __slots__ = ("__weakref__", "_on_copy")

    def __init__(self, on_copy: OnCopy) -> None:
        self._on_copy = on_copy

    def weakly(self) -> OnCopy:
        """What calls it for as long as it is there."""
        known = weakref.ref(self)

        def on_copy(layer_idx: int, stream: object) -> None:
            listener = known()
            if listener is not None:
                listener._on_copy(layer_idx, stream)

        return on_copy


class Memcpy(Stage):
    """Moves steps from pageable to pinned slots."""

    def __init__(self, post: Post, memory: LaneMemory) -> None:
        super().__init__("layer-streamer-memcpy", post)
        self._source, self._target = memory.host_pools

    def process(self, lane_run: LaneRun) -> None:
        run, n, order = lane_run.run, 0, lane_run.orders.read
        while order.has(n) and self.await_source(lane_run, n) and self.await_slot(lane_run, n):
            number = order.number(n)
            if number not in run.failures:
                run.attempt(number, partial(self._move, lane_run, n, number))
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
        return self.await_true(lane_run.run, lambda: self.num_emptied(lane_run) > n - count)

    def num_emptied(self, lane_run: LaneRun) -> int:
        """How many of the lane's steps from disk have been copied out of the target."""
        return lane_run.enqueued

    def wait_reusable(self, slot: int) -> None:
        """Block until the device has read what it was to copy from the slot."""
        self._target.wait_reusable(slot)

    def _move(self, lane_run: LaneRun, n: int, number: int) -> None:
        run, slot = lane_run.run, n % self._target.count
        index = self._schedule.index(run, number)
        self.wait_reusable(slot)
        in_use = n + 1 - self.num_emptied(lane_run)
        self._schedule.note_peak(run, number, lane_run.orders.read, self._target.name, in_use)
        clock = self._schedule.clock(run, number)
        clock.memcpy_begin[index] = time.perf_counter()
        source = self._source.arena.slots[n % self._source.count]
        target = self._target.arena.slots[slot]
        for read in self._schedule.layouts[index].reads:
            part = slice(read.slot_offset, read.slot_offset + read.nbytes)
            target[part].copy_(source[part])
        clock.memcpy_end[index] = time.perf_counter()


class Copier(Stage):
    """Enqueues every step's copies on its own stream and records when they are done.

    On a CPU, where a step is used in the slot that it was read into, tensors that are misaligned
    for their dtype are copied to their place in that slot.
    """

    def __init__(self, post: Post, memory: LaneMemory, on_copy: OnCopy | None) -> None:
        super().__init__("layer-streamer-copy", post)
        self._memory = memory
        self._slots = memory.slots
        self._device = memory.device
        self._on_copy = on_copy
        self.stream = memory.device.new_stream()
        self._next_stream: Stream | None = None
        # Slots come from the constructing thread's stream, where their memory may still be in use.
        self._allocated = memory.device.new_event()
        self._allocated.record(memory.device.current_stream())

    def prepare(self) -> None:
        self._device.use_in_this_thread(self.stream)
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
        run, n, order = lane_run.run, 0, lane_run.orders.copied
        while order.has(n) and self.await_source(lane_run, n) and self.await_slot(lane_run, n):
            number = order.number(n)
            if not lane_run.orders.kept(number):
                slot = self._slots[lane_run.orders.slot(n)]
                run.attempt(number, partial(self._begin, lane_run, n, number))
                if not self._take_reads(lane_run, slot, number):
                    return
                run.attempt(number, partial(self._end, run, slot, number))
            lane_run.copied.advance()
            self.target_bell.ring()
            n += 1

    def await_source(self, lane_run: LaneRun, n: int) -> bool:
        """Wait until the step before has handed this step (its first part) on, if it is read."""
        orders = lane_run.orders
        first = orders.read.find(orders.copied.number(n))
        if first is None:
            return self.await_true(lane_run.run, lambda: True)
        return self.await_true(lane_run.run, lambda: lane_run.staged.out > first)

    def await_slot(self, lane_run: LaneRun, n: int) -> bool:
        """Wait until the caller has given the last step in this slot back."""
        released, count = lane_run.orders.released, lane_run.orders.num_slots
        return self.await_true(lane_run.run, lambda: released(lane_run) > n - count)

    def await_part(self, lane_run: LaneRun, k: int) -> bool:
        """Wait until one more part of the step has been handed on, the lane's ``k``-th."""
        return self.await_true(lane_run.run, lambda: lane_run.staged.out > k)

    def _begin(self, lane_run: LaneRun, n: int, number: int) -> None:
        if self._next_stream is not None:
            self._change_stream(self._next_stream)
        run = lane_run.run
        if not self._memory.in_place:
            in_use = n + 1 - lane_run.orders.released(lane_run)
            pool = self._memory.device_pool
            self._schedule.note_peak(run, number, lane_run.orders.copied, pool, in_use)
        self._slots[lane_run.orders.slot(n)].order_after_uses(self.stream)
        index = self._schedule.index(run, number)
        self._schedule.clock(run, number).begin_copy(index, self.stream)

    def _take_reads(self, lane_run: LaneRun, slot: DeviceSlot, number: int) -> bool:
        """Enqueue what comes from disk, part by part; False once the run is over.

        What has failed is counted as well: its host slots are free again.
        """
        run, read = lane_run.run, lane_run.orders.read
        first = read.before(number)
        for k in range(first, read.before(number + 1)):
            if k > first and not self.await_part(lane_run, k):
                return False
            if number not in run.failures:
                run.attempt(number, partial(self._copy_part, lane_run, slot, number, k))
            lane_run.enqueued = k + 1
            self.source_bell.ring()
        return True

    def _copy_part(self, lane_run: LaneRun, target: DeviceSlot, number: int, k: int) -> None:
        """The host slot that it comes from is in use until its copies have run."""
        run, memory, pool = lane_run.run, self._memory, self._memory.host_pools[-1]
        _, part = memory.parts.find(lane_run.orders, k, number)
        slot = memory.read_slot(lane_run, k) if memory.in_place else k % pool.count
        if memory.through_ring:
            clock, index = self._schedule.clock(run, number), self._schedule.index(run, number)
            pool.copy_begins(slot, part.copy_nbytes, index, clock, self.stream)
        try:
            if memory.through_ring:
                # It lies elsewhere in the ring with every pass: what would be kept grows with them.
                dst, src, pinned = target.memory, pool.arena.slots[slot], pool.arena.pinned
                for copy in part.copies:
                    nbytes = copy.nbytes
                    self._enqueue(
                        dst[copy.dst : copy.dst + nbytes], src[copy.src : copy.src + nbytes], pinned
                    )
            else:
                self._copy(pool.source(slot, part.copies), target)
        finally:
            pool.copy_enqueued(slot, self.stream)

    def _copy(self, source: Source, slot: DeviceSlot) -> None:
        for dst, src in zip(slot.parts(source.copies), source.parts, strict=True):
            self._enqueue(dst, src, source.pinned)

    def _enqueue(self, dst: torch.Tensor, src: torch.Tensor, pinned: bool) -> None:
        if pinned:
            self._device.copy_pinned(dst, src, self.stream)
        else:
            self._device.copy(dst, src)

    def _end(self, run: Run, slot: DeviceSlot, number: int) -> None:
        index = self._schedule.index(run, number)
        if number not in run.failures:
            source = self._memory.residents.sources.get(index)
            if source is not None:
                self._copy(source, slot)
            if self._on_copy is not None:
                self._on_copy(self._schedule.steps[index].layer_idx, self.stream)
        self._schedule.clock(run, number).copy_end[index].record(self.stream)
        slot.ready.record(self.stream)

    def _change_stream(self, fresh: Stream) -> None:
        moved = self._device.new_event()
        moved.record(self.stream)
        moved.wait(fresh)
        self.stream, self._next_stream = fresh, None
        self._device.use_in_this_thread(fresh)
