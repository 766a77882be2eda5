"""What this process takes: memory on devices and on the host, bytes from storage."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

IO_COUNTERS = Path("/proc/self/io")


def reset_device_peak(devices: Sequence[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def device_peak(devices: Sequence[torch.device]) -> int:
    """Most bytes that torch has had on one of the devices."""
    peaks = [torch.cuda.max_memory_reserved(device) for device in devices if device.type == "cuda"]
    return max(peaks, default=0)


def host_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bytes_from_disk() -> int | None:
    """Bytes that this process has had fetched from storage; None where that is not told."""
    return io_counters().get("read_bytes")


def io_counters() -> dict[str, int]:
    """What this process has read and written, by Linux's names; {} where that is not told."""
    try:
        pairs = (line.split(": ") for line in IO_COUNTERS.read_text().splitlines())
        return {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return {}
