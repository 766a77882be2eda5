"""Threads: started, joined, and at work together while a streamer is opened."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from ..errors import ClosedError, StreamerError

T = TypeVar("T")


BEGIN_SECONDS = 5.0
"""How long a thread whose start was interrupted is waited for until it begins, if it ever does."""
LOOK_SECONDS = 0.001


def start_thread(thread: threading.Thread) -> None:
    """Start it. StreamerError, with what to do, where the system has no thread left.

    After an interrupt it can be joined if the system has made it: one that begins while Python
    ends, which waits for those alone that have begun, takes the process down with it.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise StreamerError(
            f"thread {thread.name} cannot be started: {error} (a limit on threads of this user or "
            "container: ulimit -u, pids.max); raise it, or pass fewer read_threads"
        ) from error
    except BaseException:
        _wait_until_begun(thread)
        raise


def _wait_until_begun(thread: threading.Thread) -> None:
    """Wait while Python knows of it and the system has yet to run it."""
    deadline = time.monotonic() + BEGIN_SECONDS
    while not thread.is_alive() and thread in threading.enumerate():
        if time.monotonic() > deadline:
            return
        time.sleep(LOOK_SECONDS)


def join_all(threads: Iterable[threading.Thread], seconds: float) -> list[str]:
    """Wait for their ends; the names of those that still run after ``seconds``, of all together.

    The calling thread may be one of them: it does not wait for itself.
    """
    deadline = time.monotonic() + seconds
    alive = []
    for thread in threads:
        try:
            thread.join(max(0.0, deadline - time.monotonic()))
        except RuntimeError:
            continue  # the calling one, or one that never started
        if thread.is_alive():
            alive.append(thread.name)
    return alive


@contextmanager
def noted_on(error: BaseException | None) -> Iterator[None]:
    """Context of what is done on the way out of ``error``: an error of its own becomes a note on
    it, so that the one that came first is raised. None: there was none."""
    try:
        yield
    except Exception as later:
        if error is None:
            raise
        error.add_note(str(later))


def run_all(
    tasks: Iterable[Callable[[], T]],
    threads: int,
    *,
    on_done: Callable[[T], object] = lambda result: None,
    stopped: threading.Event | None = None,
) -> list[T]:
    """Call every task, on up to ``threads`` threads; return when all have ended: their results.

    With as many threads as tasks, each has one of its own. ``on_done`` is called by the calling
    thread with the result of each task as it comes. The first error (or an interrupt of the calling
    thread) sets ``stopped``, and is raised once the tasks under way have ended; those not begun are
    dropped. No interrupt comes to a task.
    """
    work = _Work(tasks, threads, stopped or threading.Event())
    workers = [
        threading.Thread(target=work.run, args=(i,), name=f"layer-streamer-task-{i}", daemon=True)
        for i in range(min(threads, work.count))
    ]
    results = dict[int, T]()
    try:
        for worker in workers:
            start_thread(worker)
        for _ in range(work.count):
            number, result = work.next_result()
            results[number] = result
            on_done(result)
        join_all(workers, threading.TIMEOUT_MAX)
    finally:
        # One whose start was interrupted, so that it cannot be joined, does nothing any more.
        work.stopped.set()
        join_all(workers, threading.TIMEOUT_MAX)
        # Errors that nobody raises: their frames hold this, and all that the tasks do.
        work.results = SimpleQueue()
    return [results[number] for number in range(work.count)]


_at_work: weakref.WeakSet[_Work[Any]] = weakref.WeakSet()


def _end_in_child() -> None:
    """A forked child has none of the threads: nobody does the tasks."""
    for work in tuple(_at_work):
        work.results.put(
            ClosedError("the process was forked while it was at work: a child opens its own")
        )


os.register_at_fork(after_in_child=_end_in_child)


class _Work(Generic[T]):
    """Tasks to do, and results. Thread rules: ``run`` on each of the threads."""

    def __init__(
        self, tasks: Iterable[Callable[[], T]], threads: int, stopped: threading.Event
    ) -> None:
        _at_work.add(self)
        self.stopped = stopped
        self._tasks = tuple(tasks)
        self.count = len(self._tasks)
        self._rest = iter(range(threads, self.count))  # one step, whichever threads are at it
        self.results: SimpleQueue[tuple[int, T] | BaseException] = SimpleQueue()

    def run(self, first: int) -> None:
        """Do task ``first``, then others until none is left, one fails, or ``stopped`` is set."""
        try:
            for number in chain((first,), self._rest):
                if self.stopped.is_set():
                    return
                self.results.put((number, self._tasks[number]()))
        except BaseException as error:
            self.results.put(error)

    def next_result(self) -> tuple[int, T]:
        """Wait for the next (number of the task, result); raises the error of a task."""
        result = self.results.get()
        if isinstance(result, BaseException):
            try:
                raise result
            finally:
                del result  # or this frame and the error would hold each other
        return result
