"""What a pass is given: the function of a layer, and tensors in nested containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..transport.weights import Weights

LayerFn = Callable[[Any, Weights, int], Any]
"""``layer_fn(x, weights, layer_idx) -> x``."""


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
