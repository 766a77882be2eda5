"""How much host memory there is to use: what the kernel has free, within every limit above us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and usage, in cgroups of version 2 and 1."""


def available_host_bytes() -> int:
    """Bytes of host memory that can be had: MemAvailable, and what each cgroup above leaves.

    Too much is not refused later, it is killed: callers take a margin off.
    """
    available = int(psutil.virtual_memory().available)
    for folder in _cgroups():
        for limit_name, usage_name in _FILES:
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and usage is not None:
                available = min(available, limit - usage)
    return max(available, 0)


def _cgroups() -> Iterator[Path]:
    """Folders of the cgroups that this process is in, and of all their ancestors."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUP_ROOT / "memory" if controllers else CGROUP_ROOT
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth])


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none ("max": no limit)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
