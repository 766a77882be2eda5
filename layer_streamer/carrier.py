"""Disk to device by parts: threads of which each reads a part of a step and enqueues its copy.

What a thread has read, it sends on itself. Handing each part to another thread costs a wake-up,
which takes longer than all else that is done for a part; so threads meet no more than once a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .device import Stream
from .pieces import make_all_ready
from .ring import Crossing, Load, RingRun
from .schedule import Schedule
from .worker import Bell, Control, LaneRun, Run, Stage


class Carrier(Stage):
    """One of the threads. They take parts in order, and sleep where nothing can be read or sent.

    Guarantees: every part that is taken is dealt with, as an error of its step if need be, or its
    run is over; a step is complete when all its bytes are on their way to the device and its files
    are what they were when the checkpoint was opened; no slot of the ring is lost.
    """

    def __init__(
        self, name: str, control: Control, lane_idx: int, schedule: Schedule, crossing: Crossing
    ) -> None:
        super().__init__(name, control, lane_idx)
        self.copier_bell = Bell()
        self.reading = False
        """True from before a part is taken until it has been read."""
        self._schedule = schedule
        self._crossing = crossing
        self._stream: Stream | None = None

    def process(self, lane_run: LaneRun) -> None:
        assert isinstance(lane_run, RingRun)
        while self._await_work(lane_run):
            load = self._take_waiting(lane_run) or self._read_next(lane_run)
            if load is not None:
                self._send(lane_run, load)
        # Nobody sends them any more. Whoever leaves last has seen all there are.
        for load in self._drain(lane_run):
            self._crossing.ring.give_back(load.slot)

    def can_send(self, lane_run: RingRun) -> bool:
        """True if there is a part that has been read and may be sent by now."""
        return any(lane_run.may_send(load) for load in tuple(lane_run.waiting))

    def may_send(self, lane_run: RingRun, load: Load) -> bool:
        """True if a part that was just read may be sent."""
        return lane_run.may_send(load)

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

    def _await_work(self, lane_run: RingRun) -> bool:
        """Wait until there is a slot to read into or a part to send; False once the run is over."""
        run, ring = lane_run.run, self._crossing.ring

        def is_there() -> bool:
            return ring.can_take() or self.can_send(lane_run)

        if is_there():
            return not (run.aborted or self._control.closing)
        lane_run.asleep.add(self.bell)
        try:
            return self.await_true(run, is_there)
        finally:
            lane_run.asleep.discard(self.bell)

    def _take_waiting(self, lane_run: RingRun) -> Load | None:
        if not lane_run.waiting:
            return None
        with lane_run.lock:
            return lane_run.take_waiting()

    def _read_next(self, lane_run: RingRun) -> Load | None:
        """Read the next part; it, if it may be sent at once."""
        slot = self._crossing.ring.take()
        if slot is None:
            return None
        self.reading = True
        load = self._take(lane_run, slot)
        self._attempt(self._read, lane_run.run, load)
        self.reading = False
        with lane_run.lock:
            if self.may_send(lane_run, load):
                return load
            lane_run.waiting.append(load)
        return None

    def _take(self, lane_run: RingRun, slot: int) -> Load:
        run, schedule, crossing = lane_run.run, self._schedule, self._crossing
        with lane_run.lock:
            load = lane_run.take(slot)
            number, order = load.number, crossing.orders.read
            schedule.note_peak(run, number, order, crossing.ring.name, lane_run.held)
        if not load.place:
            schedule.clock(run, number).read_begin[schedule.index(number)] = time.perf_counter()
            self.copier_bell.ring()
        return load

    def _attempt(self, work: Callable[[Run, Load], None], run: Run, load: Load) -> None:
        """Do something for a part; an error is what its step's pass is to raise."""
        if load.number in run.failures:
            return
        try:
            work(run, load)
        except BaseException as error:
            run.failures.setdefault(load.number, error)

    def _read(self, run: Run, load: Load) -> None:
        index = self._schedule.index(load.number)
        self.wait_reusable(load.slot)
        pieces = self._crossing.pieces(load)
        make_all_ready(pieces, self._crossing.files, self._schedule.steps[index])
        # By several threads, without a lock: off by no more than a change of threads takes.
        self._schedule.clock(run, load.number).read_end[index] = time.perf_counter()

    def _send(self, lane_run: RingRun, load: Load) -> None:
        self._attempt(self._enqueue, lane_run.run, load)
        self._crossing.ring.give_back(load.slot)
        lane_run.wake()
        self.leave(lane_run, load.number)

    def _enqueue(self, run: Run, load: Load) -> None:
        stream = self._crossing.stream
        if stream is not self._stream:
            self._crossing.enter_thread(stream)
            self._stream = stream
        self._crossing.enqueue(load, self._schedule.clock(run, load.number), stream)

    def _drain(self, lane_run: RingRun) -> list[Load]:
        with lane_run.lock:
            loads, lane_run.waiting = lane_run.waiting, []
        return loads

    def _check_files(self, run: Run, number: int) -> None:
        reads = self._schedule.layouts[self._schedule.index(number)].reads
        try:
            self._crossing.files.check_unchanged({read.path for read in reads})
        except BaseException as error:
            run.failures.setdefault(number, error)
