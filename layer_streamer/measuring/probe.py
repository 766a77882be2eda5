"""A probe: measures a machine's limits, those of the disk and those of memory and devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..devices.accelerator import open_device
from ..devices.device import Device
from ..machine.identity import file_system, this_machine
from ..machine.limits import DeviceLimits, DiskPart, MachineLimits, MachinePart
from .probe_config import Journal, ProbeConfig, buffer_budget
from .probe_copy import measure_device, measure_memcpy, measure_together
from .probe_disk import DiskProbe
from .probe_files import ProbeFiles, choose_files, temporary_files, temporary_nbytes
from .probe_products import measure_products

LEAST_CHUNKS = 4
"""A temporary file has at least so many of the largest chunks."""


@dataclass(frozen=True, slots=True)
class Place:
    """Whose reads are measured."""

    path: Path
    """A file or a directory with large files; or where a temporary file is made."""
    temporary: bool


def probe(
    place: Place,
    devices: Sequence[Device],
    config: ProbeConfig,
    journal: Journal,
    known: MachinePart | None = None,
) -> MachineLimits:
    """Measure the reads of ``place``, memcpy, and the copies of ``devices``.

    ``known``: the machine's part from the record, which is then not measured again. Nothing is
    saved. Errors: ConfigError, ReadError; after one, or an interrupt, no thread, file or
    page-locked memory is left.
    """
    budget = buffer_budget(config)
    extra = 0 if known is not None else _num_machine_measurements(devices, config)
    with _opened(place, config, journal) as files:
        system = file_system(place.path if place.temporary else files.files[0].path)
        if system.in_memory:
            journal.note(f"{place.path}: {system.type} is memory, these are no reads of a disk")
        disk = DiskProbe(files, config, budget, journal, in_memory=system.in_memory)
        journal.num_measurements += disk.num_measurements + extra
        part = DiskPart(
            system,
            str(place.path.resolve()),
            _now(),
            config.quick,
            disk.measure_reads(),
            disk.measure_cached(),
        )
    if known is None:
        known = _measure_machine(devices, config, budget, journal)
    return MachineLimits(known, part)


def choose_devices(names: Sequence[str]) -> list[Device]:
    """The devices that ``names`` name; none named: every GPU. Without the CPU, which has no copies.

    ConfigError if one does not exist or cannot be used.
    """
    chosen = [open_device(name) for name in names] or [open_device(None)]
    if not names and chosen[0].torch_device.type == "cuda":
        chosen = [open_device(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    by_name = {str(device.torch_device): device for device in chosen if not device.unified}
    return list(by_name.values())


def is_known(part: MachinePart, devices: Sequence[Device], config: ProbeConfig) -> bool:
    """True if ``part`` has all of ``devices``, as thoroughly measured as ``config`` would."""
    measured = {limits.device for limits in part.devices}
    wanted = {str(device.torch_device) for device in devices}
    return wanted <= measured and (config.quick or not part.quick)


@contextmanager
def _opened(place: Place, config: ProbeConfig, journal: Journal) -> Iterator[ProbeFiles]:
    if not place.temporary:
        with closing(ProbeFiles(choose_files(place.path, min(config.read_chunks)))) as files:
            yield files
        return
    least = LEAST_CHUNKS * max(config.read_chunks)
    nbytes = temporary_nbytes(place.path, config.file_nbytes, least)
    if nbytes < config.file_nbytes:
        journal.note(
            f"the temporary file is {nbytes / 1e9:.2f} GB instead of "
            f"{config.file_nbytes / 1e9:.2f} GB: that is half of what is free, less a margin"
        )
    journal.num_measurements = 1
    journal.measuring(f"a temporary file of {nbytes / 1e9:.2f} GB is written")
    with temporary_files(place.path, nbytes) as files:
        yield files


def _num_machine_measurements(devices: Sequence[Device], config: ProbeConfig) -> int:
    each = 2 + len(config.copy_sizes) + len(config.product_tokens)
    return len(config.memcpy_threads) + len(devices) * each + (len(devices) > 1)


def _measure_machine(
    devices: Sequence[Device], config: ProbeConfig, budget: int, journal: Journal
) -> MachinePart:
    memcpy = measure_memcpy(config, budget, journal)
    if not devices:
        journal.note("copies to a device: not measured, there is no accelerator")
    limits = tuple(_measure_one(device, config, budget, journal) for device in devices)
    together = None
    if len(devices) > 1:
        journal.measuring(f"copies to {len(devices)} devices at once")
        rates = [max(rate.bytes_per_s for rate in each.copies) for each in limits]
        together = measure_together(devices, rates, config, budget)
    return MachinePart(this_machine(), _now(), config.quick, memcpy, limits, together)


def _measure_one(
    device: Device, config: ProbeConfig, budget: int, journal: Journal
) -> DeviceLimits:
    alone = measure_device(device, config, budget, journal)
    return replace(alone, products=measure_products(device, config, budget, journal))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
