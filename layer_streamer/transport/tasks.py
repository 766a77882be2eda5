"""Work done by several threads at once while a streamer is opened."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from ..errors import ClosedError

T = TypeVar("T")


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
    under way have ended; those not begun are dropped.
    """
    work = _Work(tasks, on_start)
    workers = [
        threading.Thread(target=work.run, name=f"layer-streamer-open-{i}", daemon=True)
        for i in range(min(threads, work.count))
    ]
    try:
        for worker in workers:
            worker.start()
        for _ in range(work.count):
            on_done(work.next_result())
    finally:
        work.stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()


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
        self.stop = threading.Event()
        self.count = 0
        self._on_start = on_start
        self._tasks: SimpleQueue[Callable[[], T]] = SimpleQueue()
        self._results: SimpleQueue[tuple[T] | BaseException] = SimpleQueue()
        for task in tasks:
            self._tasks.put(task)
            self.count += 1

    def run(self) -> None:
        """Do tasks until there is none left, one fails, or ``stop`` is set."""
        try:
            self._on_start()
            while not self.stop.is_set():
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
            raise result
        return result[0]
