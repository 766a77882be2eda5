"""What a process and its machine take of host memory while something is measured."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import psutil

PERIOD = 0.02
"""Seconds between two looks."""


class HostMemory:
    """Peaks of host memory between its ``with`` and its end, over what there was at the begin.

    ``anonymous``: bytes of the process that no file backs. ``taken``: bytes that the whole machine
    has less to give (MemAvailable), which counts memory pinned by a driver, too, and does not count
    the page cache.
    """

    def __init__(self) -> None:
        self.anonymous = self.taken = 0
        self._begin = _anonymous(), psutil.virtual_memory().available
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HostMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.rest()
        self.look()

    def rest(self) -> None:
        """From now on, only :meth:`look` looks."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD):
            self.look()

    def look(self) -> None:
        """Look once."""
        anonymous, available = self._begin
        self.anonymous = max(self.anonymous, _anonymous() - anonymous)
        self.taken = max(self.taken, available - psutil.virtual_memory().available)


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))
