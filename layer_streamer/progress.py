"""The progress bar over a pass."""

from __future__ import annotations

import threading
from typing import Any

from tqdm import tqdm

PATIENCE = 0.1
"""Seconds that a bar waits for another thread's bar to be drawn."""


class _Lock:
    """Keeps bars of several threads apart, and nobody waiting.

    tqdm's own stays taken by whatever comes through while a bar is drawn, an interrupt or an error
    of the terminal, and every bar drawn later would wait for ever. Who finds this one taken for
    longer than a bar takes goes on all the same, and releases it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, *args: object) -> bool:
        self._lock.acquire(timeout=PATIENCE)
        return True

    def release(self, *error: object) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            return  # one that waited in vain has released it

    __enter__ = acquire
    __exit__ = release


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """A tqdm bar that ends nothing: where it cannot be drawn, it is not.

    stderr may be a pipe that nobody reads any more, closed, or None. The first error of drawing
    makes the bar quiet for good; an interrupt passes through, and jams no other bar. Thread rules:
    one thread a bar.
    """

    monitor_interval = 0

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except Exception:
            super().__init__(**{**options, "disable": True})

    def refresh(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().refresh(*args, **kwargs)
        except Exception:
            self._go_quiet()

    def close(self) -> None:
        try:
            super().close()
        except Exception:
            self._go_quiet()

    def _go_quiet(self) -> None:
        self.disable = True
        tqdm._instances.discard(self)  # type: ignore[attr-defined]  # its line is another bar's

    @classmethod
    def write(cls, *args: Any, **kwargs: Any) -> None:
        try:
            super().write(*args, **kwargs)
        except Exception:
            return


ProgressBar.set_lock(_Lock())
