"""Tensors in nested containers."""

from __future__ import annotations

from typing import Any

import torch


def move(x: Any, device: torch.device) -> Any:
    """``x`` with the tensors in its nested tuples, lists and dicts on ``device``."""
    if isinstance(x, torch.Tensor):
        return x if x.device == device else x.to(device)
    if isinstance(x, tuple):
        parts = [move(part, device) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if isinstance(x, list):
        return [move(part, device) for part in x]
    if isinstance(x, dict):
        return {key: move(part, device) for key, part in x.items()}
    return x
