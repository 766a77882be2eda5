"""The memory of one device of a pipeline: its slots, and what of them each step is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..devices.device import Device, Stream
from ..planning.batches import plan_batches
from ..planning.layout import Layout
from ..planning.placement import Placement, Slots
from ..planning.settings import Settings
from .memory import HostArena, allocate, device_slots
from .parts import Cutter, Parts
from .pool import DeviceSlot, HostPool, Scratch
from .residents import Residents
from .schedule import Orders, SlotUse
from .stage import Heading, LaneRun
from .weights import Weights


class LaneMemory:
    """Slots of one device, and which of its steps go through them.

    On a CPU a step is used in the slot that it is read into (``in_place``): one pool holds as many
    layers ahead as three would, and no byte moves twice.

    Ownership: built and freed by the pipeline; its stages own what the pools' classes say; the
    caller's thread alone calls :meth:`weights_of`, :meth:`release` and :meth:`start_over`.
    """

    def __init__(
        self,
        lane_idx: int,
        device: Device,
        layouts: Sequence[Layout],
        residents: Residents,
        settings: Settings,
        placement: Placement,
    ) -> None:
        self.device = device
        self.in_place = device.unified
        self.residents = residents
        # What stays on the device passes through the copier all the same if somebody listens.
        passes = [
            i
            for i in range(lane_idx, len(layouts), len(placement.device_slots))
            if i not in residents.weights or settings.asked["on_copy"]
        ]
        read = passes if self.in_place else [i for i in passes if layouts[i].reads]
        self.through_ring = settings.through_ring and not self.in_place
        room = placement.host_slots[lane_idx].nbytes if self.through_ring else None
        chunk = room or settings.chunk_nbytes  # a ring's part is one job
        cutter = Cutter(room, chunk, aligned=settings.read_mode == "direct")
        self.parts = Parts(layouts, read, cutter)
        self.layouts = tuple(layouts)
        """Of every step of a pass."""
        self.passes = tuple(passes)
        """Indices of the steps that go through the device's slots."""
        self._orders: dict[Heading, Orders] = {}
        planned = placement.device_slots[lane_idx], placement.host_slots[lane_idx]
        slots = self._plan_slots(*planned, settings.host_slots)
        counts = {name: some.count for name, some in slots.items()}
        self.batches = plan_batches(settings, counts, unified=self.in_place)
        # Pools of several devices stand in one report.
        prefix = f"{lane_idx} " if len(placement.device_slots) > 1 else ""
        self.device_pool = prefix + "device"
        """The name of its ``slots``."""
        self._used = SlotUse(self.passes, counts.get("device", 0), self.in_place)
        self.slot_counts = {prefix + name: count for name, count in counts.items()}
        """Slots by pool."""
        self.host_pools: list[HostPool] = []
        """In the order that layers pass through them."""
        self.scratch: Scratch | None = None
        try:
            self._build_pools(slots, prefix, settings.num_readers)
        except BaseException:
            self.free()
            raise

    @property
    def device_nbytes(self) -> int:
        """Bytes of device memory that the slots take."""
        scratch = self.scratch.memory.nbytes if self.scratch is not None else 0
        slots = 0 if self.in_place else sum(slot.memory.nbytes for slot in self.slots)
        return scratch + slots

    @property
    def passes_ahead(self) -> int:
        """Passes that prefetch can reach beyond the one that runs."""
        # Where passes turn, readers go past the layers that lie in the device's slots.
        slots = sum(self.slot_counts.values()) + self._used.num_slots
        counts = [len(some.indices) for some in (self._used, self._use(Heading(on_host=True)))]
        return max((-(-slots // count) for count in counts if count), default=0)

    def orders(self, heading: Heading) -> Orders:
        """Which steps go through what in runs of this heading; made once."""
        if heading not in self._orders:
            used = self._use(heading)
            self._orders[heading] = Orders(self.layouts, heading, used, self.parts.counts)
        return self._orders[heading]

    def _use(self, heading: Heading) -> SlotUse:
        if not heading.on_host:
            return self._used
        indices = [i for i in self.passes if i not in self.residents.host]
        # No layer is brought for the next pass before this one has given it back.
        num_slots = min(self._used.num_slots, len(indices))
        return self._used._replace(indices=indices, num_slots=num_slots)

    def read_slot(self, lane_run: LaneRun, k: int) -> int:
        """The slot of the first host pool that the lane's ``k``-th part from disk is read into."""
        return lane_run.orders.slot(k) if self.in_place else k % self.host_pools[0].count

    def num_emptied(self, lane_run: LaneRun) -> int:
        """How many parts from disk have been taken out of the first host pool."""
        if self.in_place:
            return lane_run.orders.released(lane_run)
        return lane_run.staged.done if len(self.host_pools) == 2 else lane_run.enqueued

    def weights_of(self, index: int, slot: DeviceSlot | None, stream: Stream) -> Weights:
        """The tensors of a step, which lies in ``slot``; enqueues casts on ``stream``."""
        if self.residents.written:
            self.residents.restore(index)
        resident = self.residents.weights.get(index)
        if resident is not None:
            if index in self.residents.looks:
                self.residents.looks[index]()
            return resident
        if slot is None:
            return self.residents.on_host(index, self.layouts[index])
        stored = self._stored(index, slot)
        if self.scratch is not None:
            return self.scratch.cast(stored, self.layouts[index], stream)
        return stored

    def release(self, index: int, slot: DeviceSlot | None, stream: Stream) -> bool:
        """The caller's work on a step is enqueued; True if it has written to the step's tensors.

        ``slot``: where it lies. May be interrupted anywhere, and called again.
        """
        written = False
        if slot is not None:
            layout = self.layouts[index]
            slot.record_uses(stream)
            if self.scratch is not None:
                self.scratch.record_uses(stream)
                written = self.scratch.expire_cast(self._stored(index, slot), layout)
            written |= slot.expire(layout)
        elif index in self.residents.host:
            written = self.residents.release_cast(index, self.layouts[index])
        return self.residents.release(index) or written

    def start_over(self) -> None:
        """All slots will be filled anew, and what stays has to be what the files have."""
        for slot in self._written_to():
            slot.forget_writes()
        if self.residents.scratch is not None:
            self.residents.scratch.forget_writes()
        self.residents.find_written()

    def _written_to(self) -> list[DeviceSlot]:
        return [*self.slots, self.scratch] if self.scratch is not None else self.slots

    def _stored(self, index: int, slot: DeviceSlot) -> Weights:
        mapped = self.residents.mapped.get(index)
        return slot.weights(self.layouts[index]) if mapped is None else mapped

    def wait_unused(self) -> None:
        """Block until the device has done all work on slots and resident layers."""
        if self.residents.weights:
            # No event tells what still reads them: they are never given back.
            self.device.wait_idle()
        for slot in self._written_to():
            slot.wait_unused()

    def free(self) -> None:
        """Give the host memory's page locks back. Idempotent."""
        for pool in self.host_pools:
            pool.arena.close()

    def _plan_slots(self, device: Slots, host: Slots, pools: Mapping[str, int]) -> dict[str, Slots]:
        """Slots by pool, in the order that layers pass through them: the plan's, where needed."""
        if not self.passes:
            return {}
        # Somebody may listen although nothing is streamed.
        count, nbytes = max(device.count, 1), device.nbytes
        viewed = self.residents.mapped
        fills = any(self.layouts[i].reads and i not in viewed for i in self.parts.counts)
        if self.in_place:
            return {"device": Slots(count, nbytes if fills else 0)}
        slots = dict[str, Slots]()
        if fills:
            slots = {name: Slots(n, host.nbytes) for name, n in pools.items()} or {"ring": host}
        return slots | {"device": Slots(count, nbytes)}

    def _build_pools(self, slots: Mapping[str, Slots], prefix: str, threads: int) -> None:
        for name, some in slots.items():
            if self.in_place or name != "device":
                sizes, pinned = [some.nbytes] * some.count, name in ("pinned", "ring")
                arena = HostArena(sizes, self.device, pinned=pinned, threads=threads)
                self.host_pools.append(HostPool(prefix + name, arena, self.device))
        own = slots.get("device", Slots(0, 0))
        memories = (
            self.host_pools[0].arena.slots
            if self.in_place and self.host_pools
            else device_slots(own.count, own.nbytes, self.device)
        )
        self.slots = [DeviceSlot(memory, self.device) for memory in memories]
        filled = [self.layouts[i] for i in self.passes if i not in self.residents.weights]
        nbytes = max((layout.scratch_nbytes for layout in filled), default=0)
        if nbytes:
            self.scratch = Scratch(allocate(nbytes, self.device), self.device)
