"""The device to compute on, and the dtype that suits it."""

from __future__ import annotations

import torch


def choose_device(device: str | torch.device | None) -> torch.device:
    """What was asked for, else the GPU if there is one, else the CPU. ValueError for no device."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: not a torch device (one device is taken)") from error
    if chosen.type == "cuda" and chosen.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


def choose_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """What was asked for, else float32 on a CPU, and what a GPU computes fastest in."""
    if dtype is not None:
        return dtype
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        return torch.float32
    return suited_dtype(torch.cuda.get_device_capability(device))


def suited_dtype(capability: tuple[int, int]) -> torch.dtype:
    """What a GPU of this compute capability multiplies fastest.

    bfloat16 from 8.0 on. float16 on those of 7, which only emulate bfloat16: its range is small,
    and what goes beyond it ends in logits that are not numbers. float32 on older ones.
    """
    if capability >= (8, 0):
        return torch.bfloat16
    return torch.float16 if capability >= (7, 0) else torch.float32
