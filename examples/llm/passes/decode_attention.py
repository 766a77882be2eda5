"""Attention of passes in which every row takes one token, by kernels that a graph can repeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..kv.rows import Span
from ..models.config import ModelConfig
from ..models.rope import Rotary
from ..models.rope_config import Rope
from .batch import Batch

if TYPE_CHECKING:
    from ..kernels.decode_launching import Look


class DecodeAttention:
    """The attention of one pass in any layer: rotates, stores and looks back by kernels."""

    rotates = True

    def __init__(
        self,
        config: ModelConfig,
        rotary: Rotary,
        batch: Batch,
        looks: Mapping[Span, Look],
        *,
        interleaved: bool,
    ) -> None:
        self._config, self._rotary, self._looks = config, rotary, looks
        (self._chunk,) = batch.chunks
        self._interleaved = interleaved
        self.tables: dict[Rope, torch.Tensor] = {}
        """Rotations of the pass's tokens, by kind, as far as they are known."""

    def __call__(
        self,
        layer_idx: int,
        span: Span,
        memory: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``RowAttention``, of queries and keys that have not been rotated."""
        from ..kernels.decode_launching import launch_attention, launch_rotate_and_store

        look, table = self._looks[span], self._table(layer_idx)
        turned_THE = launch_rotate_and_store(
            qkv, table, memory, look, interleaved=self._interleaved
        )
        scale = self._config.attention_scale
        mixed_THE = launch_attention(turned_THE, memory, look, scale, sinks_H)
        return mixed_THE.transpose(0, 1)

    def _table(self, layer_idx: int) -> torch.Tensor:
        rope = self._config.rope(layer_idx)
        if rope not in self.tables:
            positions, lengths = self._chunk.positions, self._chunk.lengths
            self.tables[rope] = self._rotary.rows(layer_idx, positions, lengths)
        return self.tables[rope]
