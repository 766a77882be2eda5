"""Tokens of a pass that are computed in one way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .batch import Batch
from .ways import Attention

if TYPE_CHECKING:
    from ..on_device.side import DeviceSide


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """They lie together among the pass's residuals."""

    batch: Batch
    attentions: Sequence[Attention]
    """One for each chunk."""
    first: int = 0
    """Where they begin."""
    in_parts: bool = False
    """Layers compute their chunks as a ``CapturedPart``."""
    captured: bool = False
    """What layers compute of them is captured; those behind the rows' only fill up."""

    def on(self, side: DeviceSide) -> Section:
        """As the layers of another device see it."""
        if self.captured:
            assert side.decoder is not None
            ids = self.batch.ids.tolist()
            entries = [
                (row, [token]) for (row, _), token in zip(self.batch.rows, ids, strict=False)
            ]
            batch = side.decoder.fill(entries)
            return replace(self, batch=batch, attentions=[side.decoder.attention(batch)])
        batch = self.batch.on(side.device)
        return replace(self, batch=batch, attentions=[side.attention(c) for c in batch.chunks])

    def part(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Its part of a pass's residuals."""
        return x_ND[self.first : self.first + len(self.batch.ids)]

    @property
    def count(self) -> int:
        """How many logits are wanted."""
        return len(self.batch.rows if self.captured else self.batch.last)

    def wanted(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The residuals of which logits are wanted."""
        x_ND, batch = self.part(x_ND), self.batch
        if self.captured:
            return x_ND[: len(batch.rows)]
        return x_ND if len(batch.last) == len(x_ND) else x_ND[batch.last]
