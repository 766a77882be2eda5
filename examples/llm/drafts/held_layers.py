"""Layers that are on the device for good, in the place of those that a streamer hands out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch

from layer_streamer import Manifest

from ..passes.layers import Layers

X = TypeVar("X")


@dataclass(frozen=True, slots=True)
class _Here:
    tiers: Sequence[str]
    expert_slots: int = 0


class HeldLayers:
    """Some layers' tensors; what is outside of layers is that of the ``Layers`` behind them, whose
    output head is loaded. Thread rules: one thread."""

    def __init__(
        self, behind: Layers, manifest: Manifest, tensors: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        """``manifest``: what the ``tensors`` of each layer are, by the same keys."""
        self._behind, self.manifest, self._tensors = behind, manifest, tuple(tensors)
        self.device, self.devices = behind.device, (behind.device,)
        self.num_steps, self.experts_stay = len(self._tensors), False
        self.most_on_device = 0
        self.plan = _Here(("device",) * self.num_steps)

    def run_pass(self, x: X, layer_fn: Callable[..., X], *, on_host: bool = True) -> X:
        """x through all layers, as a streamer does it."""
        for layer_idx, tensors in enumerate(self._tensors):
            x = layer_fn(x, tensors, layer_idx)
        return x

    def experts_on_device(self) -> AbstractContextManager[None]:
        """Nobody brings experts here."""
        raise NotImplementedError

    def load_static(self, name: str) -> torch.Tensor:
        """The same tensor as that of the layers behind."""
        return self._behind.load_static(name)

    def host_tensor(self, name: str) -> torch.Tensor:
        """Likewise."""
        return self._behind.host_tensor(name)
