"""Disk to host: a pool of reader threads, and the feeder that keeps them supplied.

Readers take jobs from one queue that crosses layer boundaries, so that the disk never sees the end
of a layer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from ..errors import StreamerError
from .files import OpenFiles
from .lane_memory import LaneMemory
from .parts import Extent, read_extent
from .stage import LaneRun, Post, Run, Stage


@dataclass(slots=True)
class Job:
    """What one reader thread does at a stretch: up to a chunk of a part's bytes."""

    lane_run: LaneRun
    k: int
    number: int
    """The step's, in its run."""
    slot: int
    first: bool
    """Of the step."""
    extents: Sequence[Extent]


class Reader:
    """Threads that fill host slots and count the parts that are there, in order.

    Ownership: ``_lock`` guards everything below it; ``_submitted`` is written by the feeder alone.
    Guarantees: every submitted job is finished, as an error if need be; a part counts as read when
    all its bytes are in the slot and its files are what they were when the checkpoint was opened.
    """

    def __init__(self, post: Post, memory: LaneMemory, files: OpenFiles) -> None:
        """``post``: the feeder's."""
        _, self.drained_bell, self.filled_bell = post.bells
        self._schedule = post.schedule
        self._memory = memory
        self._parts = memory.parts
        self._files = files
        self._control = post.control
        self._slots = memory.host_pools[0].arena.bytes
        self._residents = memory.residents
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._submitted = 0
        self._lock = threading.Lock()
        self._finished = 0
        self._pending = [0] * len(self._slots)
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

    def submit(self, lane_run: LaneRun, k: int, number: int) -> None:
        """Queue the reads of the lane's ``k``-th part from disk, of step ``number``, if that has
        not failed, and does not lie there.

        A job is made as it is queued, and gone when it is done.
        """
        place, part = self._parts.find(lane_run.orders, k, number)
        idle = number in lane_run.run.failures or lane_run.orders.kept(number)
        count = 0 if idle else part.num_jobs
        if not count:
            if not place:
                clock = self._schedule.clock(lane_run.run, number)
                clock.read_begin[self._schedule.index(lane_run.run, number)] = time.perf_counter()
            self._complete(lane_run, k, number)
            return
        slot = self._memory.read_slot(lane_run, k)
        self._pending[slot] = count
        self._submitted += count
        for j in range(count):
            self._queue.put(Job(lane_run, k, number, slot, not place and not j, part.job(j)))

    def stop(self) -> None:
        """Have the threads end after what they are at. Never blocks."""
        for _ in range(self._num_threads):
            self._queue.put(None)

    def _complete(self, lane_run: LaneRun, k: int, number: int) -> None:
        """All of a part's reads have ended, well or not: count it once those before it are."""
        clock = self._schedule.clock(lane_run.run, number)
        clock.read_end[self._schedule.index(lane_run.run, number)] = time.perf_counter()
        with self._lock:
            self._filled.add(k)
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
        try:
            if self._wants(run, number):
                self._read(run, job)
        except BaseException as error:
            run.fail(number, error)
        with self._lock:
            self._pending[job.slot] -= 1
            last = self._pending[job.slot] == 0
        if last:
            self._check_files(run, number)
            self._complete(job.lane_run, job.k, number)
        with self._lock:
            self._finished += 1
        if run.aborted:
            self.drained_bell.ring()

    def _read(self, run: Run, job: Job) -> None:
        index = self._schedule.index(run, job.number)
        if job.first:
            self._schedule.clock(run, job.number).read_begin[index] = time.perf_counter()
        mapped = index in self._residents.mapped
        slot = self._slots[job.slot]
        for extent in job.extents:
            try:
                if mapped:
                    self._residents.fault_in(extent)
                else:
                    read_extent(self._files, extent, slot)
            except StreamerError as error:
                raise type(error)(f"{self._describe(index, extent)}: {error}") from error

    def _check_files(self, run: Run, number: int) -> None:
        try:
            if self._wants(run, number):
                self._files.check_unchanged(self._schedule.paths[self._schedule.index(run, number)])
        except BaseException as error:
            run.fail(number, error)

    def _wants(self, run: Run, number: int) -> bool:
        # Nobody waits for the bytes of an aborted run; its slots may be filled again all the same.
        return not (run.aborted or self._control.closing or number in run.failures)

    def _describe(self, index: int, extent: Extent) -> str:
        """The layer, and the first tensor that has bytes in the extent."""
        step = self._schedule.steps[index]
        end = extent.offset + extent.wanted
        extents = (part for spec in step.tensors.values() for part in spec.extents)
        for spec in sorted(extents, key=lambda spec: spec.offset):
            inside = spec.offset < end and extent.offset < spec.offset + spec.nbytes
            if spec.path == extent.path and inside:
                return f"layer {step.layer_idx}, tensor {spec.name!r}"
        return f"layer {step.layer_idx}"


class Feeder(Stage):
    """The first stage: hands the reads of part after part to the readers, as slots come free.

    It is also the barrier between runs: it starts one only when every other stage of the lane has
    left the earlier ones and no read of theirs is in flight.
    """

    def __init__(
        self, post: Post, memory: LaneMemory, reader: Reader, others: Sequence[Stage]
    ) -> None:
        super().__init__("layer-streamer-feed", post)
        self._others = others
        self._memory = memory
        self._reader = reader
        self._pool = memory.host_pools[0]

    def process(self, lane_run: LaneRun) -> None:
        run = lane_run.run
        if not self.await_true(run, lambda: self._earlier_runs_left(run)):
            return
        self._reader.begin_run()
        k, order = 0, lane_run.orders.read
        while order.has(k) and self.await_slot(lane_run, k):
            number = order.number(k)
            try:
                self.wait_reusable(self._memory.read_slot(lane_run, k))
            except BaseException as error:
                run.fail(number, error)
            in_use = k + 1 - self.num_emptied(lane_run)
            self._schedule.note_peak(run, number, order, self._pool.name, in_use)
            self._reader.submit(lane_run, k, number)
            k += 1

    def num_emptied(self, lane_run: LaneRun) -> int:
        """How many of the lane's parts from disk have been taken out of the pool."""
        return self._memory.num_emptied(lane_run)

    def await_slot(self, lane_run: LaneRun, k: int) -> bool:
        """Wait until the part that had this slot before has been taken out of it."""
        count = self._pool.count
        return self.await_true(lane_run.run, lambda: self.num_emptied(lane_run) > k - count)

    def wait_reusable(self, slot: int) -> None:
        """Block until the device has read what it was to copy from the slot."""
        self._pool.wait_reusable(slot)

    def _earlier_runs_left(self, run: Run) -> bool:
        return all(stage.run is run for stage in self._others) and self._reader.idle()
