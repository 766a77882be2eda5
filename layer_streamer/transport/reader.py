"""Disk to host: a pool of reader threads, and the feeder that keeps them supplied.

Readers take pieces of (file, offset, destination) from one queue that crosses layer boundaries, so
that the disk never sees the end of a layer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from ..errors import StreamerError
from .files import OpenFiles
from .pieces import Piece
from .pool import HostPool
from .schedule import Order, Schedule
from .stage import Bell, Control, LaneRun, Run, Stage


@dataclass(slots=True)
class Job:
    """What one reader thread does at a stretch: up to a chunk of one step's bytes."""

    lane_run: LaneRun
    n: int
    number: int
    first: bool
    pieces: Sequence[Piece]


class Reader:
    """Threads that fill host slots and count finished steps, in order.

    Ownership: ``_lock`` guards everything below it; ``_submitted`` is written by the feeder alone.
    Guarantees: every submitted job is finished, as an error if need be; a step counts as read when
    all its bytes are in the slot and its files are what they were when the checkpoint was opened.
    """

    def __init__(
        self, schedule: Schedule, order: Order, files: OpenFiles, control: Control, slots: int
    ) -> None:
        self.filled_bell = Bell()
        self.drained_bell = Bell()
        self._schedule = schedule
        self._order = order
        self._files = files
        self._control = control
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._submitted = 0
        self._lock = threading.Lock()
        self._finished = 0
        self._pending = [0] * slots
        self._filled: set[int] = set()
        self._num_threads = 0

    def start(self, threads: int) -> None:
        """Start that many threads."""
        self._num_threads = threads
        for i in range(threads):
            name = f"layer-streamer-read-{i}"
            self._control.start(threading.Thread(target=self._loop, name=name, daemon=True))

    def begin_run(self) -> None:
        """Forget the steps of earlier runs; all their jobs are finished."""
        with self._lock:
            self._filled.clear()

    def idle(self) -> bool:
        """True if every submitted job is finished."""
        return self._finished == self._submitted

    def submit(self, lane_run: LaneRun, n: int, jobs: Sequence[Sequence[Piece]]) -> None:
        """Queue the reads of the lane's ``n``-th step from disk; its slot is free."""
        number = self._order.number(n)
        begins = self._order.before(number) == n
        if not jobs:
            if begins:
                clock = self._schedule.clock(lane_run.run, number)
                clock.read_begin[self._schedule.index(number)] = time.perf_counter()
            self._complete(lane_run, n, number)
            return
        self._pending[n % len(self._pending)] = len(jobs)
        self._submitted += len(jobs)
        for i, pieces in enumerate(jobs):
            self._queue.put(Job(lane_run, n, number, begins and i == 0, pieces))

    def stop(self) -> None:
        """Have the threads end after what they are at. Never blocks."""
        for _ in range(self._num_threads):
            self._queue.put(None)

    def _complete(self, lane_run: LaneRun, n: int, number: int) -> None:
        """All of a step's reads have ended, well or not: count it once those before it are."""
        clock = self._schedule.clock(lane_run.run, number)
        clock.read_end[self._schedule.index(number)] = time.perf_counter()
        with self._lock:
            self._filled.add(n)
            while True:
                if lane_run.read.done not in self._filled:
                    break
                self._filled.remove(lane_run.read.done)
                lane_run.read.advance()
        self.filled_bell.ring()

    def _loop(self) -> None:
        try:
            while True:
                job = self._queue.get()
                if job is None:
                    break
                self._do(job)
                del job  # an idle thread must not keep a run (and a slot) alive
        except BaseException as error:
            self._control.fail(error)
        self._control.leave()

    def _do(self, job: Job) -> None:
        run, number = job.lane_run.run, job.number
        # Nobody waits for the bytes of an aborted run; its slots may be filled again all the same.
        if not (run.aborted or self._control.closing or number in run.failures):
            try:
                self._read(run, job)
            except BaseException as error:
                run.fail(number, error)
        with self._lock:
            slot = job.n % len(self._pending)
            self._pending[slot] -= 1
            last = self._pending[slot] == 0
        if last:
            self._check_files(run, number)
            self._complete(job.lane_run, job.n, number)
        with self._lock:
            self._finished += 1
        if run.aborted:
            self.drained_bell.ring()

    def _read(self, run: Run, job: Job) -> None:
        index = self._schedule.index(job.number)
        if job.first:
            self._schedule.clock(run, job.number).read_begin[index] = time.perf_counter()
        for piece in job.pieces:
            try:
                piece.make_ready(self._files)
            except StreamerError as error:
                raise type(error)(f"{self._describe(index, piece)}: {error}") from error

    def _check_files(self, run: Run, number: int) -> None:
        if run.aborted or self._control.closing or number in run.failures:
            return
        try:
            self._files.check_unchanged(self._schedule.paths[self._schedule.index(number)])
        except BaseException as error:
            run.fail(number, error)

    def _describe(self, index: int, piece: Piece) -> str:
        """The layer, and the first tensor that has bytes in the piece."""
        step = self._schedule.steps[index]
        end = piece.offset + piece.wanted
        for spec in sorted(step.tensors.values(), key=lambda spec: spec.offset):
            inside = spec.offset < end and piece.offset < spec.offset + spec.nbytes
            if spec.path == piece.path and inside:
                return f"layer {step.layer_idx}, tensor {spec.name!r}"
        return f"layer {step.layer_idx}"


class Feeder(Stage):
    """The first stage: hands the reads of step after step to the readers, as slots come free.

    It is also the barrier between runs: it starts one only when every other stage of the lane has
    left the earlier ones and no read of theirs is in flight.
    """

    def __init__(
        self,
        control: Control,
        lane_idx: int,
        schedule: Schedule,
        order: Order,
        reader: Reader,
        pool: HostPool,
    ) -> None:
        super().__init__("layer-streamer-feed", control, lane_idx)
        self.others: Sequence[Stage] = ()
        self.num_emptied: Callable[[LaneRun], int] = lambda lane_run: 0
        """How many of the lane's steps from disk have been taken out of the pool."""
        self.jobs: Callable[[int, int, int], Sequence[Sequence[Piece]]] = lambda n, index, slot: []
        """The reads that bring the lane's ``n``-th step or part, of step ``index``, into a slot."""
        self._schedule = schedule
        self._order = order
        self._reader = reader
        self._pool = pool

    def process(self, lane_run: LaneRun) -> None:
        run = lane_run.run
        if not self.await_true(run, lambda: self._earlier_runs_left(run)):
            return
        self._reader.begin_run()
        n = 0
        while self.await_slot(lane_run, n):
            number = self._order.number(n)
            slot = n % self._pool.count
            try:
                self.wait_reusable(slot)
                in_use = n + 1 - self.num_emptied(lane_run)
                self._schedule.note_peak(run, number, self._order, self._pool.name, in_use)
                jobs = self.jobs(n, self._schedule.index(number), slot)
            except BaseException as error:
                run.fail(number, error)
                jobs = []
            self._reader.submit(lane_run, n, jobs)
            n += 1

    def await_slot(self, lane_run: LaneRun, n: int) -> bool:
        """Wait until the step that had this slot before has been taken out of it."""
        count = self._pool.count
        return self.await_true(lane_run.run, lambda: self.num_emptied(lane_run) > n - count)

    def wait_reusable(self, slot: int) -> None:
        """Block until the device has read what it was to copy from the slot."""
        self._pool.wait_reusable(slot)

    def _earlier_runs_left(self, run: Run) -> bool:
        return all(stage.run is run for stage in self.others) and self._reader.idle()
