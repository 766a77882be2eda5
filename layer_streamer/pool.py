"""Slots of one tier and what must have ended before each may be filled again.

Slot n % count belongs to step n. A slot remembers, beyond the run that used it, the events of the
device work that still reads or writes it: that is what makes starting over safe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from .device import Device, Stream
from .layout import Layout
from .memory import HostArena, view_tensor


class Weights(dict[str, torch.Tensor]):
    """One layer's tensors by key, read-only. Views of a slot: gone when the hand-out ends."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a layer's weights are read-only; copy the dict to change it")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


class HostPool:
    """Host slots: filled by reads or memcpy, emptied by memcpy or by the device's copies.

    Ownership: :meth:`copy_enqueued` is called by the thread that copies out of a slot, before it
    counts the step as done; :meth:`wait_reusable` by the thread that fills it, after it has seen
    that count. Between runs the feeder's barrier orders the two.
    """

    def __init__(self, name: str, arena: HostArena, device: Device) -> None:
        self.name = name
        self.arena = arena
        self.count = len(arena.slots)
        self._copied = [device.new_event() for _ in range(self.count)]
        self._in_flight = [False] * self.count

    def copy_enqueued(self, slot: int, stream: Stream) -> None:
        """Device work that reads the slot has been enqueued on ``stream``."""
        self._copied[slot].record(stream)
        self._in_flight[slot] = True

    def wait_reusable(self, slot: int) -> None:
        """Block until the device has read all that was enqueued from the slot."""
        if self._in_flight[slot]:
            self._copied[slot].synchronize()
            self._in_flight[slot] = False

    def wait_all(self) -> None:
        """Block until no slot is read by the device."""
        for slot in range(self.count):
            self.wait_reusable(slot)


class DeviceSlot:
    """One slot on the device.

    Ownership: ``ready`` is recorded by the copier before it hands the step on; the uses by the
    caller's thread before it releases the step (or, when a pass is aborted, before it publishes
    the next run). Each reader of an event has seen the count that its record precedes.
    """

    def __init__(self, memory: torch.Tensor, device: Device) -> None:
        self.memory = memory
        self.ready = device.new_event()
        self.handed_on: Stream | None = None
        self._uses = (device.new_event(), device.new_event())
        self._num_uses = 0
        self._weights: dict[int, Weights] = {}

    def record_uses(self, current: Stream) -> None:
        """The caller's work on this slot is enqueued, on the hand-out's stream or ``current``."""
        handed_on = self.handed_on if self.handed_on is not None else current
        self._uses[0].record(handed_on)
        self._uses[1].record(current)
        self._num_uses = 1 if handed_on == current else 2

    def order_after_uses(self, stream: Stream) -> None:
        """Let ``stream`` wait for the caller's work on this slot."""
        for event in self._uses[: self._num_uses]:
            stream.wait_event(event)

    def wait_unused(self) -> None:
        """Block until the caller's work on this slot has ended."""
        for event in self._uses[: self._num_uses]:
            event.synchronize()

    def weights(self, layout: Layout, scratch: torch.Tensor | None) -> Weights:
        """The step's tensors in this slot (cast ones: in ``scratch``); built once, then kept."""
        key = id(layout.views)
        weights = self._weights.get(key)
        if weights is None:
            weights = self._weights[key] = Weights(self._build(layout, scratch))
        return weights

    def stored(self, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the step as it is stored in this slot, with its key."""
        for view in layout.views:
            yield (
                view.key,
                view_tensor(self.memory, view.offset, view.nbytes, view.dtype, view.shape),
            )

    def _build(self, layout: Layout, scratch: torch.Tensor | None) -> dict[str, torch.Tensor]:
        tensors = dict(self.stored(layout))
        for cast in layout.casts if scratch is not None else ():
            assert scratch is not None
            tensors[cast.key] = view_tensor(
                scratch, cast.offset, cast.nbytes, cast.dtype, cast.shape
            )
        return tensors


class Scratch:
    """The device's one slot for cast tensors: written at hand-out, free at release.

    Ownership: the caller's thread. Its stream may change between layers, so each use is ordered
    after the last one.
    """

    def __init__(self, memory: torch.Tensor, device: Device) -> None:
        self.memory = memory
        self._device = device
        self._slot = DeviceSlot(memory, device)
        self._pairs: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def cast(self, slot: DeviceSlot, layout: Layout, stream: Stream) -> None:
        """Enqueue the casts of a step on the caller's current stream."""
        self.order_after_uses(stream)
        self._slot.handed_on = stream
        key = (id(slot), id(layout.views))
        pairs = self._pairs.get(key)
        if pairs is None:
            stored, weights = dict(slot.stored(layout)), slot.weights(layout, self.memory)
            pairs = [(weights[cast.key], stored[cast.key]) for cast in layout.casts]
            self._pairs[key] = pairs
        for target, source in pairs:
            self._device.copy(target, source)

    def order_after_uses(self, stream: Stream) -> None:
        """Let ``stream`` wait for the caller's work on the last step's cast tensors."""
        self._slot.order_after_uses(stream)

    def record_uses(self, current: Stream) -> None:
        """The caller's work on the cast tensors has been enqueued."""
        self._slot.record_uses(current)

    def wait_unused(self) -> None:
        """Block until the caller's work on the scratch slot has ended."""
        self._slot.wait_unused()


class DevicePool:
    """The device slots."""

    def __init__(self, memories: list[torch.Tensor], device: Device) -> None:
        self.slots = [DeviceSlot(memory, device) for memory in memories]
        self.count = len(self.slots)
        self.nbytes = sum(memory.nbytes for memory in memories)

    def wait_all(self) -> None:
        """Block until the caller's work on every slot has ended."""
        for slot in self.slots:
            slot.wait_unused()
