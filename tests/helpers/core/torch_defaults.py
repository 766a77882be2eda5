"""A program that has changed torch's defaults for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def other_defaults(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Tensors that do not say where and of which dtype have no memory, and another dtype."""
    device_before, dtype_before = torch.get_default_device(), torch.get_default_dtype()
    torch.set_default_device("meta")
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_device(device_before)
        torch.set_default_dtype(dtype_before)
