"""Slots of one tier and what must have ended before each may be filled again.

Slot n % count belongs to step n. A slot remembers, beyond the run that used it, the events of the
device work that still reads or writes it: that is what makes starting over safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..devices.device import Device, Stream
from ..planning.layout import Copy, Layout, View
from .clock import PassClock
from .memory import HostArena, Watch, view_tensor
from .weights import Weights


@dataclass(frozen=True, slots=True)
class Source:
    """Where a step's bytes lie in host memory, as they are copied."""

    copies: tuple[Copy, ...]
    parts: tuple[torch.Tensor, ...]
    """One uint8 tensor for each copy."""
    pinned: bool


def cut_parts(memory: torch.Tensor, extents: Iterable[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """A view of uint8 ``memory`` for each (offset, bytes). Not from a thread in inference mode."""
    return tuple(memory[offset : offset + nbytes] for offset, nbytes in extents)


def cut_source(
    memory: torch.Tensor, base: int, copies: tuple[Copy, ...], segment: int, *, pinned: bool
) -> Source:
    """What is copied out of a slot at ``base`` of ``memory``, which is pinned in segments.

    No copy crosses from one segment to the next.
    """
    split = tuple(part for copy in copies for part in _split_copy(copy, base, segment))
    if split == copies:
        split = copies  # the same object: what goes to the same places is looked up by it
    parts = cut_parts(memory, [(base + copy.src, copy.nbytes) for copy in split])
    return Source(split, parts, pinned)


def _split_copy(copy: Copy, base: int, segment: int) -> Iterator[Copy]:
    done = 0
    while done < copy.nbytes:
        start = copy.src + done
        nbytes = min(copy.nbytes - done, segment - (base + start) % segment)
        yield Copy(start, copy.dst + done, nbytes)
        done += nbytes


def view_all(memory: torch.Tensor, views: Iterable[View]) -> Weights:
    """A step's tensors in uint8 ``memory``."""
    return Weights({view.key: view_tensor(memory, view) for view in views})


class HostPool:
    """Host slots: filled by reads or memcpy, emptied by memcpy or by the device's copies.

    A slot holds a whole step, or, in a ring, a part of one. A ring is small enough to stay in the
    CPU's cache: a part is on its way to the device before it has gone to memory. Where a read is
    itself a copy (out of the page cache, or by a hypervisor), it is faster, too.

    Ownership: :meth:`copy_begins` and :meth:`copy_enqueued` are called by the thread that copies
    out of a slot, before it counts the part as done; :meth:`wait_reusable` by the thread that fills
    it, after it has seen that count. Between runs the feeder's barrier orders the two.
    """

    def __init__(self, name: str, arena: HostArena, device: Device) -> None:
        self.name = name
        self.arena = arena
        self.count = len(arena.slots)
        self._segment = device.pin_segment
        self._begun = [device.new_event() for _ in range(self.count)]
        self._copied = [device.new_event() for _ in range(self.count)]
        self._in_flight = [False] * self.count
        self._timed: list[tuple[PassClock, int, int] | None] = [None] * self.count
        self._sources: dict[tuple[int, int], Source] = {}

    def source(self, slot: int, copies: tuple[Copy, ...]) -> Source:
        """What is copied out of a slot; built once. From the copier's thread."""
        source = self._sources.get((slot, id(copies)))
        if source is None:
            base = self.arena.offsets[slot]
            source = cut_source(
                self.arena.memory, base, copies, self._segment, pinned=self.arena.pinned
            )
            self._sources[slot, id(copies)] = source
        return source

    def copy_begins(
        self, slot: int, nbytes: int, index: int, clock: PassClock, stream: Stream
    ) -> None:
        """Copies of ``nbytes`` out of a slot follow, a part of step ``index`` of the clock's pass.

        They are timed by themselves, since those of one step lie far apart.
        """
        self._begun[slot].record(stream)
        self._timed[slot] = (clock, index, nbytes)

    def copy_enqueued(self, slot: int, stream: Stream) -> None:
        """Device work that reads the slot has been enqueued on ``stream``."""
        self._copied[slot].record(stream)
        self._in_flight[slot] = True

    def wait_reusable(self, slot: int) -> None:
        """Block until the device has read all that was enqueued from the slot."""
        if self._in_flight[slot]:
            self._copied[slot].synchronize()
            self._in_flight[slot] = False
        timed, self._timed[slot] = self._timed[slot], None
        if timed is not None:
            clock, index, nbytes = timed
            seconds = self._begun[slot].elapsed_time(self._copied[slot]) / 1e3
            clock.add_copy(index, nbytes, seconds)


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
        self._watch = Watch([memory])
        self._weights: dict[int, Weights] = {}
        self._parts: dict[tuple[tuple[int, int], ...], tuple[torch.Tensor, ...]] = {}
        self._parts_by_id: dict[int, tuple[torch.Tensor, ...]] = {}

    def record_uses(self, current: Stream) -> None:
        """The caller's work on this slot is enqueued, on the hand-out's stream or ``current``."""
        handed_on = self.handed_on if self.handed_on is not None else current
        self._uses[0].record(handed_on)
        if handed_on == current:
            self._num_uses = 1
            return
        self._uses[1].record(current)
        self._num_uses = 2

    def order_after_uses(self, stream: Stream) -> None:
        """Let ``stream`` wait for the caller's work on this slot."""
        for event in self._uses[: self._num_uses]:
            event.wait(stream)

    def wait_unused(self) -> None:
        """Block until the caller's work on this slot has ended."""
        for event in self._uses[: self._num_uses]:
            event.synchronize()

    def parts(self, copies: tuple[Copy, ...]) -> tuple[torch.Tensor, ...]:
        """Where each copy goes; built once. From the copier's thread."""
        parts = self._parts_by_id.get(id(copies))
        if parts is None:
            extents = tuple((copy.dst, copy.nbytes) for copy in copies)
            # Layers of one shape lie at different phases of the file, but go to the same places.
            parts = self._parts.get(extents)
            if parts is None:
                parts = self._parts[extents] = cut_parts(self.memory, extents)
            self._parts_by_id[id(copies)] = parts
        return parts

    def weights(self, layout: Layout) -> Weights:
        """The step's tensors in this slot, as stored; built once, then kept."""
        weights = self._weights.get(id(layout.views))
        if weights is None:
            (memory,) = self._watch.memory
            weights = view_all(memory, layout.views)
            self._weights[id(layout.views)] = weights
        return weights

    def expire(self, layout: Layout) -> bool:
        """The step's hand-out has ended; True if the caller has written to its tensors."""
        weights = self._weights.get(id(layout.views))
        if weights is not None and weights.wants_grad():
            # The next layer's gradients are not to be added to these.
            self._weights[id(layout.views)] = weights.without_grad()
        return self._watch.expire()

    def forget_writes(self) -> None:
        """It is going to be filled anew, or cast into. From the caller's thread."""
        self._watch.forget()


class _Cast(NamedTuple):
    """A step's tensors with cast ones among them."""

    weights: Weights
    stored: Weights
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Where each tensor is cast to, and from where."""


class Scratch(DeviceSlot):
    """The device's one slot for cast tensors: written at hand-out, free at release.

    Ownership: the caller's thread. Its stream may change between layers, so each use is ordered
    after the last one.
    """

    def __init__(self, memory: torch.Tensor, device: Device) -> None:
        super().__init__(memory, device)
        self._device = device
        self._cast: dict[tuple[int, int], _Cast] = {}

    def cast(self, stored: Weights, layout: Layout, stream: Stream) -> Weights:
        """Enqueue the casts of a step on the caller's current stream; its tensors, cast."""
        self.order_after_uses(stream)
        self.handed_on = stream
        key = (id(stored), id(layout.casts))
        kept = self._cast.get(key)
        if kept is None:
            (memory,) = self._watch.memory
            cast, targets = view_all(memory, layout.casts), view_all(self.memory, layout.casts)
            pairs = [(targets[view.key], stored[view.key]) for view in layout.casts]
            # The stored ones are kept as well, so that no other can take their place as the key.
            kept = self._cast[key] = _Cast(Weights({**stored, **cast}), stored, tuple(pairs))
        for target, source in kept.copies:
            self._device.copy(target, source)
        return kept.weights

    def expire_cast(self, stored: Weights, layout: Layout) -> bool:
        """The step's hand-out has ended; True if the caller has written to its cast tensors."""
        key = (id(stored), id(layout.casts))
        if key in self._cast and self._cast[key].weights.wants_grad():
            del self._cast[key]
        return self._watch.expire()
