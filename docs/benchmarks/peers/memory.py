"""What a process takes, as others see it: host memory of it and its children, device memory."""

from __future__ import annotations

import subprocess
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

PERIOD = 0.05
"""Seconds between two looks."""
FIELDS = ("VmRSS", "RssAnon", "RssShmem")
MIB = 1 << 20


class Watch:
    """Looks every so often, in a thread, from its ``with`` to its end."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def look(self) -> None:
        """Look once; what is gone meanwhile is no error."""
        raise NotImplementedError

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD):
            with suppress(psutil.Error, OSError, KeyError):
                self.look()


class HostWatch(Watch):
    """Peaks over the life of a process and of what it starts, bytes, from outside.

    ``rss``: all pages that it has mapped and that are in memory, a file's among them.
    ``own``: those that no file backs. ``taken``: what the whole machine has less to give
    (MemAvailable), which counts memory that a driver pinned, and not the page cache.
    """

    def __init__(self, pid: int) -> None:
        self.rss = self.own = self.taken = 0
        self._process = psutil.Process(pid)
        self._begin = psutil.virtual_memory().available
        super().__init__()

    def look(self) -> None:
        """Of all processes together."""
        rss = own = 0
        for process in (self._process, *self._process.children(recursive=True)):
            found = fields_of(process.pid, "status")
            rss += found["VmRSS"]
            own += found["RssAnon"] + found["RssShmem"]
        self.rss, self.own = max(self.rss, rss), max(self.own, own)
        self.taken = max(self.taken, self._begin - psutil.virtual_memory().available)


def fields_of(pid: int | str, file: str) -> dict[str, int]:
    """What a file of /proc says of a process in kB, in bytes."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(count) << 10 for name, count, _ in fields}


def pss() -> int:
    """Of this process, bytes: its pages, those that it shares counted in part."""
    return fields_of("self", "smaps_rollup")["Pss"]


@cache
def nvml() -> tuple[Any, Any]:
    """NVIDIA's own counters, and GPU 0 there; nothing where they are not."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # of whatever kind its package has
        return None, None


def device_used() -> int | None:
    """Bytes of GPU 0 that are taken, as the driver sees it; None where nothing says so."""
    counters, gpu = nvml()
    if counters is not None:
        return int(counters.nvmlDeviceGetMemoryInfo(gpu).used)
    command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return int(done.stdout) * MIB
    return None


class DeviceWatch(Watch):
    """The peak of what is taken of GPU 0 over what was taken before. The GPU must be ours alone.

    ``nbytes`` stays None where nothing says so.
    """

    def __init__(self) -> None:
        self.nbytes: int | None = None
        self._begin = device_used()
        super().__init__()

    def look(self) -> None:
        """Of the whole GPU."""
        used = None if self._begin is None else device_used()
        if used is not None and self._begin is not None:
            self.nbytes = max(self.nbytes or 0, used - self._begin)
