"""The memory of one device of a pipeline: its slots, and what of them each step is in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..devices.device import Device, Stream
from ..planning.batches import plan_batches
from ..planning.layout import Layout
from ..planning.placement import LaneSlots
from ..planning.settings import Settings
from .memory import HostArena, allocate, device_slots
from .parts import Cutter, Parts
from .pool import DevicePool, DeviceSlot, HostPool, Scratch
from .residents import Residents
from .schedule import Order, Orders
from .weights import Weights


class LaneMemory:
    """Slots of one device, and what is resident there.

    Ownership: built and freed by the pipeline; its stages own what the pools' classes say; the
    caller's thread alone calls :meth:`weights_of`, :meth:`release` and :meth:`start_over`.
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
        """``indices``: the device's steps."""
        self.device = device
        self.residents = residents
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
        try:
            self._build_pools(slots, settings)
        except BaseException:
            self.free()
            raise
        self.batches = plan_batches(settings, self.slot_counts, unified=device.unified)

    @property
    def slot_counts(self) -> dict[str, int]:
        """Slots by pool."""
        counts = {pool.name: pool.count for pool in self.host_pools}
        if self.pool.count:
            counts[self.pool.name] = self.pool.count
        return counts

    @property
    def device_nbytes(self) -> int:
        """Bytes of device memory that the slots take."""
        scratch = self.scratch.memory.nbytes if self.scratch is not None else 0
        return scratch + (0 if self.device.unified else self.pool.nbytes)

    @property
    def passes_ahead(self) -> int:
        """Passes that prefetch can reach beyond the one that runs."""
        slots = sum(self.slot_counts.values())
        return -(-slots // self.orders.copied.count) if self.orders.copied.count else 0

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

    def wait_unused(self) -> None:
        """Block until the device has done all work on slots and resident layers."""
        if self.residents.weights:
            # No event tells what still reads them: they are never given back.
            self.device.wait_idle()
        self.pool.wait_all()
        if self.scratch is not None:
            self.scratch.wait_unused()

    def name_pools(self, prefix: str) -> None:
        """Put ``prefix`` before the names of the pools, for reports."""
        self.pool.name = prefix + self.pool.name
        for pool in self.host_pools:
            pool.name = prefix + pool.name

    def free(self) -> None:
        """Give the host memory's page locks back. Idempotent."""
        for pool in self.host_pools:
            pool.arena.close()

    def _build_pools(self, slots: LaneSlots, settings: Settings) -> None:
        device, layouts = self.device, self.orders.layouts
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
            self._add_host_pool("device", count, nbytes, settings)
            memories = self.host_pools[0].arena.slots
        elif through:
            if read and self.through_ring:
                self._add_host_pool("ring", slots.host.count, slots.host.nbytes, settings)
            elif read:
                for name, host_count in settings.host_slots.items():
                    self._add_host_pool(name, host_count, host_nbytes, settings)
            memories = device_slots(count, device_nbytes, device)
        self.pool = DevicePool(memories, device)
        if scratch_nbytes:
            self.scratch = Scratch(allocate(scratch_nbytes, device), device)

    def _add_host_pool(self, name: str, count: int, slot_nbytes: int, settings: Settings) -> None:
        pinned = name in ("pinned", "ring")
        threads = settings.num_readers
        arena = HostArena([slot_nbytes] * count, self.device, pinned=pinned, threads=threads)
        self.host_pools.append(HostPool(name, arena, self.device))
