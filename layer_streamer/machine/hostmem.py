"""How much host memory there is to use: what the kernel has free, within every limit above us."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from .atomic import read_text

CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


_VERSIONS = (
    ("memory.max", "memory.current", "inactive_file", "active_file"),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
        "total_active_file",
    ),
)
"""Names of a cgroup's files with its limit and its usage, and lines of its memory.stat: file pages,
which usage counts and the kernel gives back."""


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """A cgroup's limit on memory, bytes."""

    folder: Path
    limit: int
    usage: int
    cached: int
    """The part of ``usage`` that is page cache."""

    @property
    def left(self) -> int:
        """What can still be had: the page cache can, too."""
        return self.limit - max(self.usage - self.cached, 0)


def available_host_bytes() -> int:
    """Bytes of host memory that can be had: MemAvailable, and what each cgroup above leaves.

    Too much is not refused later, it is killed: callers take a margin off.
    """
    available = int(psutil.virtual_memory().available)
    return max(min([available, *(cgroup.left for cgroup in cgroup_limits())]), 0)


def cgroup_limits() -> Iterator[CgroupLimit]:
    """The limits of the cgroups that this process is in, and of all their ancestors."""
    for folder in _cgroups():
        for limit_file, usage_file, *cached in _VERSIONS:
            limit, usage = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and usage is not None:
                yield CgroupLimit(folder, limit, usage, _cached(folder, cached))


def _cgroups() -> Iterator[Path]:
    """Folders of the cgroups that this process is in, and of all their ancestors."""
    for line in read_text(MEMBERSHIP).split("\n"):
        fields = line.split(":", 2)
        if len(fields) < 3:
            continue
        _, controllers, path = fields
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUP_ROOT / "memory" if controllers else CGROUP_ROOT
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth])


def _cached(folder: Path, names: Sequence[str]) -> int:
    """Bytes of a cgroup's usage that are page cache."""
    pairs = [line.split() for line in read_text(folder / "memory.stat").splitlines()]
    found = [pair[1] for pair in pairs if len(pair) == 2 and pair[0] in names]
    return sum(int(number) for number in found if number.isdecimal())


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none ("max": no limit)."""
    try:
        return int(read_text(path))
    except ValueError:
        return None
