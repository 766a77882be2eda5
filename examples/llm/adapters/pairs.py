"""The two matrices of low rank that stand beside one of a model's, and all of an adapter's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..weights.packed import FLOATS, Packed

NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True, slots=True)
class Pair:
    """What x is multiplied by, one after the other, for what is added to its product."""

    down: Packed
    """(rank, width)."""
    up: Packed
    """(rows, rank), scaled."""

    @classmethod
    def of(cls, down_RD: torch.Tensor, up_NR: torch.Tensor) -> Pair:
        """Of two matrices of floats, contiguous, of one dtype, on one device."""
        return cls(_floats(down_RD), _floats(up_NR))

    def to(self, device: torch.device, dtype: torch.dtype) -> Pair:
        """The same there, in this dtype."""
        parts = (one.parts["weight"].to(device, dtype) for one in (self.down, self.up))
        return Pair.of(*parts)

    @property
    def numel(self) -> int:
        return sum(one.rows * one.width for one in (self.down, self.up))


@dataclass(frozen=True, slots=True)
class Adapter:
    """All pairs of an adapter, in memory, never streamed: they are little beside a layer."""

    layers: tuple[Mapping[str, Pair], ...]
    """Each layer's, by the module whose product they are added to, as transformers calls it."""
    _beside: dict[tuple[torch.device, torch.dtype], Adapter] = field(
        default_factory=dict, compare=False, repr=False
    )

    def to(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """The same there, in this dtype."""
        layers = (
            {name: pair.to(device, dtype) for name, pair in one.items()} for one in self.layers
        )
        return Adapter(tuple(layers))

    def beside(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """The same on a further device: one copy there, whoever asks, for as long as this lives."""
        if (device, dtype) not in self._beside:
            self._beside[device, dtype] = self.to(device, dtype)
        return self._beside[device, dtype]

    @property
    def numel(self) -> int:
        """Of all matrices."""
        return sum(pair.numel for layer in self.layers for pair in layer.values())


def _floats(weight: torch.Tensor) -> Packed:
    rows, width = weight.shape
    parts = {"weight": weight}
    return Packed(format=NAMES[weight.dtype], rows=rows, width=width, parts=parts)
