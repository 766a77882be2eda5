"""Which machine this is, and which file system a path is on: what measured limits are valid for."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

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
    best = None
    for mounted, number, kind in _mounts():
        # A later mount hides an earlier one at the same place.
        inside = mounted in (place, *place.parents)
        if inside and (best is None or len(mounted.parts) >= len(best[0].parts)):
            best = (mounted, number, kind)
    if best is None:
        return FileSystem(place.stat().st_dev, "unknown")
    return FileSystem(best[1], best[2])


def _mounts() -> list[tuple[Path, int, str]]:
    """Mount point, device number and type of each mounted file system, oldest first."""
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        fields, _, rest = line.partition(" - ")
        number, _, mounted = fields.split(" ")[2:5]
        major, minor = map(int, number.split(":"))
        # Spaces and such in a path are written in octal: "\040".
        plain = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mounted)
        mounts.append((Path(plain), os.makedev(major, minor), rest.split(" ")[0]))
    return mounts


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
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
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", NVIDIA_DRIVER.read_text(errors="replace"))
    except OSError:
        return None
    return found[0] if found else None
