"""Where a module keeps its tensors: what can be stored into without a call of the module's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from .unbound import is_brought

Holder: TypeAlias = dict[str, Any] | list[Any]
"""A module's ``_parameters`` or ``_buffers``, or a list of its own."""


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What the module itself has under which name: parameters and persistent buffers."""
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield leaf, parameter
    for leaf, buffer in module._buffers.items():
        if buffer is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer


def places_of(block: nn.Module) -> Iterator[tuple[Holder, Any, torch.Tensor]]:
    """Every place within a module that holds one: who holds it, under which name or number."""
    for module in block.modules():
        for leaf, tensor in tensors_of(module):
            holder = module._parameters if leaf in module._parameters else module._buffers
            yield holder, leaf, tensor
        if isinstance(module, nn.RNNBase):
            # It computes with a list of its own, which assignments to its attributes keep up.
            for i, flat in enumerate(module._flat_weights):
                if flat is not None:
                    yield module._flat_weights, i, flat


def find_tensor(module: nn.Module, key: str) -> torch.Tensor | None:
    """The parameter or persistent buffer of this dotted name within a module.

    A module that was wrapped by peft is found by its own name: a ``base_layer`` is looked into.
    """
    *path, leaf = key.split(".")
    for part in path:
        child = module._modules.get(part)
        base = module._modules.get("base_layer")
        if child is None and base is not None:
            child = base._modules.get(part)
        if child is None:
            return None
        module = child
    found = dict(tensors_of(module)).get(leaf)
    base = module._modules.get("base_layer")
    if found is None and base is not None:
        found = dict(tensors_of(base)).get(leaf)
    return found


def find_empty(block: nn.Module, filled: Iterable[tuple[Holder, Any]]) -> str | None:
    """The name of something within a block that is on meta, none of the ``filled`` places, and no
    experts that are brought on demand."""
    places = {(id(holder), leaf) for holder, leaf in filled}
    for name, module in block.named_modules():
        for holder in (module._parameters, module._buffers):
            for leaf, tensor in holder.items():
                if tensor is None or not tensor.is_meta or is_brought(tensor):
                    continue
                if (id(holder), leaf) not in places:
                    return f"{name}.{leaf}" if name else leaf
    return None
