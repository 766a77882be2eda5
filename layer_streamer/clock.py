"""The clock of one pass: time stamps and events that the pipeline's threads fill as they work.

A pipeline holds a few clocks and takes them in turn, so that layers prefetched for the next pass
are stamped beside those of the pass that is reported. Nothing is allocated in steady state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from .device import Device, Event
from .layout import Layout, Step
from .stats import PassReport, Span, StepReport, report_step


class PassClock:
    """Stamps of one pass of ``len(steps)`` steps.

    Ownership: each list is written by the one thread that does that step (reads: by the readers,
    under their lock), at the index of the step in the pass, before the step is handed on.
    """

    def __init__(self, steps: Sequence[Step], device: Device, pools: Mapping[str, int]) -> None:
        count = len(steps)
        self._steps = steps
        self._device = device
        self._pools = pools
        self.read_begin = [0.0] * count
        self.read_end = [0.0] * count
        self.memcpy_begin = [0.0] * count
        self.memcpy_end = [0.0] * count
        self.copy_begin = [device.new_event() for _ in range(count)]
        self.copy_end = [device.new_event() for _ in range(count)]
        self.compute_begin = [device.new_event() for _ in range(count)]
        self.compute_end = [device.new_event() for _ in range(count)]
        self.begin = device.new_event()
        self.end = device.new_event()
        self._now = device.new_event()
        self.begin_seconds = 0.0
        self.peak_slots = dict.fromkeys(pools, 0)

    def start(self) -> None:
        """The pass begins, on the caller's current stream."""
        self.begin_seconds = time.perf_counter()
        self.begin.record(self._device.current_stream())

    def stop(self) -> None:
        """The pass's last compute has been enqueued."""
        self.end.record(self._device.current_stream())

    def report(self, layouts: Sequence[Layout]) -> PassReport:
        """What the stamps say; waits until the device has done the pass."""
        self.end.synchronize()
        steps = {"read": self._report_host("read", self.read_begin, self.read_end, layouts)}
        if "pinned" in self._pools and "host" in self._pools:
            steps["memcpy"] = self._report_host(
                "memcpy", self.memcpy_begin, self.memcpy_end, layouts
            )
        offset = self._device_offset()
        if any(layout.copies for layout in layouts):
            spans = self._spans(self.copy_begin, self.copy_end, offset)
            nbytes = sum(layout.copy_nbytes for layout in layouts)
            steps["copy"] = report_step("copy", nbytes, spans, offset)
        spans = self._spans(self.compute_begin, self.compute_end, offset)
        nbytes = sum(step.nbytes for step in self._steps)
        steps["compute"] = report_step("compute", nbytes, spans, offset)
        return PassReport(
            seconds=self.begin.elapsed_time(self.end) / 1e3,
            num_layers=len(self._steps),
            steps=steps,
            peak_slots={name: (self.peak_slots[name], n) for name, n in self._pools.items()},
        )

    def _report_host(
        self, name: str, begins: Sequence[float], ends: Sequence[float], layouts: Sequence[Layout]
    ) -> StepReport:
        origin = self.begin_seconds
        spans = [
            Span(step.layer_idx, begin - origin, end - origin)
            for step, begin, end in zip(self._steps, begins, ends, strict=True)
        ]
        return report_step(name, sum(layout.read_nbytes for layout in layouts), spans)

    def _device_offset(self) -> float:
        """Seconds from the pass's begin on the host's clock to its begin on the device's."""
        self._now.record(self._device.current_stream())
        self._now.synchronize()
        since_begin = self.begin.elapsed_time(self._now) / 1e3
        return time.perf_counter() - self.begin_seconds - since_begin

    def _spans(self, begins: Sequence[Event], ends: Sequence[Event], offset: float) -> list[Span]:
        return [
            Span(
                step.layer_idx,
                offset + self.begin.elapsed_time(begin) / 1e3,
                offset + self.begin.elapsed_time(end) / 1e3,
            )
            for step, begin, end in zip(self._steps, begins, ends, strict=True)
        ]
