"""One device of a pipeline: its slots, and the threads that bring its steps there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from ..devices.device import Device, Stream
from ..planning.batches import plan_batches
from ..planning.layout import Layout
from ..planning.placement import LaneSlots
from ..planning.settings import Settings
from .copier import Copier, Memcpy
from .files import OpenFiles
from .memory import HostArena, allocate, device_slots
from .parts import Cutter, Parts
from .pool import DevicePool, DeviceSlot, HostPool, Scratch
from .reader import Feeder, Reader
from .residents import Residents
from .schedule import Order, Orders, Schedule
from .stage import Bell, Control, LaneRun, Progress, Run, Stage
from .target import DeviceTarget, Target, UnifiedTarget
from .weights import Weights

logger = logging.getLogger(__name__)


class Lane:
    """Slots, threads and streams of one device.

    Ownership: built and freed by the pipeline; its stages own what their classes say; the caller's
    thread alone calls :meth:`weights_of`.
    """

    def __init__(
        self,
        device: Device,
        layouts: Sequence[Layout],
        indices: Sequence[int],
        residents: Residents,
        settings: Settings,
        slots: LaneSlots,
    ) -> None:
        self.device = device
        self.residents = residents
        self.settings = settings
        # What stays on the device passes through the copier all the same if somebody listens.
        passes = [i for i in indices if i not in residents.weights or settings.asked["on_copy"]]
        read = [i for i in passes if i not in residents.weights and i not in residents.sources]
        copied = Order(passes, len(layouts))
        in_slots = passes if device.unified else read
        self.through_ring = settings.through_ring and not device.unified
        room = slots.host.nbytes if self.through_ring else None
        chunk = room or settings.chunk_nbytes  # a ring's part is one job
        cutter = Cutter(room, chunk, aligned=settings.read_mode == "direct")
        self.parts = Parts(layouts, in_slots, cutter)
        self.orders = Orders(tuple(layouts), copied, self.parts.order)
        self.host_pools: list[HostPool] = []
        self.scratch: Scratch | None = None
        self.stages: list[Stage] = []
        self.reader: Reader | None = None
        self.memcpy: Memcpy | None = None
        self.copier: Copier | None = None
        self.filler_bell = Bell()
        """Rung when the caller gives a slot back."""
        try:
            self._build_pools(slots)
        except BaseException:
            self.free()
            raise
        self.batches = plan_batches(settings, self.slot_counts(), unified=device.unified)

    def slot_counts(self, prefix: str = "") -> dict[str, int]:
        """Slots by pool."""
        counts = {prefix + pool.name: pool.count for pool in self.host_pools}
        if self.pool.count:
            counts[prefix + "device"] = self.pool.count
        return counts

    @property
    def device_nbytes(self) -> int:
        """Bytes of device memory that the slots take."""
        scratch = self.scratch.memory.nbytes if self.scratch is not None else 0
        return scratch + (0 if self.device.unified else self.pool.nbytes)

    @property
    def passes_ahead(self) -> int:
        """Passes that prefetch can reach beyond the one that runs."""
        slots = sum(self.slot_counts().values())
        return -(-slots // self.orders.copied.count) if self.orders.copied.count else 0

    def new_run(self, run: Run) -> LaneRun:
        """The lane's part of a run that begins."""
        read_count, copied_count = self.orders.read.count, self.orders.copied.count
        read = Progress(self.batches.read, read_count)
        # A stage that is left out shows the progress of the one before it.
        staged = Progress(self.batches.staged, read_count) if self.memcpy is not None else read
        copied = Progress(self.batches.copied, copied_count) if self.copier is not None else staged
        return LaneRun(run, read, staged, copied)

    def start(self) -> None:
        """Start the threads; they wait for a run."""
        if self.reader is not None:
            self.reader.start(self.settings.num_readers)
        for stage in self.stages:
            stage.start()

    def weights_of(self, index: int, n: int | None, stream: Stream) -> Weights:
        """The tensors of a step, the lane's ``n``-th in a slot; enqueues casts on ``stream``."""
        if self.residents.written:
            self.residents.restore(index)
        resident = self.residents.weights.get(index)
        if resident is not None:
            return resident
        assert n is not None
        stored = self._stored(index, self.pool.slots[n % self.pool.count])
        if self.scratch is not None:
            return self.scratch.cast(stored, self.orders.layouts[index], stream)
        return stored

    def release(self, index: int, number: int, stream: Stream) -> bool:
        """The caller's work on a step is enqueued; True if it has written to the step's tensors.

        ``number``: the step's in its run. May be interrupted anywhere, and called again.
        """
        written = False
        n = self.orders.copied.find(number)
        if n is not None:
            slot = self.pool.slots[n % self.pool.count]
            layout = self.orders.layouts[index]
            slot.record_uses(stream)
            if self.scratch is not None:
                self.scratch.record_uses(stream)
                written = self.scratch.expire(self._stored(index, slot), layout)
            written |= slot.expire(layout)
        return self.residents.release(index) or written

    def start_over(self) -> None:
        """All slots will be filled anew, and what stays has to be what the files have."""
        for slot in self.pool.slots:
            slot.forget_writes()
        if self.scratch is not None:
            self.scratch.forget_writes()
        self.residents.find_written()

    def _stored(self, index: int, slot: DeviceSlot) -> Weights:
        mapped = self.residents.mapped.get(index)
        return slot.weights(self.orders.layouts[index]) if mapped is None else mapped

    def wait_device(self) -> None:
        """No copy and no compute uses the slots or the resident layers any more."""
        with self.device.guard():
            if self.residents.weights:
                # No event tells what still reads them: they are never given back.
                self.device.wait_idle()
            if self.copier is not None:
                self.copier.stream.synchronize()
            self.pool.wait_all()
            if self.scratch is not None:
                self.scratch.wait_unused()

    def free(self) -> None:
        """Give the host memory's page locks back. Idempotent."""
        for pool in self.host_pools:
            pool.arena.close()

    def _build_pools(self, slots: LaneSlots) -> None:
        device, settings, layouts = self.device, self.settings, self.orders.layouts
        through = [layouts[i] for i in self.orders.copied.indices]
        filled = [layouts[i] for i in self.orders.copied.indices if i not in self.residents.weights]
        read = [layouts[i] for i in self.orders.read.indices if i not in self.residents.mapped]
        host_nbytes = max((layout.host_nbytes for layout in read), default=0)
        device_nbytes = max((layout.device_nbytes for layout in filled), default=0)
        scratch_nbytes = max((layout.scratch_nbytes for layout in filled), default=0)
        count = max(slots.device, 1)  # somebody listens, although nothing is streamed
        memories: list[torch.Tensor] = []
        if device.unified and through:
            # One pool: it holds as many layers ahead as the three would, and no byte moves twice.
            nbytes = max(host_nbytes, device_nbytes if read else 0)
            self._add_host_pool("device", count, nbytes)
            memories = self.host_pools[0].arena.slots
        elif through:
            if read and self.through_ring:
                self._add_host_pool("ring", slots.host.count, slots.host.nbytes)
            elif read:
                for name, host_count in settings.host_slots.items():
                    self._add_host_pool(name, host_count, host_nbytes)
            memories = device_slots(count, device_nbytes, device)
        self.pool = DevicePool(memories, device)
        if scratch_nbytes:
            self.scratch = Scratch(allocate(scratch_nbytes, device), device)

    def _add_host_pool(self, name: str, count: int, slot_nbytes: int) -> None:
        pinned = name in ("pinned", "ring")
        threads = self.settings.num_readers
        arena = HostArena([slot_nbytes] * count, self.device, pinned=pinned, threads=threads)
        self.host_pools.append(HostPool(name, arena, self.device))

    def wire(
        self,
        lane_idx: int,
        schedule: Schedule,
        files: OpenFiles,
        control: Control,
        caller_bell: Bell,
    ) -> None:
        """Build the stages, as the pipeline's lane number ``lane_idx``."""
        feeder = None
        if self.orders.read.count:
            feeder = self._build_reading(lane_idx, schedule, files, control)
        on_copy, unified = self.settings.asked["on_copy"], self.device.unified
        moves = any(self.orders.layouts[i].copies for i in self.orders.copied.indices)
        if self.orders.copied.count and (not unified or on_copy is not None or moves):
            self.copier = Copier(
                control, lane_idx, schedule, self.orders, self.device, self._target()
            )
            self.copier.slots, self.copier.on_copy = self.pool.slots, on_copy
        later = [stage for stage in (self.memcpy, self.copier) if stage is not None]
        self.stages = [*([feeder] if feeder is not None else []), *later]
        if feeder is not None:
            feeder.others = later
            feeder.num_emptied = self._num_emptied()
        self._connect_bells(feeder, caller_bell)

    def name_pools(self, prefix: str) -> None:
        """Put ``prefix`` before the names of the pools, for reports."""
        self.pool.name = prefix + self.pool.name
        for pool in self.host_pools:
            pool.name = prefix + pool.name

    def _build_reading(
        self, lane_idx: int, schedule: Schedule, files: OpenFiles, control: Control
    ) -> Feeder:
        order, pools = self.orders.read, self.host_pools
        slots = pools[0].arena.bytes
        self.reader = Reader(control, schedule, self.parts, files, slots, self.residents)
        if len(pools) == 2:
            self.memcpy = Memcpy(control, lane_idx, schedule, order, *pools)
            self.memcpy.num_emptied = num_enqueued
        return Feeder(control, lane_idx, schedule, self.parts, self.reader, pools[0])

    def _target(self) -> Target:
        if self.device.unified:
            return UnifiedTarget(self.orders, self.host_pools[0])
        source = self.host_pools[-1] if self.host_pools else None
        sources = self.residents.sources
        return DeviceTarget(self.orders, self.parts, sources, source, self.pool, self.device)

    def _num_emptied(self) -> Callable[[LaneRun], int]:
        """Steps that have been taken out of the pool that the readers fill."""
        if self.device.unified:
            return self.orders.released
        if self.memcpy is not None:
            return lambda lane_run: lane_run.staged.done
        return num_enqueued

    def _connect_bells(self, feeder: Feeder | None, caller_bell: Bell) -> None:
        """Each stage wakes the one whose output slot it frees and the one it hands on to."""
        after_read = caller_bell
        if self.copier is not None:
            before = self.memcpy if self.memcpy is not None else feeder
            self.copier.target_bell = caller_bell
            if before is not None:
                self.copier.source_bell = before.bell
            after_read = self.copier.bell
        if self.memcpy is not None and self.copier is not None and feeder is not None:
            self.memcpy.source_bell = feeder.bell
            self.memcpy.target_bell = self.copier.bell
            after_read = self.memcpy.bell
        if self.reader is not None and feeder is not None:
            self.reader.filled_bell, self.reader.drained_bell = after_read, feeder.bell
            for stage in feeder.others:
                stage.on_adopted = feeder.bell.ring
        filler: Stage | None = self.copier
        if self.device.unified or filler is None:
            filler = feeder
        if filler is not None:
            self.filler_bell = filler.bell


def num_enqueued(lane_run: LaneRun) -> int:
    """Steps (parts) from disk whose copies out of host memory have been enqueued."""
    return lane_run.enqueued
