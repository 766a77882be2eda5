"""One pass at a time: whose turn it is."""

from __future__ import annotations

import threading

from .errors import StreamerError


class Pass:
    """Token of one pass; the latest one is the pass that may advance."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.current_thread()


class Turns:
    """Which pass may advance.

    Thread rules: any thread. The lock is reentrant, because a forgotten sweep may be collected,
    and end, while its thread is in here.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._current: Pass | None = None

    def claim(self, new: Pass) -> None:
        """Make ``new`` the pass that may advance.

        It supersedes an unfinished pass of the same thread, or of a thread that has ended;
        StreamerError if a living other thread's pass is under way.
        """
        with self.lock:
            other = self._current
            if other is not None and other.thread is not new.thread and other.thread.is_alive():
                raise StreamerError(
                    f"a pass is running on thread {other.thread.name!r}: one pass at a time"
                )
            self._current = new

    def has(self, some: Pass) -> bool:
        """True while no newer pass has been claimed."""
        return self._current is some

    def end(self, some: Pass) -> None:
        """Nobody's turn any more, if it was still ``some``'s."""
        with self.lock:
            if self._current is some:
                self._current = None
