"""Threads: started, joined, and at work together while a streamer is opened."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
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
    on_start: Callable[[], object] = lambda: None,
) -> None:
    """Call every task, on up to ``threads`` threads; return when all have ended.

    ``on_start`` is called by each thread first, ``on_done`` by the calling thread with the result
    of each task. The first error (or an interrupt of the calling thread) is raised once the tasks
    under way have ended; those not begun are dropped. No interrupt comes to a task.
    """
    work = _Work(tasks, on_start)
    workers = [
        threading.Thread(target=work.run, name=f"layer-streamer-open-{i}", daemon=True)
        for i in range(min(threads, work.count))
    ]
    try:
        for worker in workers:
            start_thread(worker)
        for _ in range(work.count):
            on_done(work.next_result())
    finally:
        # One whose start was interrupted, so that it cannot be joined, does nothing any more.
        work.stopped = True
        join_all(workers, threading.TIMEOUT_MAX)
        work.drop_results()


_at_work: weakref.WeakSet[_Work[Any]] = weakref.WeakSet()


def _end_in_child() -> None:
    """A forked child has none of the threads: nobody does the tasks."""
    for work in tuple(_at_work):
        work.fail(ClosedError("the process was forked while a streamer was opened: open it anew"))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_in_child)


class _Work(Generic[T]):
    """Tasks to do, and results. Thread rules: ``run`` on any number of threads."""

    def __init__(self, tasks: Iterable[Callable[[], T]], on_start: Callable[[], object]) -> None:
        _at_work.add(self)
        self.stopped = False
        self.count = 0
        self._on_start = on_start
        self._tasks: SimpleQueue[Callable[[], T]] = SimpleQueue()
        self._results: SimpleQueue[tuple[T] | BaseException] = SimpleQueue()
        for task in tasks:
            self._tasks.put(task)
            self.count += 1

    def run(self) -> None:
        """Do tasks until there is none left, one fails, or ``stopped`` is set."""
        try:
            if not self.stopped:
                self._on_start()
            while True:
                if self.stopped:
                    return
                task = self._tasks.get_nowait()
                self._results.put((task(),))
        except Empty:
            return
        except BaseException as error:
            self._results.put(error)

    def fail(self, error: BaseException) -> None:
        """Have the next result be ``error``, after those that are there."""
        self._results.put(error)

    def next_result(self) -> T:
        """Wait for the next result; raises the error of a task."""
        result = self._results.get()
        if isinstance(result, BaseException):
            try:
                raise result
            finally:
                del result  # or this frame and the error would hold each other
        return result[0]

    def drop_results(self) -> None:
        """Forget errors that nobody raises: their frames hold this, and all that the tasks do."""
        self._results = SimpleQueue()
