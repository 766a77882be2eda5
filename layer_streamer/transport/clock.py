"""The clock of one pass: time stamps and events that the pipeline's threads fill as they work.

A pipeline holds a few clocks and takes them in turn, so that layers prefetched for the next pass
are stamped beside those of the pass that is reported. Nothing is allocated in steady state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from ..devices.device import Device, Event, Stream
from ..planning.layout import Layout, Step
from .stats import PassReport, Span, report_step

T = TypeVar("T")


class Routes:
    """The way of each step of a pass, by its index, on devices that take turns. Immutable."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        devices: Sequence[Device],
        *,
        viewed: Container[int],
        two_pools: bool,
        limits: Callable[[], Mapping[str, float]],
    ) -> None:
        """``viewed``: steps that are handed out where a mapped file has them."""
        self.layouts = layouts
        self.devices = devices
        self.read = [i for i, layout in enumerate(layouts) if layout.reads]
        """Steps that are read from disk."""
        self.moved = [i for i in self.read if two_pools and i not in viewed]
        """Steps that a memcpy takes from pageable to pinned memory."""
        self.copied = [i for i, layout in enumerate(layouts) if layout.copies]
        """Steps whose bytes are copied to their device, or moved within their slot."""
        self.limits = limits
        """Called for each report. By kind of step ("read", "copy"), the measured limit in bytes a
        second, where it is known of how the bytes are moved by then."""


class PassClock:
    """Stamps of one pass of ``len(steps)`` steps.

    Ownership: each list is written by the one thread that does that step (reads: by the readers,
    under their lock), at the index of the step in the pass, before the step is handed on.
    """

    def __init__(self, steps: Sequence[Step], routes: Routes, pools: Mapping[str, int]) -> None:
        count = len(steps)
        self._steps = steps
        self._routes = routes
        self._pools = pools
        self.read_begin = [0.0] * count
        self.read_end = [0.0] * count
        self.memcpy_begin = [0.0] * count
        self.memcpy_end = [0.0] * count
        self.copy_begin = self._events()
        self.copy_end = self._events()
        self._part_seconds = [0.0] * count
        self._part_nbytes = [0] * count
        self.host_begin = [0.0] * count
        self.host_end = [0.0] * count
        self.compute_begin = self._events()
        self.compute_end = self._events()
        # Times of events can be compared on one device only: each has a begin of its own.
        self._begins = [device.new_event() for device in routes.devices]
        self._end = routes.devices[0].new_event()
        self._begin_seconds = 0.0
        self.peak_slots = dict.fromkeys(pools, 0)
        self._kept: Collection[int] = ()
        self._on_host: Collection[int] = ()

    def begin_copy(self, index: int, stream: Stream) -> None:
        """A step's first copy is to be enqueued on ``stream``. From the copier's thread."""
        self._part_seconds[index], self._part_nbytes[index] = 0.0, 0
        self.copy_begin[index].record(stream)

    def add_copy(self, index: int, nbytes: int, seconds: float) -> None:
        """The copies of a part of a step have ended. From the feeder's thread."""
        self._part_seconds[index] += seconds
        self._part_nbytes[index] += nbytes

    def start(self, kept: Collection[int] = (), on_host: Collection[int] = ()) -> None:
        """The pass begins, on the caller's current stream of every device. ``kept``: indices of
        steps that lie in their slots, ``on_host`` of those that are computed in host memory: for
        neither it brings anything."""
        # The pass that this clock was of is long over, unless its caller waits for nothing: then
        # it is waited for here, so that neither its stamps nor the device's queues overflow.
        self._end.synchronize()
        self._begin_seconds = time.perf_counter()
        self._kept, self._on_host = kept, on_host
        for device, begin in zip(self._routes.devices, self._begins, strict=True):
            begin.record(device.current_stream())

    def stop(self) -> None:
        """The pass's last compute has been enqueued, and its result is on the first device."""
        self._end.record(self._routes.devices[0].current_stream())

    def report(self) -> PassReport:
        """What the stamps say; waits until the devices have done the pass."""
        self._end.synchronize()
        routes, layouts = self._routes, self._routes.layouts
        offsets = [self._offset(i) for i in range(len(routes.devices))]

        def on_host(i: int, stamp: float) -> float:
            return stamp - self._begin_seconds

        def on_device(i: int, event: Event) -> float:
            at = i % len(offsets)
            return offsets[at] + self._begins[at].elapsed_time(event) / 1e3

        def from_there(i: int, stamp: float) -> float:
            # What the device was at by then, and the layer's input came from, is not its time.
            begin = max(on_host(i, stamp), on_device(i, self.compute_begin[i]))
            return min(begin, on_host(i, self.host_end[i]))

        there = sorted(self._on_host)
        here = [i for i in range(len(self._steps)) if i not in self._on_host]
        read, moved, copied = (
            [i for i in some if i not in self._kept and i not in self._on_host]
            for some in (routes.read, routes.moved, routes.copied)
        )
        reads = self._spans(read, self.read_begin, self.read_end, on_host)
        moves = self._spans(moved, self.memcpy_begin, self.memcpy_end, on_host)
        copies = self._spans(copied, self.copy_begin, self.copy_end, on_device)
        copies = [
            self._condense(i, span, layouts[i].copy_nbytes)
            for i, span in zip(copied, copies, strict=True)
        ]
        begins = [from_there(i, stamp) for i, stamp in enumerate(self.host_begin)] if there else []
        ends = [on_host(i, stamp) for i, stamp in enumerate(self.host_end)]
        hosted = self._spans(there, begins, ends, lambda i, seconds: seconds)
        computes = self._spans(here, self.compute_begin, self.compute_end, on_device)
        steps = (
            report_step("read", sum(layouts[i].read_nbytes for i in read), reads),
            report_step("memcpy", sum(layouts[i].read_nbytes for i in moved), moves),
            report_step("copy", sum(layouts[i].copy_nbytes for i in copied), copies, offsets[0]),
            report_step("host", self._weigh(there), hosted),
            report_step("compute", self._weigh(here), computes, offsets[0]),
        )
        return PassReport(
            seconds=self._begins[0].elapsed_time(self._end) / 1e3,
            num_layers=len(self._steps),
            steps={step.name: step for step in steps if step.spans},
            peak_slots={name: (self.peak_slots[name], n) for name, n in self._pools.items()},
            limits=routes.limits(),
        )

    def _weigh(self, indices: Iterable[int]) -> int:
        return sum(self._steps[i].nbytes for i in indices)

    def _condense(self, index: int, span: Span, nbytes: int) -> Span:
        """A step whose parts were copied as they came: as if all had been copied at the end.

        The last parts may not have been timed yet; they take as long as those that have.
        """
        timed = self._part_nbytes[index]
        if not timed:
            return span
        seconds = self._part_seconds[index] * nbytes / timed
        return replace(span, begin=max(span.begin, span.end - seconds))

    def _events(self) -> list[Event]:
        devices = self._routes.devices
        return [devices[i % len(devices)].new_event() for i in range(len(self._steps))]

    def _offset(self, device_idx: int) -> float:
        """Seconds from the pass's begin on the host's clock to its begin on a device's."""
        device = self._routes.devices[device_idx]
        now = device.new_event()  # of its own: two threads may ask at once
        now.record(device.current_stream())
        now.synchronize()
        since_begin = self._begins[device_idx].elapsed_time(now) / 1e3
        return time.perf_counter() - self._begin_seconds - since_begin

    def _spans(
        self,
        indices: Iterable[int],
        begins: Sequence[T],
        ends: Sequence[T],
        seconds: Callable[[int, T], float],
    ) -> list[Span]:
        """Of steps, from stamps that ``seconds`` puts on the host's clock, by the step's index."""
        return [
            Span(self._steps[i].layer_idx, seconds(i, begins[i]), seconds(i, ends[i]))
            for i in indices
        ]
