"""What a streamer calls for each layer of a runner's pass, and for each piece of the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..models.rope_config import Rope
from .batch import Batch, Chunk
from .ways import Attention

if TYPE_CHECKING:
    from .decode import Decoder
    from .runner import Runner

Work = Callable[[], None]


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
        self._widths: dict[int, int] = {}
        self._decoder: Decoder | None = None

    def capture(self, decoder: Decoder) -> None:
        """What layers compute is captured, and replayed."""
        self._decoder, self._widths = decoder, decoder.widths

    def __call__(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], layer_idx: int
    ) -> torch.Tensor:
        runner = self._runner
        if runner.captures_passes:
            self.steps.append((layer_idx, tensors))
        last_layer = runner.config.num_layers - 1
        if layer_idx <= last_layer:
            if self._on_layer is not None:
                self._on_layer(layer_idx)
            runner.layer(x_ND, tensors, layer_idx, self)
            if layer_idx == last_layer and runner.head_is_loaded:
                self._add_logits(self._normed(x_ND), {}, layer_idx + 1)
            return x_ND
        if layer_idx == last_layer + 1:
            x_ND = self._normed(x_ND)
        self._add_logits(x_ND, tensors, layer_idx)
        return x_ND

    def launch(self, layer_idx: int, addresses: Sequence[torch.Tensor], work: Work) -> None:
        """Do what a step computes, whose operands are at these addresses, and else where they are
        in every pass."""
        if self._decoder is None:
            work()
        else:
            key = (layer_idx, *(tensor.data_ptr() for tensor in addresses))
            self._decoder.launch(len(self.batch.ids), key, work)

    def _normed(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What the head gets of the tokens whose logits are wanted."""
        normed = self._runner.final_norm(x_ND if self._last is None else x_ND[self._last])
        if self._decoder is None:
            return normed
        return self._decoder.normed_RD[: len(normed)].copy_(normed)

    def _add_logits(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], step: int
    ) -> None:
        """Those of the next piece of the vocabulary."""
        first = self._filled

        def work() -> None:
            piece = self._runner.head(x_ND, tensors, first)
            self.logits[:, first : first + piece.shape[1]] = piece
            self._widths[step] = piece.shape[1]

        self.launch(step, tuple(tensors.values()), work)
        self._filled = first + self._widths[step]

    def table(self, chunk: Chunk, layer_idx: int) -> torch.Tensor:
        """The rotation of a chunk, computed once for all layers that share it."""
        key = (self._runner.config.rope(layer_idx), chunk.first)
        if key not in self._tables:
            self._tables[key] = self._runner.rotation(chunk, layer_idx)
        return self._tables[key]
