"""Brings bytes of files to memory again and again, by threads and page-locked memory that stay."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from ..devices.device import Device, Event, Stream
from ..errors import ClosedError, StreamerError
from ..planning.layout import PAGE, align_up
from .files import OpenFiles
from .memory import HostArena
from .stage import Bell, Control

SLOTS_PER_THREAD = 2
"""One that is being filled, one that is being copied."""


def staging_nbytes(threads: int, chunk: int) -> int:
    """Host memory that a :class:`Fetcher` passes bytes through."""
    return sum(_staging(threads, chunk))


def _staging(threads: int, chunk: int) -> list[int]:
    return [align_up(chunk, PAGE) + 2 * PAGE] * (threads * SLOTS_PER_THREAD)


class Piece(NamedTuple):
    """Bytes of a read, and where they go."""

    src: int
    """From the read's first byte on."""
    dst: int
    """From the place on that the read is brought to."""
    nbytes: int


class Fetch(NamedTuple):
    """What one thread reads at a stretch: no more than a chunk of a file."""

    path: Path
    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]
    name: str
    """Whose bytes they are, for errors."""


class Fetcher:
    """Threads that read, and copy what they have read on the way to a device.

    One thread begins and waits, one work after the other; an interrupt may leave it anywhere. Then
    the next wait ends the work, and says that it was not done. Nothing is taken after opening but
    the list of what is to be read: each thread has two places of a chunk in page-locked memory,
    which a copy leaves before they are filled again. Where bytes are used in host memory, and reads
    are not direct, they are read in place. Reads have ended before :meth:`Pipeline.close` frees
    anything, for the threads are the pipeline's.
    """

    def __init__(
        self, files: OpenFiles, device: Device, control: Control, threads: int, chunk: int
    ) -> None:
        """``chunk``: of bytes, no fetch has more. Nothing runs before :meth:`start`."""
        self._files, self._device, self._control = files, device, control
        self._threads, self._pid = threads, os.getpid()
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._work: _Work | None = None
        self.arena: HostArena | None = None
        """What bytes pass through; its owner closes it when the device has read it."""
        self._benches: list[_Bench] = []
        if not device.unified or files.reads_direct:
            sizes = _staging(threads, chunk)
            self.arena = HostArena(sizes, device, pinned=not device.unified, threads=threads)
            per = SLOTS_PER_THREAD
            self._benches = [
                _Bench(self.arena.slots[i : i + per], device, pinned=self.arena.pinned)
                for i in range(0, threads * per, per)
            ]

    def start(self) -> None:
        """Start the threads; they end with :meth:`stop`. Raises StreamerError."""
        for number in range(self._threads):
            name, loop = f"layer-streamer-fetch-{number}", partial(self._loop, number)
            self._control.start(threading.Thread(target=loop, name=name, daemon=True))

    def stop(self) -> None:
        """Have the threads end after what they are at. Never blocks."""
        for _ in range(self._threads):
            self._queue.put(None)

    def begin(
        self, fetches: Sequence[tuple[Fetch, int]], memory: torch.Tensor, stream: Stream
    ) -> None:
        """Have bytes brought to ``memory``, each fetch to the place that is named with it, by
        copies on ``stream``. All there was to wait for has been waited for."""
        tasks = [partial(self._fetch, fetch, to, memory, stream) for fetch, to in fetches]
        work = self._work = _Work(tasks, {fetch.path for fetch, _ in fetches})
        for _ in range(min(self._threads, len(tasks))):
            self._queue.put(work)
        if self._control.closing:
            work.stopped = True  # the threads may have left before
        work.begun = True

    def wait(self) -> None:
        """Block until what was begun is read, and its copies are enqueued. Raises what reads raise,
        with the name of what was read; then, and after an interrupt, nothing of it counts."""
        work = self._work
        if work is None:
            return
        if os.getpid() != self._pid:
            raise ClosedError("the process was forked while it was at work: a child opens its own")
        if not work.begun:
            work.stopped = True
        while not work.over:
            work.bell.wait()
        self._work = None
        error = work.error
        if error is None and work.stopped:
            error = self._closed() if self._control.closing else StreamerError("interrupted")
        try:
            if error is not None:
                raise error
            self._files.check_unchanged(work.paths)
        finally:
            del error, work  # or this frame and the error would hold each other

    def wait_copied(self, copied: Event) -> None:
        """Block until the device has read a place, which is filled again after that."""
        copied.synchronize()

    def _loop(self, number: int) -> None:
        try:
            while True:
                work = self._queue.get()
                if work is None:
                    break
                work.take_part(number)
                del work  # an idle thread must not keep it, and the memory it goes to, alive
        except BaseException as error:
            self._control.fail(error)
        self._control.leave()

    def _closed(self) -> ClosedError:
        return ClosedError("the streamer was closed during the pass")

    def _fetch(
        self, fetch: Fetch, to: int, memory: torch.Tensor, stream: Stream, number: int
    ) -> None:
        if self._control.closing:
            raise self._closed()
        try:
            if self._benches:
                self._bring(fetch, to, memory, stream, self._benches[number])
            else:
                self._read_in_place(fetch, to, memory)
        except StreamerError as error:
            raise type(error)(f"{fetch.name}: {error}") from error

    def _read_in_place(self, fetch: Fetch, to: int, memory: torch.Tensor) -> None:
        array: Any = memory.numpy()
        view = memoryview(array)
        for src, dst, nbytes in fetch.pieces:
            start = to + dst
            self._files.read_into(fetch.path, view[start : start + nbytes], fetch.offset + src)

    def _bring(
        self, fetch: Fetch, to: int, memory: torch.Tensor, stream: Stream, bench: _Bench
    ) -> None:
        slot, view, copied = bench.next()
        self.wait_copied(copied)
        direct = self._files.reads_direct
        lead = fetch.offset % PAGE if direct else 0
        length = align_up(lead + fetch.nbytes, PAGE) if direct else fetch.nbytes
        self._files.read_into(fetch.path, view[:length], fetch.offset - lead, lead + fetch.nbytes)
        self._device.use_in_this_thread(stream)
        try:
            for src, dst, nbytes in fetch.pieces:
                start, begin = to + dst, lead + src
                there, here = memory[start : start + nbytes], slot[begin : begin + nbytes]
                if bench.pinned:
                    self._device.copy_pinned(there, here, stream)
                else:
                    self._device.copy(there, here)
        finally:
            copied.record(stream)


class _Bench:
    """One thread's places in host memory, used in turn."""

    def __init__(self, slots: Sequence[torch.Tensor], device: Device, *, pinned: bool) -> None:
        arrays: list[Any] = [slot.numpy() for slot in slots]
        self._places = [
            (slot, memoryview(array), device.new_event())
            for slot, array in zip(slots, arrays, strict=True)
        ]
        self._turn = 0
        self.pinned = pinned

    def next(self) -> tuple[torch.Tensor, memoryview, Event]:
        """The place that was filled longest ago, and the event of its last copy."""
        self._turn = (self._turn + 1) % len(self._places)
        return self._places[self._turn]


class _Work:
    """Things to do by several threads, and how far they have come.

    Ownership: ``begun`` and ``bell`` are the waiting thread's; ``stopped`` is set by any, for good;
    ``_lock`` guards the two counts. A thread counts itself before it looks at ``stopped``, and who
    waits sets that before it looks at the count: so none begins a thing once the work is over.
    """

    def __init__(self, tasks: Sequence[Callable[[int], None]], paths: set[Path]) -> None:
        self.paths = paths
        self.begun = self.stopped = False
        self.error: BaseException | None = None
        self.bell = Bell()
        self._tasks = tasks
        self._rest = iter(range(len(tasks)))  # one step, whichever threads are at it
        self._lock = threading.Lock()
        self._active, self._left = 0, len(tasks)

    @property
    def over(self) -> bool:
        """Nothing of it is done any more, be it all or not."""
        return (self.stopped or not self._left) and not self._active

    def take_part(self, number: int) -> None:
        """Do what is left of it, as thread ``number``."""
        with self._lock:
            self._active += 1
        try:
            for at in self._rest:
                if self.stopped:
                    break
                self._tasks[at](number)
                with self._lock:
                    self._left -= 1
        except BaseException as error:
            self.error = self.error or error
            self.stopped = True
        with self._lock:
            self._active -= 1
        self.bell.ring()
