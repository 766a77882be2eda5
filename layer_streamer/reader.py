"""Disk to host: a pool of reader threads, and the feeder that keeps them supplied.

Readers take pieces of (file, offset, destination) from one queue that crosses layer boundaries, so
that the disk never sees the end of a layer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from .errors import StreamerError
from .files import OpenFiles
from .layout import Read
from .pool import HostPool
from .schedule import Schedule
from .worker import Bell, Control, Run, Stage


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that one call reads into a slot."""

    path: Path
    offset: int
    view: memoryview


@dataclass(slots=True)
class Job:
    """What one reader thread does at a stretch: up to a chunk of one step's bytes."""

    run: Run
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
        self, schedule: Schedule, files: OpenFiles, control: Control, threads: int, slots: int
    ) -> None:
        self.filled_bell = Bell()
        self.drained_bell = Bell()
        self._schedule = schedule
        self._files = files
        self._control = control
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._submitted = 0
        self._lock = threading.Lock()
        self._finished = 0
        self._pending = [0] * slots
        self._filled: set[int] = set()
        self._threads = [
            threading.Thread(target=self._loop, name=f"layer-streamer-read-{i}", daemon=True)
            for i in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def begin_run(self) -> None:
        """Forget the steps of earlier runs; all their jobs are finished."""
        with self._lock:
            self._filled.clear()

    def idle(self) -> bool:
        """True if every submitted job is finished."""
        return self._finished == self._submitted

    def submit(self, run: Run, number: int, jobs: Sequence[Sequence[Piece]]) -> None:
        """Queue the reads of a step; its slot is free."""
        clock, index = self._schedule.clock(run, number), self._schedule.index(number)
        if not jobs:
            clock.read_begin[index] = time.perf_counter()
            self.complete(run, number)
            return
        self._pending[number % len(self._pending)] = len(jobs)
        self._submitted += len(jobs)
        for i, pieces in enumerate(jobs):
            self._queue.put(Job(run, number, i == 0, pieces))

    def complete(self, run: Run, number: int) -> None:
        """All of a step's reads have ended, well or not: count it once those before it are."""
        clock, index = self._schedule.clock(run, number), self._schedule.index(number)
        clock.read_end[index] = time.perf_counter()
        with self._lock:
            self._filled.add(number)
            while run.read.done in self._filled:
                self._filled.remove(run.read.done)
                run.read.advance()
        self.filled_bell.ring()

    def close(self, seconds: float) -> list[str]:
        """Stop the threads; the names of those that still run after ``seconds``."""
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + seconds
        alive = []
        for thread in self._threads:
            if thread is threading.current_thread() or thread.ident is None:
                continue
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                alive.append(thread.name)
        return alive

    def _loop(self) -> None:
        try:
            while (job := self._queue.get()) is not None:
                self._do(job)
                del job  # an idle thread must not keep a run (and a slot) alive
        except BaseException as error:
            self._control.fail(error)

    def _do(self, job: Job) -> None:
        run, number = job.run, job.number
        # Nobody waits for the bytes of an aborted run; its slots may be filled again all the same.
        if not (run.aborted or self._control.closing or number in run.failures):
            try:
                self._read(job)
            except BaseException as error:
                run.failures.setdefault(number, error)
        with self._lock:
            slot = number % len(self._pending)
            self._pending[slot] -= 1
            last = self._pending[slot] == 0
        if last:
            self._check_files(run, number)
            self.complete(run, number)
        with self._lock:
            self._finished += 1
        if run.aborted:
            self.drained_bell.ring()

    def _read(self, job: Job) -> None:
        index = self._schedule.index(job.number)
        if job.first:
            self._schedule.clock(job.run, job.number).read_begin[index] = time.perf_counter()
        for piece in job.pieces:
            try:
                self._files.read_into(piece.path, piece.view, piece.offset)
            except StreamerError as error:
                raise type(error)(f"{self._describe(index, piece)}: {error}") from error

    def _check_files(self, run: Run, number: int) -> None:
        if run.aborted or self._control.closing or number in run.failures:
            return
        index = self._schedule.index(number)
        try:
            paths = {read.path for read in self._schedule.layouts[index].reads}
            self._files.check_unchanged(paths)
        except BaseException as error:
            run.failures.setdefault(number, error)

    def _describe(self, index: int, piece: Piece) -> str:
        """The layer, and the tensor that the piece's first byte belongs to."""
        step = self._schedule.steps[index]
        for spec in step.tensors.values():
            inside = spec.offset <= piece.offset < spec.offset + spec.nbytes
            if spec.path == piece.path and inside:
                return f"layer {step.layer_idx}, tensor {spec.name!r}"
        return f"layer {step.layer_idx}"


class Feeder(Stage):
    """The first stage: hands the reads of step after step to the readers, as slots come free.

    It is also the barrier between runs: it starts one only when every other stage has left the
    earlier ones and no read of theirs is in flight.
    """

    def __init__(
        self,
        control: Control,
        schedule: Schedule,
        reader: Reader,
        pool: HostPool,
        freed: Callable[[Run], int],
        read_chunk: int,
    ) -> None:
        super().__init__("layer-streamer-feed", control)
        self.others: Sequence[Stage] = ()
        self._schedule = schedule
        self._reader = reader
        self._pool = pool
        self._freed = freed
        self._read_chunk = read_chunk
        self._jobs: dict[tuple[int, int], list[list[Piece]]] = {}

    def process(self, run: Run) -> None:
        if not self.await_true(run, lambda: self._earlier_runs_left(run)):
            return
        self._reader.begin_run()
        number = 0
        while self.await_slot(run, number):
            slot = number % self._pool.count
            try:
                self.wait_reusable(slot)
                self._note_peak(run, number)
                jobs = self._jobs_of(self._schedule.index(number), slot)
            except BaseException as error:
                run.failures.setdefault(number, error)
                jobs = []
            self._reader.submit(run, number, jobs)
            number += 1

    def await_slot(self, run: Run, number: int) -> bool:
        """Wait until the step that had this slot before has been taken out of it."""
        return self.await_true(run, lambda: self._freed(run) > number - self._pool.count)

    def wait_reusable(self, slot: int) -> None:
        """Block until the device has read what it was to copy from the slot."""
        self._pool.wait_reusable(slot)

    def _earlier_runs_left(self, run: Run) -> bool:
        return all(stage.run is run for stage in self.others) and self._reader.idle()

    def _note_peak(self, run: Run, number: int) -> None:
        self._schedule.note_peak(run, number, self._pool.name, number + 1 - self._freed(run))

    def _jobs_of(self, index: int, slot: int) -> list[list[Piece]]:
        key = (index, slot)
        jobs = self._jobs.get(key)
        if jobs is None:
            reads = self._schedule.layouts[index].reads
            jobs = cut_into_jobs(reads, self._pool.arena.bytes[slot], self._read_chunk)
            self._jobs[key] = jobs
        return jobs


def cut_into_jobs(reads: Sequence[Read], slot: memoryview, chunk: int) -> list[list[Piece]]:
    """Split a step's reads into jobs of at most ``chunk`` bytes; small reads share a job."""
    jobs: list[list[Piece]] = []
    room = 0
    for read in reads:
        done = 0
        while done < read.nbytes:
            if room == 0:
                jobs.append([])
                room = chunk
            nbytes = min(room, read.nbytes - done)
            start = read.slot_offset + done
            jobs[-1].append(Piece(read.path, read.offset + done, slot[start : start + nbytes]))
            done += nbytes
            room -= nbytes
    return jobs
