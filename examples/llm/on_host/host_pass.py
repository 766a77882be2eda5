"""One pass's tokens through the layers that are computed in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..models.model import decoder_layer
from ..models.rope_config import Rope
from ..passes.batch import Chunk
from ..passes.ways import Attention
from ..weights.weights import StepWeights

if TYPE_CHECKING:
    from .side import HostSide

CPU = torch.device("cpu")
FEW_NUMBERS = 1 << 19
"""Keys that one thread looks at in a millisecond or less. After any more threads of torch's, all of
them spin for about as long, on the cores that the products' own threads want by then."""


class Place(NamedTuple):
    """Tokens among a pass's residuals: of rows that are captured, the last one fills the rest."""

    first: int
    tokens: int
    filled: int
    """With those that only fill up."""


class HostPass:
    """Computes these layers, one after the other, in a pass of few tokens."""

    def __init__(
        self,
        side: HostSide,
        chunk: Chunk,
        attention: Attention,
        places: Sequence[Place],
        *,
        threads: int,
    ) -> None:
        """``places``: where its tokens are among the pass's residuals."""
        self._side, self._chunk, self._attention = side, chunk, attention
        self._places, self._threads = places, threads
        self._seen = sum(piece.position + piece.count for piece in chunk.pieces)
        self._tables: dict[Rope, torch.Tensor] = {}

    def takes(self, layer_idx: int) -> bool:
        """True: the layer is computed here."""
        return layer_idx in self._side.layers

    def compute(
        self, x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor], layer_idx: int
    ) -> None:
        """All tokens through one layer, in place, wherever the residuals are."""
        side, runner = self._side, self._side.runner
        kv, names = runner.kv, side.names
        spec = runner.streamer.manifest.layers[layer_idx]
        weights = StepWeights(tensors, spec, names, side.unpacker, side.check)
        memory, span, sinks = kv.open_home(layer_idx), kv.span(layer_idx), weights.sinks()

        def look(
            index: int, q_HTE: torch.Tensor, k_GTE: torch.Tensor, v_GTE: torch.Tensor
        ) -> torch.Tensor:
            # Rounded as the device rounds what is kept.
            qkv = (q_HTE, k_GTE.to(memory.dtype), v_GTE.to(memory.dtype))
            if self._seen * memory[0, 0].numel() > FEW_NUMBERS:
                return self._attention(index, span, memory, qkv, sinks)
            torch.set_num_threads(1)
            try:
                return self._attention(index, span, memory, qkv, sinks)
            finally:
                torch.set_num_threads(self._threads)

        x_TD = self._fetch(x_ND)
        torch.set_num_threads(self._threads)
        try:
            decoder_layer(x_TD, weights, runner.config, self._table(layer_idx), look, out=x_TD)
        finally:
            torch.set_num_threads(side.threads)
        kv.close_home(layer_idx)
        self._send(x_TD, x_ND)

    def _fetch(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The residuals, once the device has done what comes before: (T, D), float32."""
        passing_TD, at = self._side.passing_TD[: self._chunk.count], 0
        for first, count, _ in self._places:
            passing_TD[at : at + count].copy_(x_ND[first : first + count], non_blocking=True)
            at += count
        if x_ND.device.type == "cuda":
            torch.cuda.current_stream(x_ND.device).synchronize()
        return passing_TD.float()

    def _send(self, x_TD: torch.Tensor, x_ND: torch.Tensor) -> None:
        """Back again: from pageable memory, which is read when this returns. So small a copy then
        waits for no layer on its way."""
        sent_TD, at = x_TD.to(x_ND.dtype), 0
        for first, count, filled in self._places:
            part_TD = sent_TD[at : at + count]
            if filled > count:
                part_TD = torch.cat((part_TD, part_TD[-1:].expand(filled - count, -1)))
            x_ND[first : first + filled].copy_(part_TD, non_blocking=True)
            at += count

    def _table(self, layer_idx: int) -> torch.Tensor:
        """The rotation of its tokens, computed once for all layers that share it."""
        side, chunk = self._side, self._chunk
        rope = side.runner.config.rope(layer_idx)
        if rope not in self._tables:
            self._tables[rope] = side.rotary.rows(layer_idx, chunk.positions, chunk.lengths)
        return self._tables[rope]
