"""A stage that takes long and does get on, such as loading what a large host budget holds."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ...measuring.footprint import io_counters
from ...transport.tasks import join_all, start_thread

LOOK_SECONDS = 1.0
LEAST_NBYTES = 1 << 16
"""To look takes some bytes, too."""


@contextmanager
def telling_of_progress(
    alive: Callable[[], object],
    done: Callable[[], int] | None = None,
    look_seconds: float = LOOK_SECONDS,
) -> Iterator[None]:
    """Context in which ``alive()`` is called on another thread once ``done()``, by default
    the bytes that this process has read or got as pages, has risen by LEAST_NBYTES."""
    over = threading.Event()
    counted = done or work_done

    def look() -> None:
        before = counted()
        while not over.wait(look_seconds):
            now = counted()
            if now - before >= LEAST_NBYTES:
                before = now
                with suppress(Exception):  # that nobody listens is for the trial's thread to see
                    alive()

    thread = threading.Thread(target=look, name="layer-streamer-progress", daemon=True)
    try:
        start_thread(thread)
        yield
    finally:
        over.set()
        join_all([thread], threading.TIMEOUT_MAX)


def work_done() -> int:
    """Bytes that were read or came as pages, so far: a process that hangs gets neither."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    counters = io_counters()
    read = counters.get("rchar", 0) + counters.get("read_bytes", 0)
    return read + resource.getpagesize() * (usage.ru_minflt + usage.ru_majflt)
