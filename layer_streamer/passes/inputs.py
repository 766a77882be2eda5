"""What a pass is given: the function of a layer, and tensors in nested containers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import is_
from typing import Any

import torch

from ..transport.weights import Weights

LayerFn = Callable[[Any, Weights, int], Any]
"""``layer_fn(x, weights, layer_idx) -> x``."""


def move(x: Any, device: torch.device) -> Any:
    """``x`` with the tensors in its nested tuples, lists and dicts on ``device``.

    A container whose tensors are there already is the same object: somebody may write to it.
    """
    if isinstance(x, torch.Tensor):
        return x if x.device == device else x.to(device)
    if isinstance(x, tuple | list):
        parts = [move(part, device) for part in x]
        return x if all(map(is_, parts, x)) else _sequence_like(x, parts)
    if isinstance(x, dict):
        moved = {key: move(part, device) for key, part in x.items()}
        return x if all(map(is_, moved.values(), x.values())) else _dict_like(x, moved)
    return x


def _sequence_like(x: tuple[Any, ...] | list[Any], parts: list[Any]) -> Any:
    if isinstance(x, list):
        return parts
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


def _dict_like(x: dict[Any, Any], moved: dict[Any, Any]) -> dict[Any, Any]:
    if type(x) is dict:
        return moved
    kept = copy.copy(x)  # of its class: outputs of transformers are dicts with attributes
    for key, part in moved.items():
        kept[key] = part
    return kept
