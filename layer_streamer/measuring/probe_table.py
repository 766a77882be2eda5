"""Measured limits for people, as a table, and the same as one JSON document. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..machine.limits import DeviceLimits, DiskPart, MachineLimits, MachinePart, ReadRate, encode
from .probe_disk import several, size

LABEL = 24


def describe(limits: MachineLimits, notes: Sequence[str] = ()) -> str:
    """A table of every rate in GB/s, the best of each kind marked, and ``notes`` below it."""
    machine = limits.machine
    lines = [_machine_line(machine)]
    if limits.disk is not None:
        lines += _disk_lines(limits.disk)
    lines.append("memcpy, host to host")
    lines += _rows((several(rate.threads), rate.bytes_per_s) for rate in machine.memcpy)
    for device in machine.devices:
        lines += _device_lines(device)
    if machine.copy_together is not None:
        lines += _rows([(f"all {len(machine.devices)} at once", machine.copy_together)], mark=False)
    lines.append("GB/s is 1e9 bytes a second; * is the best of its kind")
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def document(limits: MachineLimits, notes: Sequence[str], saved: Sequence[Path]) -> str:
    """One line of JSON: the record, the rates that matter, the notes, the files it is saved in."""
    devices = [device.device for device in limits.machine.devices]
    rates = {
        "read_rate": limits.read_rate,
        "cached_read_rate": limits.cached_read_rate,
        "memcpy_rate": limits.memcpy_rate,
        "copy_rates": {device: limits.copy_rate(device) for device in devices},
        "copy_together_rate": limits.copy_together_rate,
    }
    return json.dumps(
        {
            "limits": encode(limits),
            "rates": rates,
            "notes": list(notes),
            "saved": [str(path) for path in saved],
        },
        separators=(",", ":"),
    )


def _machine_line(machine: MachinePart) -> str:
    identity = machine.identity
    gpus = ", ".join(identity.gpus) or "no accelerator"
    driver = f", driver {identity.driver}" if identity.driver else ""
    return f"{identity.cpu}, {identity.num_cores} cores; {gpus}{driver}; torch {identity.torch}"


def _disk_lines(disk: DiskPart) -> list[str]:
    lines = [f"disk: {disk.path} ({disk.file_system})"]
    for mode, title in (("direct", "direct reads"), ("cold", "cold reads")):
        reads = [read for read in disk.reads if read.mode == mode]
        if reads:
            lines += _grid(title, reads)
    if disk.cached_reads:
        lines.append("reads from the page cache")
        lines += _rows((several(rate.threads), rate.bytes_per_s) for rate in disk.cached_reads)
    return lines


def _grid(title: str, reads: Sequence[ReadRate]) -> list[str]:
    """Threads down, chunks across."""
    rates = {(read.threads, read.chunk_nbytes): read.bytes_per_s for read in reads}
    chunks = sorted({chunk for _, chunk in rates})
    best = max(rates.values())
    lines = [f"{title:<{LABEL}}" + "".join(f"{size(chunk):>12}" for chunk in chunks)]
    for threads in sorted({threads for threads, _ in rates}):
        cells = [_cell(rates.get((threads, chunk)), best) for chunk in chunks]
        lines.append(f"{'  ' + several(threads):<{LABEL}}" + "".join(cells).rstrip())
    return lines


def _device_lines(device: DeviceLimits) -> list[str]:
    memory = "pinned" if device.pinned else "pageable (page-locking was refused)"
    lines = [f"copies to {device.device} from {memory} memory"]
    lines += _rows((size(rate.nbytes), rate.bytes_per_s) for rate in device.copies)
    others = [("from pageable memory", device.pageable), ("back", device.back)]
    lines += _rows(others, mark=False)
    for rate in device.products:
        tokens = "1 token" if rate.tokens == 1 else f"{rate.tokens} tokens"
        both = [(f"products, {tokens}", rate.bytes_per_s), ("copies beside them", rate.copies)]
        lines += _rows(both, mark=False)
    return lines


def _rows(rates: Iterable[tuple[str, float]], *, mark: bool = True) -> list[str]:
    rates = list(rates)
    best = max((rate for _, rate in rates), default=0.0) if mark else None
    return [f"{'  ' + name:<{LABEL}}{_cell(rate, best)}".rstrip() for name, rate in rates]


def _cell(rate: float | None, best: float | None) -> str:
    """Twelve columns and a mark, so that marked and plain figures line up."""
    if rate is None:
        return f"{'-':>11} "
    return f"{rate / 1e9:>11.2f}{'*' if rate == best else ' '}"
