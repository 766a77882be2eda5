"""What hands the layers of a model to a runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch

from layer_streamer import Manifest

X = TypeVar("X")


class Placed(Protocol):
    """Where they are."""

    @property
    def tiers(self) -> Sequence[str]:
        """By step: "device", "host" or "disk"."""

    @property
    def expert_slots(self) -> int:
        """For experts that come on demand; 0: none do."""


class Layers(Protocol):
    """The part of a ``LayerStreamer`` that a runner needs."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def plan(self) -> Placed: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def devices(self) -> Sequence[torch.device]: ...
    @property
    def experts_stay(self) -> bool:
        """All experts that come on demand are in slots of their own."""

    @property
    def most_on_device(self) -> int:
        """Of how many experts of a layer the device has slots without the host; 0: of none."""

    def experts_on_device(self) -> AbstractContextManager[None]:
        """A pass in which it does."""

    @property
    def num_steps(self) -> int:
        """Layers, and pieces of the output head behind them; none of these where it is loaded."""

    def run_pass(self, x: X, layer_fn: Callable[..., X], *, on_host: bool = ...) -> X: ...
    def load_static(self, name: str) -> torch.Tensor: ...
    def host_tensor(self, name: str) -> torch.Tensor: ...
