"""Which machine this is, and which file system a path is on: what measured limits are valid for."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .atomic import read_text

CPUINFO = Path("/proc/cpuinfo")
MOUNTS = Path("/proc/self/mountinfo")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class MachineIdentity:
    """What tells one machine from another, for its speed; the host's name is not part of it."""

    cpu: str
    """The processor's model."""
    num_cores: int
    """Cores that this process may use."""
    gpus: tuple[str, ...]
    """Names of the accelerators that torch sees."""
    driver: str | None
    """Version of the NVIDIA driver; None where there is none to be read."""
    torch: str

    @property
    def hardware(self) -> tuple[object, ...]:
        """The part of it that a new driver or a new torch leaves as it is."""
        return (self.cpu, self.num_cores, self.gpus)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """The file system that a path is on."""

    device_number: int
    """Of the mount, as ``os.stat().st_dev`` counts."""
    type: str
    """Such as ext4; "unknown" where the system does not say."""

    @property
    def in_memory(self) -> bool:
        """True if its files are memory, so that reading them is no reading of a disk."""
        return self.type in ("tmpfs", "ramfs", "hugetlbfs")

    def __str__(self) -> str:
        number = self.device_number
        return f"{self.type} {os.major(number)}:{os.minor(number)}"


@dataclass(frozen=True, slots=True)
class Mount:
    """What a path is on."""

    point: str
    type: str
    source: str
    """A device, or whatever the file system gives for one."""
    number: str
    """Of the device: "259:2"."""


def this_machine(*, gpus: bool = True) -> MachineIdentity:
    """The machine that this process runs on; without its ``gpus``, CUDA is left alone."""
    names = _gpu_names() if gpus else ()
    return MachineIdentity(_cpu_model(), num_cores(), names, _driver(), torch.__version__)


def file_system(path: Path) -> FileSystem:
    """The file system of ``path``. Raises OSError if there is no such path.

    The number is the mount's, not the file's: on overlay and btrfs a file and its directory can
    differ in ``st_dev``.
    """
    place = path.resolve(strict=True)
    try:
        mount = mount_of(place)
    except OSError:
        mount = None
    if mount is None:
        return FileSystem(place.stat().st_dev, "unknown")
    return FileSystem(os.makedev(*map(int, mount.number.split(":"))), mount.type)


def mount_of(path: Path) -> Mount | None:
    """The mounted file system that ``path`` is on; of two at one place, the later. OSError if there
    is no such path, or no table of mounts."""
    place = path.resolve(strict=True)
    # As bytes, by line feeds alone: a mount's name may be of any others. Of equals max takes the
    # first, which is to be the later mount.
    mounts = map(_mount, reversed(MOUNTS.read_bytes().split(b"\n")))
    above = [m for m in mounts if m is not None and Path(m.point) in (place, *place.parents)]
    return max(above, key=lambda mount: len(mount.point), default=None)


def _mount(line: bytes) -> Mount | None:
    """A line of mountinfo; None for one that is none."""
    fields, _, rest = line.partition(b" - ")
    before, after = fields.split(b" "), rest.split(b" ")
    if len(before) < 5 or len(after) < 2 or not re.fullmatch(rb"\d{1,9}:\d{1,9}", before[2]):
        return None
    return Mount(_plain(before[4]), _plain(after[0]), _plain(after[1]), before[2].decode())


def _plain(text: bytes) -> str:
    """A name in mountinfo, where spaces and such are written in octal: "\\040"."""
    return os.fsdecode(re.sub(rb"\\([0-3][0-7]{2})", lambda m: bytes([int(m[1], 8)]), text))


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", read_text(CPUINFO), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu_names() -> tuple[str, ...]:
    if torch.cuda.is_available():
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ()
    return (accelerator.type,) * torch.accelerator.device_count()


def _driver() -> str | None:
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", read_text(NVIDIA_DRIVER))
    return found[0] if found else None
