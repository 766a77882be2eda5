"""The progress bar over a pass."""

from __future__ import annotations

import threading

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """A tqdm bar that an interrupt cannot jam: no monitor thread, and a lock of its own."""

    monitor_interval = 0


ProgressBar.set_lock(threading.RLock())
