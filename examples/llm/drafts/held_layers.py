"""Layers that are on the device for good, in the place of those that a streamer hands out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    """Some layers' tensors, each where the ``Layers`` behind them hand it out; what is outside of
    layers is that of these, whose output head is loaded. Thread rules: one thread."""

    def __init__(
        self, behind: Layers, manifest: Manifest, tensors: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        """``manifest``: what the ``tensors`` of each layer are, by the same keys."""
        self._behind, self.manifest = behind, manifest
        self._tensors: tuple[Mapping[str, torch.Tensor], ...] = tuple(tensors)
        self.device, self.devices = behind.device, tuple(behind.devices)
        self.num_steps, self.experts_stay = len(self._tensors), False
        self.most_on_device = 0
        self.plan = _Here(("device",) * self.num_steps)

    def run_pass(self, x: X, layer_fn: Callable[..., X], *, on_host: bool = True) -> X:
        """x through all layers, as a streamer does it; a runner's step brings x to each device."""
        for layer_idx, tensors in enumerate(self._tensors):
            with _current(self.devices[layer_idx % len(self.devices)]):
                x = layer_fn(x, tensors, layer_idx)
        return x

    def close(self) -> None:
        """Let go of them. Idempotent."""
        self._tensors = ()

    def experts_on_device(self) -> AbstractContextManager[None]:
        """Nobody brings experts here."""
        raise NotImplementedError

    def load_static(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """The same tensor as that of the layers behind."""
        return self._behind.load_static(name, device)

    def host_tensor(self, name: str) -> torch.Tensor:
        """Likewise."""
        return self._behind.host_tensor(name)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Context in which it is the current one: kernels are launched there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
