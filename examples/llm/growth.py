"""Work that a thread does ahead of whoever needs it, part by part, and that nobody waits for else.

What a pass needs of host memory is known when it begins, and taking it costs time in which the
device would have nothing to do: so it is taken while the layers before are computed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

LIVENESS_SECONDS = 1.0
"""How often a waiting caller looks whether the thread is there: in a forked process it is not."""


class _Part:
    """One piece of work. Whoever takes ``claim``, once and for all, may touch what it works on."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.claim = threading.Lock()
        self.done = False
        """Written by the thread, before it rings."""
        self.error: BaseException | None = None
        self.bell = threading.Lock()
        self.bell.acquire()


class Growth:
    """Parts of work, done once each and in order, by a thread that ends with the last of them.

    The thread claims a part before it touches it. What it has not claimed by the time that it is
    needed is the caller's to do, so nothing depends on the thread being quick, or being there. An
    error ends the thread, and :meth:`wait` raises it.

    Thread rules: one caller's thread makes, starts, waits and stops. All of it may be interrupted
    anywhere: claims and rings are single C calls on locks that nobody holds for long, and after an
    interrupt there is :meth:`stop`, as after any failure.
    """

    def __init__(self, parts: Mapping[int, Callable[[], None]]) -> None:
        """``parts``: by a key, in their order. Without any, there is no thread."""
        self._parts = {key: _Part(work) for key, work in parts.items()}
        self._thread: threading.Thread | None = None
        if parts:
            self._thread = threading.Thread(target=self._run, name="llm-kv-growth", daemon=True)

    def start(self) -> None:
        """Begin, at most once. Without a thread to be had, the caller is left with all parts."""
        if self._thread is None:
            return
        try:
            self._thread.start()
        except RuntimeError as error:
            logger.debug("memory is taken as it is reached: %s", error)

    def wait(self, key: int) -> None:
        """Return when the thread has done this part, or never will; raise its error.

        After that, what the part works on is the caller's.
        """
        part = self._parts.get(key)
        if part is None or part.claim.acquire(blocking=False):
            return
        while not part.done and self._alive():
            part.bell.acquire(timeout=LIVENESS_SECONDS)
        if part.error is not None:
            raise part.error

    def stop(self) -> None:
        """Begin no more parts, and return when none is being done. Idempotent; errors are dropped.

        An interrupt may come out of it while a part is being done: then call it again.
        """
        for part in self._parts.values():
            part.claim.acquire(blocking=False)
        # A thread that is not alive, because it has yet to begin, finds all parts claimed.
        if self._thread is not None and self._alive():
            self._thread.join()

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        for part in self._parts.values():
            if not part.claim.acquire(blocking=False):
                continue
            try:
                part.work()
            except BaseException as error:  # it is the waiting caller's
                part.error = error
            part.done = True
            part.bell.release()
            if part.error is not None:
                return
