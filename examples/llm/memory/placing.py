"""The devices to compute on, and the dtype that suits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

Named: TypeAlias = str | torch.device
"""A device by its name; several are named with commas between them, too."""


def choose_devices(device: Named | Sequence[Named] | None) -> tuple[torch.device, ...]:
    """What was asked for, one or several of one kind; else the GPU if there is one, else the CPU.
    ValueError for what is no device, is named twice, or is of another kind than the first."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names: Sequence[Named] = device.split(",") if isinstance(device, str) else ()
    if not isinstance(device, str):
        names = [device] if isinstance(device, torch.device) else list(device)
    chosen = tuple(_choose(name.strip() if isinstance(name, str) else name) for name in names)
    said = ",".join(map(str, chosen))
    if not chosen:
        raise ValueError("device=[]: must name a device")
    if len({one.type for one in chosen}) > 1:
        raise ValueError(f"device={said}: must be devices of one kind")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"device={said}: a device is named twice")
    return chosen


def choose_device(device: Named | None) -> torch.device:
    """The one that was asked for, or that there is; ValueError for several, too."""
    found = choose_devices(device)
    if len(found) > 1:
        raise ValueError(f"device={device}: one device is taken")
    return found[0]


def _choose(name: Named) -> torch.device:
    try:
        chosen = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={name!r}: not a torch device") from error
    if chosen.type == "cuda" and chosen.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def devices_of(options: Mapping[str, Any]) -> tuple[torch.device, ...]:
    """Those that a streamer's options, as ``place`` makes them, name."""
    device = options["device"]
    return (device,) if isinstance(device, torch.device) else tuple(device)


def choose_dtype(devices: Sequence[torch.device], dtype: torch.dtype | None) -> torch.dtype:
    """What was asked for, else float32 on a CPU, and what the oldest GPU computes fastest in."""
    if dtype is not None:
        return dtype
    count = torch.cuda.device_count()
    if any(device.type != "cuda" or (device.index or 0) >= count for device in devices):
        return torch.float32
    return suited_dtype(min(torch.cuda.get_device_capability(device) for device in devices))


def suited_dtype(capability: tuple[int, int]) -> torch.dtype:
    """What a GPU of this compute capability multiplies fastest.

    bfloat16 from 8.0 on. float16 on those of 7, which only emulate bfloat16: its range is small,
    and what goes beyond it ends in logits that are not numbers. float32 on older ones.
    """
    if capability >= (8, 0):
        return torch.bfloat16
    return torch.float16 if capability >= (7, 0) else torch.float32
