"""The measured limits of a machine, and the record of them in the user's cache directory.

What belongs to the machine (memory, devices) and what belongs to a file system (reads) are two
parts in two files, so that probing another disk leaves the rest as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from .atomic import read_record, write_atomically
from .cache import cache_path
from .identity import FileSystem, MachineIdentity, file_system, this_machine
from .records import HUGE, Form

logger = logging.getLogger(__name__)

VERSION = 2
"""Of the record's format; a record of another version is not read."""

MOST_NBYTES = 1 << 20
"""Of a record: one that a probe has written is of some kilobytes."""
BOUNDS = {"threads": (1, 256), "chunk_nbytes": (1, 1 << 30)}
"""Of numbers that a streamer takes over from a record."""
MODES = ("direct", "cold")

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class ReadRate:
    """Reads of a disk by ``threads`` threads, ``chunk_nbytes`` a call."""

    mode: str
    """Either "direct", or "cold": through the page cache, from which the file was dropped."""
    threads: int
    chunk_nbytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class ThreadRate:
    """Bytes that ``threads`` threads move a second, all together."""

    threads: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class SizeRate:
    """Bytes a second of copies of ``nbytes`` each, back to back on one stream."""

    nbytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class ProductRate:
    """Products of matrices in host memory by the processor, while a device's link is busy."""

    tokens: int
    """Of each product."""
    bytes_per_s: float
    """Of weights."""
    copies: float
    """Bytes a second that were copied to the device meanwhile."""


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Copies between host memory and one device."""

    device: str
    """torch's name of it, such as "cuda:0"."""
    pinned: bool
    """False if page-locking was refused: then ``copies`` and ``back`` are of pageable memory."""
    copies: tuple[SizeRate, ...]
    """From pinned host memory to the device, by the size of a copy."""
    pageable: float
    """From pageable host memory to the device, bytes a second."""
    back: float
    """From the device to pinned host memory, bytes a second."""
    products: tuple[ProductRate, ...] = ()
    """Beside copies to the device, by tokens."""


@dataclass(frozen=True, slots=True)
class MachinePart:
    """What does not depend on the disk."""

    identity: MachineIdentity
    measured_at: str
    """Time of day in UTC, ISO 8601."""
    quick: bool
    """True if it was measured with ``--quick``."""
    memcpy: tuple[ThreadRate, ...]
    """Host to host memory."""
    devices: tuple[DeviceLimits, ...]
    copy_together: float | None
    """Copies to all of ``devices`` at once, bytes a second; None unless there are several."""


@dataclass(frozen=True, slots=True)
class DiskPart:
    """The reads of one file system."""

    file_system: FileSystem
    path: str
    """What was read: a file, a directory, or the directory of a temporary file."""
    measured_at: str
    quick: bool
    reads: tuple[ReadRate, ...]
    """Empty where the file system keeps what it is told to drop, and refuses direct reads."""
    cached_reads: tuple[ThreadRate, ...]
    """Reads of what is in the page cache."""


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """A machine's limits, in bytes a second. A property is None where nothing was measured."""

    machine: MachinePart
    disk: DiskPart | None

    @property
    def best_read(self) -> ReadRate | None:
        """The fastest direct read; where those are refused, the fastest cold one."""
        reads = self.disk.reads if self.disk else ()
        return max(reads, key=lambda r: (r.mode == "direct", r.bytes_per_s), default=None)

    @property
    def read_rate(self) -> float | None:
        """Disk to host memory, of :attr:`best_read`."""
        return self.best_read.bytes_per_s if self.best_read else None

    def best_read_rate(self, mode: str) -> float | None:
        """Disk to host memory in this ``mode``: "direct", or "cold" through the page cache."""
        reads = self.disk.reads if self.disk else ()
        return _best(read for read in reads if read.mode == mode)

    @property
    def cached_read_rate(self) -> float | None:
        """Page cache to host memory, by as many threads as are best."""
        return _best(self.disk.cached_reads if self.disk else ())

    @property
    def memcpy_rate(self) -> float | None:
        """Host memory to host memory, by as many threads as are best."""
        return _best(self.machine.memcpy)

    def copy_rate(self, device: str) -> float | None:
        """Pinned host memory to ``device`` ("cuda:0"), in copies of the best size."""
        return next((_best(d.copies) for d in self.machine.devices if d.device == device), None)

    def pageable_rate(self, device: str) -> float | None:
        """Pageable host memory to ``device``."""
        return next((d.pageable for d in self.machine.devices if d.device == device), None)

    def product_rate(self, device: str, tokens: int = 1) -> ProductRate | None:
        """Of the processor beside copies to ``device``, with so many tokens."""
        of_device = (d.products for d in self.machine.devices if d.device == device)
        return next((rate for some in of_device for rate in some if rate.tokens == tokens), None)

    @property
    def copy_together_rate(self) -> float | None:
        """Pinned host memory to all measured devices at once, the sum."""
        if self.machine.copy_together is not None or not self.machine.devices:
            return self.machine.copy_together
        return self.copy_rate(self.machine.devices[0].device)


def load_limits(path: Path | None = None, *, gpus: bool = True) -> MachineLimits | None:
    """The limits on record for this machine, and for the file system of ``path`` if one is given.

    None if this machine (its processor, GPUs, driver, torch) has none; ``disk`` is None if the file
    system has none. A record that cannot be read is as good as none, and is logged.

    ``gpus``: False if nothing is asked of them, and CUDA is not to be started for their names: the
    record is then one of this machine whatever GPUs it names.
    """
    identity = this_machine(gpus=gpus)
    own = machine_folder(identity)
    for folder in [own] if gpus else sorted(own.parent.glob("*")):
        machine = load_part(folder / "machine.json", MachinePart)
        if machine is None:
            continue
        found = machine.identity if gpus else replace(machine.identity, gpus=())
        if found == identity:
            return MachineLimits(machine, _load_disk(folder, path))
        logger.info("the limits on record are of another driver or torch: %s", machine.identity)
    return None


def save_limits(limits: MachineLimits) -> tuple[Path, ...]:
    """Put ``limits`` on record, each part atomically; the files written. Raises OSError."""
    folder = machine_folder(limits.machine.identity, make=True)
    parts: dict[Path, MachinePart | DiskPart] = {folder / "machine.json": limits.machine}
    if limits.disk is not None:
        parts[folder / _disk_name(limits.disk.file_system)] = limits.disk
    for path, part in parts.items():
        write_atomically(path, json.dumps(encode(part)))
    return tuple(parts)


def encode(record: Any) -> dict[str, Any]:
    """``record``, a dataclass, as JSON has it; :func:`decode` is the way back."""
    return {"version": VERSION, **asdict(record)}


def decode(document: object, kind: type[P]) -> P:
    """The record (MachineLimits, a part) in parsed JSON. ValueError if it is not exactly one."""
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    version = document.get("version")
    if version != VERSION:
        raise ValueError(f"of version {repr(version)[:40]}, this is version {VERSION}")
    rest = {name: value for name, value in document.items() if name != "version"}
    value: P = FORM.read(kind, rest, kind.__name__)
    return value


def _best(rates: Iterable[ReadRate | ThreadRate | SizeRate]) -> float | None:
    return max((rate.bytes_per_s for rate in rates), default=None)


def machine_folder(identity: MachineIdentity, *, make: bool = False) -> Path:
    """Where a machine's records are: home directories can be shared by machines. OSError if it
    cannot be made."""
    digest = hashlib.sha256(repr(identity.hardware).encode()).hexdigest()[:16]
    return cache_path("limits", digest, make=make)


def _disk_name(system: FileSystem) -> str:
    number = system.device_number
    kind = "".join(c if c.isalnum() else "-" for c in system.type)
    return f"disk-{os.major(number)}-{os.minor(number)}-{kind}.json"


def _load_disk(folder: Path, path: Path | None) -> DiskPart | None:
    try:
        system = file_system(path) if path is not None else None
    except OSError:
        return None
    part = load_part(folder / _disk_name(system), DiskPart) if system is not None else None
    return part if part is not None and part.file_system == system else None


def load_part(path: Path, kind: type[P]) -> P | None:
    """The record of that kind in a file; None if there is none, or, as is logged, none that can be
    read."""
    try:
        return decode(json.loads(read_record(path, MOST_NBYTES)), kind)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s: not used (%s); probe writes it anew", path, error)
        return None


def _accepts(name: str, value: Any) -> bool:
    if isinstance(value, float):
        return value > 0
    if type(value) is int:
        low, high = BOUNDS.get(name, (0, HUGE))
        return low <= value <= high
    return name != "mode" or value in MODES


FORM = Form(_accepts)
