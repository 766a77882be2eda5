"""One pass at a time: which one may advance.

Without a lock, because an interrupt may leave the calling thread at any point and must not leave a
lock taken. Claims form a chain; each has one successor at most, which ``dict.setdefault`` decides
in one step even between threads.
"""

from __future__ import annotations

import threading
import weakref

from ..errors import StreamerError


class Pass:
    """Token of one pass, held by the pass alone: if an interrupt keeps it from being ``over``,
    its claim still ends when the pass's frame goes."""

    __slots__ = ("__weakref__", "over", "thread")

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.over = False

    def blocks(self, other: Pass) -> bool:
        """True if ``other`` may not begin because this pass is under way on another thread."""
        return not self.over and self.thread is not other.thread and self.thread.is_alive()


class _Claim:
    """One link of the chain."""

    __slots__ = ("_successor", "holder")

    def __init__(self, holder: Pass | None) -> None:
        self.holder = weakref.ref(holder) if holder is not None else lambda: None
        self._successor: dict[None, _Claim] = {}

    def last(self) -> _Claim:
        """The end of the chain from here."""
        claim = self
        while claim._successor:
            claim = claim._successor[None]
        return claim

    def offer(self, successor: _Claim) -> bool:
        """Append ``successor``; False if another thread's was first."""
        return self._successor.setdefault(None, successor) is successor


class Claims:
    """Which pass may advance. Thread rules: any thread."""

    def __init__(self) -> None:
        # A claim not far from the end of the chain: it may be one that was overtaken.
        self._recent = _Claim(None)

    def claim(self, new: Pass) -> None:
        """Make ``new`` the pass that may advance.

        It supersedes an unfinished pass of the same thread, or of a thread that has ended;
        StreamerError if a living other thread's pass is under way.
        """
        mine = _Claim(new)
        while True:
            last = self._recent.last()
            other = last.holder()
            if other is not None and other.blocks(new):
                raise StreamerError(
                    f"a pass is running on thread {other.thread.name!r}: one pass at a time"
                )
            if last.offer(mine):
                self._recent = mine
                return

    def has(self, some: Pass) -> bool:
        """True while no newer pass has been claimed."""
        return self._recent.last().holder() is some
