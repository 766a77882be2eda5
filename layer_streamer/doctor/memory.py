"""Facts for a report: host memory, what limits it, and how much of it could be page-locked."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..checkpoint.manifest import stamp_file
from ..devices.device import Device
from ..machine.hostmem import available_host_bytes, cgroup_limits
from ..planning.budget import format_bytes
from ..planning.layout import Read
from ..transport.files import OpenFiles
from ..transport.mapped import MappedFiles
from ..transport.memory import HostArena
from .facts import Fact, Group, Line, learn, notices

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TRIAL_SIZES = tuple(n << 10 for n in (16384, 4096, 1024, 256, 64, 4))
"""Bytes of which page-locking is tried, until one can be had."""
MAPPED = "pages of the mapped file"
MOST_MAPPED = 16 << 20
"""Bytes; they may have to be read from disk first."""
LEAST_AVAILABLE = 2 << 30
"""Bytes; with less, Python and torch leave next to nothing to a model."""
LEAST_LOCKED = 1 << 20
"""Bytes; without a GPU, what need not be spoken of."""
LEAST_FILES = 256
"""Descriptors that are enough for small models."""
MOST_CGROUPS = 3


@dataclass(frozen=True, slots=True)
class CgroupFact:
    """A cgroup that allows less memory than the machine has, bytes."""

    folder: str
    limit: int
    usage: int
    left: int


@dataclass(frozen=True, slots=True)
class Ulimits:
    """Soft limits of this process; None: unlimited."""

    memlock: int | None
    address_space: int | None
    open_files: int | None


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Host memory, bytes."""

    total: Fact[int]
    available: Fact[int]
    """What can be had, within every limit."""
    swap: Fact[int]
    cgroups: tuple[CgroupFact, ...]
    """Those that count, the tightest first."""
    ulimits: Fact[Ulimits]
    huge_pages: Fact[str]


@dataclass(frozen=True, slots=True)
class LockTrial:
    """What page-locking did when it was tried."""

    what: str
    """Such as "host memory for cuda:0"."""
    asked: int
    """Bytes."""
    locked: int
    """Bytes that could be locked; 0: none."""
    said: str
    """Why it was refused; empty if it was not."""
    for_device: bool
    """False if there is no device that could use it."""


def look_at_memory() -> MemoryFacts:
    """Never raises."""
    total = learn(lambda: int(psutil.virtual_memory().total))
    groups = learn(lambda: list(cgroup_limits())).value or []
    counting = [
        CgroupFact(str(g.folder), g.limit, g.usage, g.left)
        for g in groups
        if total.value is None or g.limit < total.value
    ]
    return MemoryFacts(
        total=total,
        available=learn(available_host_bytes),
        swap=learn(lambda: int(psutil.swap_memory().total)),
        cgroups=tuple(sorted(counting, key=lambda group: group.left)),
        ulimits=learn(_ulimits),
        huge_pages=learn(_huge_pages),
    )


def try_page_locking(devices: Sequence[Device], file: Path | None) -> tuple[LockTrial, ...]:
    """Lock memory for the first device as a streamer does, and the pages of ``file``; else mlock.

    All is given back. Never raises.
    """
    size = _trial_sizes()[0]
    if not devices or devices[0].unified:
        return (_try_mlock(),)
    device = devices[0]
    trials = [_try_arena(device, size)]
    if device.maps_files and file is not None:
        trials.append(_try_mapping(device, file, size))
    return tuple(trials)


def describe_memory(facts: MemoryFacts, trials: Sequence[LockTrial], num_files: int) -> Group:
    """For the screen. ``num_files``: how many descriptors a model needs."""
    lines = [_total_line(facts)]
    for group in facts.cgroups[:MOST_CGROUPS]:
        text = (
            f"limit {format_bytes(group.limit)}, used {format_bytes(group.usage)}, "
            f"{format_bytes(max(group.left, 0))} can be had: {group.folder}"
        )
        low = group.left < LEAST_AVAILABLE
        advice = "raise it (docker run --memory, systemd MemoryMax); what exceeds it is killed"
        lines.append(Line("cgroup", text, advice if low else ""))
    if not facts.cgroups:
        lines.append(Line("cgroup", "no limit below what the machine has"))
    lines.append(_ulimits_line(facts, num_files))
    lines.append(Line("huge pages", facts.huge_pages.text()))
    lines += [_trial_line(trial) for trial in trials]
    return Group("memory", tuple(lines))


def _total_line(facts: MemoryFacts) -> Line:
    swap = facts.swap.text(lambda n: f"{format_bytes(n)} of swap" if n else "no swap")
    text = (
        f"{facts.total.text(format_bytes)}, of which {facts.available.text(format_bytes)} "
        f"can be had; {swap}"
    )
    low = facts.available.value is not None and facts.available.value < LEAST_AVAILABLE
    limited = low and facts.cgroups and facts.cgroups[0].left <= (facts.available.value or 0)
    advice = "close what takes it, or name smaller pools (n_gpu=1)" if low and not limited else ""
    return Line("host", text, advice)


def _ulimits_line(facts: MemoryFacts, num_files: int) -> Line:
    limits = facts.ulimits.value
    if limits is None:
        return Line("ulimits", facts.ulimits.text())
    text = (
        f"locked memory {_amount(limits.memlock)}, address space {_amount(limits.address_space)}, "
        f"open files {limits.open_files if limits.open_files is not None else 'unlimited'}"
    )
    advice = []
    if limits.address_space is not None:
        advice.append("ulimit -v unlimited (mapped files and CUDA reserve more than they use)")
    least = max(LEAST_FILES, 64 + 2 * num_files)
    if limits.open_files is not None and limits.open_files < least:
        advice.append(f"ulimit -n {least} or more")
    return Line("ulimits", text, "; ".join(advice))


def _trial_line(trial: LockTrial) -> Line:
    if not trial.said:
        return Line("page-locking", f"{trial.what}: {format_bytes(trial.locked)} locked, as asked")
    had = format_bytes(trial.locked) if trial.locked else "nothing"
    text = f"{trial.what}: {had} of {format_bytes(trial.asked)} locked ({trial.said})"
    raising = "ulimit -l unlimited (docker run --ulimit memlock=-1)"
    if trial.what == MAPPED:
        return Line("page-locking", text, "a streamer reads them into locked memory instead")
    if trial.for_device:
        return Line("page-locking", text, f"copies are slower without: {raising}; WSL may refuse")
    advice = f"with a GPU, copies would be slower: {raising}" if trial.locked < LEAST_LOCKED else ""
    return Line("page-locking", text, advice)


def _try_arena(device: Device, size: int) -> LockTrial:
    def lock() -> bool:
        with closing(HostArena([size], device, pinned=True, threads=2)) as arena:
            return arena.pinned

    return _trial(f"host memory for {device.torch_device}", size, lock)


def _try_mapping(device: Device, file: Path, most: int) -> LockTrial:
    size = min(most, MOST_MAPPED, learn(lambda: file.stat().st_size).value or 0)

    def lock() -> bool:
        with closing(OpenFiles({file: stamp_file(file)})) as files:
            mapped = MappedFiles(files, [Read(file, 0, 0, size)])
            try:
                return mapped.pin(device)
            finally:
                mapped.close()

    return _trial(MAPPED, size, lock)


def _trial(what: str, size: int, lock: Callable[[], bool]) -> LockTrial:
    with notices() as said:
        done = learn(lock)
    if done.value:
        return LockTrial(what, size, size, "", for_device=True)
    reason = done.reason or " ".join(said) or "no reason given"
    return LockTrial(what, size, 0, reason, for_device=True)


def _try_mlock() -> LockTrial:
    """How much of TRIAL_SIZES the system locks for a process without a GPU."""
    sizes, said = _trial_sizes(), ""
    for size in sizes:
        fault = learn(lambda size=size: _lock(size))  # type: ignore[misc]
        if fault.value == "":
            return LockTrial("mlock", sizes[0], size, said, for_device=False)
        said = said or fault.value or fault.reason
    return LockTrial("mlock", sizes[0], 0, said, for_device=False)


def _lock(nbytes: int) -> str:
    """Lock so many bytes of fresh memory, and give them back; why it was refused, if it was."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, nbytes) as memory:
        place = ctypes.c_char.from_buffer(memory)
        try:
            refused = libc.mlock(ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(nbytes))
            number = ctypes.get_errno()
        finally:
            del place
    return os.strerror(number) if refused else ""


def _trial_sizes() -> tuple[int, ...]:
    """Those of TRIAL_SIZES that leave most of a small memory alone."""
    available = learn(available_host_bytes).value or 0
    return tuple(size for size in TRIAL_SIZES if size <= available // 8) or TRIAL_SIZES[-1:]


def _ulimits() -> Ulimits:
    names = (resource.RLIMIT_MEMLOCK, resource.RLIMIT_AS, resource.RLIMIT_NOFILE)
    soft = [resource.getrlimit(name)[0] for name in names]
    return Ulimits(*(None if limit == resource.RLIM_INFINITY else limit for limit in soft))


def _huge_pages() -> str | None:
    """The chosen word of "always [madvise] never"."""
    words = HUGE_PAGES.read_text().split()
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def _amount(limit: int | None) -> str:
    return format_bytes(limit) if limit is not None else "unlimited"
