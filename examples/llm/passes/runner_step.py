"""What a streamer calls for each layer of a runner's pass, and for each piece of the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..models.rope_config import Rope
from .batch import Batch, Chunk
from .ways import Attention

if TYPE_CHECKING:
    from .runner import Runner


class RunnerStep:
    """The ``layer_fn`` of one pass."""

    def __init__(
        self,
        runner: Runner,
        batch: Batch,
        attentions: Sequence[Attention],
        logits: torch.Tensor,
        *,
        last: torch.Tensor | None = None,
        on_layer: Callable[[int], object] | None = None,
    ) -> None:
        """``attentions``, one for each chunk. ``logits`` are to be filled: those of the tokens in
        ``last``; None: of all."""
        self.batch, self.attentions, self.logits = batch, attentions, logits
        self.steps: list[tuple[int, Mapping[str, torch.Tensor]]] = []
        """What has been handed out, for a decoder; nobody else may look at it any more."""
        self._runner, self._last, self._on_layer = runner, last, on_layer
        self._tables: dict[tuple[Rope, int], torch.Tensor] = {}
        self._filled = 0

    def __call__(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], layer_idx: int
    ) -> torch.Tensor:
        runner = self._runner
        if runner.decoder is not None:
            self.steps.append((layer_idx, tensors))
        last_layer = runner.config.num_layers - 1
        if layer_idx <= last_layer:
            if self._on_layer is not None:
                self._on_layer(layer_idx)
            runner.layer(x_ND, tensors, layer_idx, self)
            if layer_idx == last_layer and runner.head_is_loaded:
                self._add_logits(self._normed(x_ND), {})
            return x_ND
        if layer_idx == last_layer + 1:
            x_ND = self._normed(x_ND)
        self._add_logits(x_ND, tensors)
        return x_ND

    def _normed(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What the head gets of the tokens whose logits are wanted."""
        return self._runner.final_norm(x_ND if self._last is None else x_ND[self._last])

    def _add_logits(self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Those of the next piece of the vocabulary."""
        piece = self._runner.head(x_ND, tensors, self._filled)
        self.logits[:, self._filled : self._filled + piece.shape[1]] = piece
        self._filled += piece.shape[1]

    def table(self, chunk: Chunk, layer_idx: int) -> torch.Tensor:
        """The rotation of a chunk, computed once for all layers that share it."""
        key = (self._runner.config.rope(layer_idx), chunk.first)
        if key not in self._tables:
            self._tables[key] = self._runner.rotation(chunk, layer_idx)
        return self._tables[key]
