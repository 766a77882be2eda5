"""Disk to device by parts: threads of which each reads a part of a step and enqueues its copy.

What a thread has read, it sends on itself. Handing each part to another thread costs a wake-up,
which takes longer than all else that is done for a part; so threads meet no more than once a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .device import Stream
from .pieces import make_all_ready
from .ring import Crossing, RingRun
from .schedule import Schedule
from .worker import Bell, Control, LaneRun, Run, Stage


class Carrier(Stage):
    """One of the threads. It has slots of the ring that no other touches.

    Guarantees: every part that is taken is dealt with, as an error of its step if need be, or its
    run is over; a step is complete when all its bytes are on their way to the device and its files
    are what they were when the checkpoint was opened.
    """

    def __init__(
        self,
        name: str,
        control: Control,
        lane_idx: int,
        schedule: Schedule,
        crossing: Crossing,
        slots: Sequence[int],
    ) -> None:
        """``slots``: of the ring, used in turn."""
        super().__init__(name, control, lane_idx)
        self.copier_bell = Bell()
        self.reading = False
        """True from before a part is taken until it has been read."""
        self._schedule = schedule
        self._crossing = crossing
        self._slots = tuple(slots)
        self._next_slot = 0
        self._stream: Stream | None = None

    def process(self, lane_run: LaneRun) -> None:
        assert isinstance(lane_run, RingRun)
        run = lane_run.run
        while not (run.aborted or self._control.closing):
            slot = self._slots[self._next_slot % len(self._slots)]
            self._next_slot += 1
            self.reading = True
            k, number = self._take(lane_run)
            self._attempt(self._read, run, k, number, slot)
            self.reading = False
            if not self.await_device_slot(lane_run, number):
                return
            self._attempt(self._send, run, k, number, slot)
            self.leave(lane_run, number)

    def await_device_slot(self, lane_run: RingRun, number: int) -> bool:
        """Wait until copies of the step may be enqueued."""
        n = self._crossing.orders.copied.before(number)
        return self.await_true(lane_run.run, lambda: lane_run.begun > n)

    def wait_reusable(self, slot: int) -> None:
        """Block until the device has read what it was to copy from the slot."""
        self._crossing.ring.wait_reusable(slot)

    def leave(self, lane_run: RingRun, number: int) -> None:
        """Count a part as dealt with; after a step's last one, its files are looked at."""
        with lane_run.lock:
            last = lane_run.leave(number)
        if not last:
            return
        if number not in lane_run.run.failures:
            self._check_files(lane_run.run, number)
        lane_run.complete.add(number)
        self.copier_bell.ring()

    def _take(self, lane_run: RingRun) -> tuple[int, int]:
        run, schedule, crossing = lane_run.run, self._schedule, self._crossing
        with lane_run.lock:
            k, number, first = lane_run.take()
            schedule.note_peak(run, number, crossing.orders.read, crossing.ring.name, lane_run.held)
        if first:
            schedule.clock(run, number).read_begin[schedule.index(number)] = time.perf_counter()
            self.copier_bell.ring()
        return k, number

    def _attempt(
        self, work: Callable[[Run, int, int, int], None], run: Run, k: int, number: int, slot: int
    ) -> None:
        """Do something for a part; an error is what its step's pass is to raise."""
        if number in run.failures:
            return
        try:
            work(run, k, number, slot)
        except BaseException as error:
            run.failures.setdefault(number, error)

    def _read(self, run: Run, k: int, number: int, slot: int) -> None:
        index = self._schedule.index(number)
        self.wait_reusable(slot)
        pieces = self._crossing.pieces(k, slot)
        make_all_ready(pieces, self._crossing.files, self._schedule.steps[index])
        # By several threads, without a lock: off by no more than a change of threads takes.
        self._schedule.clock(run, number).read_end[index] = time.perf_counter()

    def _send(self, run: Run, k: int, number: int, slot: int) -> None:
        stream = self._crossing.stream
        if stream is not self._stream:
            self._crossing.enter_thread(stream)
            self._stream = stream
        self._crossing.enqueue(k, number, slot, self._schedule.clock(run, number), stream)

    def _check_files(self, run: Run, number: int) -> None:
        reads = self._schedule.layouts[self._schedule.index(number)].reads
        try:
            self._crossing.files.check_unchanged({read.path for read in reads})
        except BaseException as error:
            run.failures.setdefault(number, error)
