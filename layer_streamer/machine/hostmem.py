"""How much host memory there is to use: what the kernel has free, within every limit above us."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class _Version:
    """Names of a cgroup's files."""

    limit: str
    usage: str
    cached: tuple[str, str]
    """Lines of memory.stat: file pages, which usage counts and the kernel gives back."""


_VERSIONS = (
    _Version("memory.max", "memory.current", ("inactive_file", "active_file")),
    _Version(
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


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
        for version in _VERSIONS:
            limit, usage = _number(folder / version.limit), _number(folder / version.usage)
            if limit is not None and usage is not None:
                yield CgroupLimit(folder, limit, usage, _cached(folder, version.cached))


def _cgroups() -> Iterator[Path]:
    """Folders of the cgroups that this process is in, and of all their ancestors."""
    for line in _text(MEMBERSHIP).split("\n"):
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


def _cached(folder: Path, names: tuple[str, str]) -> int:
    """Bytes of a cgroup's usage that are page cache."""
    pairs = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    found = [pair[1] for pair in pairs if len(pair) == 2 and pair[0] in names]
    return sum(int(number) for number in found if number.isdecimal())


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none ("max": no limit)."""
    try:
        return int(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    """What a file says; nothing if it cannot be read. A cgroup's name may be of any bytes."""
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""
