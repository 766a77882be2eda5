"""The clock of one pass: time stamps and events that the pipeline's threads fill as they work.

A pipeline holds a few clocks and takes them in turn, so that layers prefetched for the next pass
are stamped beside those of the pass that is reported. Nothing is allocated in steady state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..devices.device import Device, Event, Stream
from ..planning.layout import Layout, Step
from .stats import PassReport, Span, StepReport, report_step


@dataclass(frozen=True, slots=True)
class Routes:
    """The way of each step of a pass, by its index."""

    devices: tuple[Device, ...]
    device_of: tuple[int, ...]
    """Which of ``devices`` the step is handed out on."""
    read: frozenset[int]
    """Steps that are read from disk."""
    moved: frozenset[int]
    """Steps that a memcpy takes from pageable to pinned memory."""
    copied: frozenset[int]
    """Steps whose bytes are copied to their device, or moved within their slot."""
    limits: Callable[[], Mapping[str, float]] = dict
    """Called for each report. By kind of step ("read", "copy"), the measured limit in bytes a
    second, where it is known of how the bytes are moved by then."""

    @classmethod
    def of(
        cls,
        layouts: Sequence[Layout],
        devices: tuple[Device, ...],
        *,
        viewed: Container[int],
        two_pools: bool,
        limits: Callable[[], Mapping[str, float]],
    ) -> Routes:
        """The ways of steps that are laid out so, on devices that take turns.

        ``viewed``: those that are handed out where a mapped file has them.
        """
        read = frozenset(i for i, layout in enumerate(layouts) if layout.reads)
        return cls(
            devices=devices,
            device_of=tuple(i % len(devices) for i in range(len(layouts))),
            read=read,
            moved=frozenset(i for i in read if two_pools and i not in viewed),
            copied=frozenset(i for i, layout in enumerate(layouts) if layout.copies),
            limits=limits,
        )


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
        self.compute_begin = self._events()
        self.compute_end = self._events()
        # Times of events can be compared on one device only: each has a begin of its own.
        self._begins = [device.new_event() for device in routes.devices]
        self._end = routes.devices[0].new_event()
        self._begin_seconds = 0.0
        self.peak_slots = dict.fromkeys(pools, 0)

    def begin_copy(self, index: int, stream: Stream) -> None:
        """A step's first copy is to be enqueued on ``stream``. From the copier's thread."""
        self._part_seconds[index], self._part_nbytes[index] = 0.0, 0
        self.copy_begin[index].record(stream)

    def add_copy(self, index: int, nbytes: int, seconds: float) -> None:
        """The copies of a part of a step have ended. From the feeder's thread."""
        self._part_seconds[index] += seconds
        self._part_nbytes[index] += nbytes

    def start(self) -> None:
        """The pass begins, on the caller's current stream of every device."""
        # The pass that this clock was of is long over, unless its caller waits for nothing: then
        # it is waited for here, so that neither its stamps nor the device's queues overflow.
        self._end.synchronize()
        self._begin_seconds = time.perf_counter()
        for device, begin in zip(self._routes.devices, self._begins, strict=True):
            begin.record(device.current_stream())

    def stop(self) -> None:
        """The pass's last compute has been enqueued, and its result is on the first device."""
        self._end.record(self._routes.devices[0].current_stream())

    def report(self, layouts: Sequence[Layout]) -> PassReport:
        """What the stamps say; waits until the devices have done the pass."""
        self._end.synchronize()
        routes, steps = self._routes, dict[str, StepReport]()
        for name, indices, begins, ends in (
            ("read", routes.read, self.read_begin, self.read_end),
            ("memcpy", routes.moved, self.memcpy_begin, self.memcpy_end),
        ):
            if indices:
                nbytes = sum(layouts[index].read_nbytes for index in indices)
                spans = self._host_spans(sorted(indices), begins, ends)
                steps[name] = report_step(name, nbytes, spans)
        offsets = [self._offset(i) for i in range(len(routes.devices))]
        if routes.copied:
            nbytes = sum(layouts[index].copy_nbytes for index in routes.copied)
            copied = sorted(routes.copied)
            spans = self._spans(copied, self.copy_begin, self.copy_end, offsets)
            spans = [
                self._condense(i, span, layouts[i].copy_nbytes)
                for i, span in zip(copied, spans, strict=True)
            ]
            steps["copy"] = report_step("copy", nbytes, spans, offsets[0])
        every = range(len(self._steps))
        spans = self._spans(every, self.compute_begin, self.compute_end, offsets)
        nbytes = sum(step.nbytes for step in self._steps)
        steps["compute"] = report_step("compute", nbytes, spans, offsets[0])
        return PassReport(
            seconds=self._begins[0].elapsed_time(self._end) / 1e3,
            num_layers=len(self._steps),
            steps=steps,
            peak_slots={name: (self.peak_slots[name], n) for name, n in self._pools.items()},
            limits=routes.limits(),
        )

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
        return [devices[i].new_event() for i in self._routes.device_of]

    def _host_spans(
        self, indices: Iterable[int], begins: Sequence[float], ends: Sequence[float]
    ) -> list[Span]:
        origin = self._begin_seconds
        return [
            Span(self._steps[i].layer_idx, begins[i] - origin, ends[i] - origin) for i in indices
        ]

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
        begins: Sequence[Event],
        ends: Sequence[Event],
        offsets: Sequence[float],
    ) -> list[Span]:
        spans = []
        for i in indices:
            device_idx = self._routes.device_of[i]
            origin, offset = self._begins[device_idx], offsets[device_idx]
            begin = offset + origin.elapsed_time(begins[i]) / 1e3
            end = offset + origin.elapsed_time(ends[i]) / 1e3
            spans.append(Span(self._steps[i].layer_idx, begin, end))
        return spans
