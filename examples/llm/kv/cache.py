"""Keys and values of the tokens seen so far, by layer on the device or in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models.config import ModelConfig
from .host import HostTier, TokenShape
from .int8 import round_to_int8
from .moves import Move, moved_places
from .rows import Row, Rows, Span, make_spans
from .transfers import Transfers, open_transfers


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """How much a cache holds, and where."""

    tokens: int
    """Of all rows together."""
    max_rows: int
    dtype: torch.dtype
    host_layers: Sequence[int] = ()
    """Layers whose keys and values are in host memory."""
    int8: bool = False
    """Keep those in eight bits."""


class KVCache:
    """The keys and values of several rows, in every layer.

    A pass appends its tokens layer by layer and is made permanent by :meth:`end` after its last,
    so a pass that fails half way leaves the rows as they were. Token-major: one token's keys, then
    its values, so that the beginning of a row is one piece of memory.

    Thread rules: one thread, but for ``host.prefetch``.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: KVLayout,
        device: torch.device,
        transfers: Transfers | None = None,
    ) -> None:
        """``transfers``: the device's, unless a test brings its own."""
        self.device, self.layout = device, layout
        spans = make_spans(config.windows, layout.tokens, layout.max_rows)
        self.rows = Rows(spans, layout.max_rows)
        by_window = {span.window: span for span in self.rows.spans}
        self._spans = [by_window[window] for window in config.windows]
        token = TokenShape(config.num_kv_heads, config.head_dim, layout.dtype)
        here = [i for i in range(config.num_layers) if i not in layout.host_layers]
        with torch.inference_mode(False):
            self._memory = {
                i: token.view(
                    torch.empty(
                        self._spans[i].places * token.nbytes, dtype=torch.uint8, device=device
                    )
                )
                for i in here
            }
        self.host: HostTier | None = None
        if len(here) < config.num_layers:
            away = {i: self._spans[i] for i in sorted(set(layout.host_layers))}
            transfers = open_transfers(device) if transfers is None else transfers
            self.host = HostTier(away, token, device, transfers, int8=layout.int8)
        self._batch: tuple[tuple[Row, int], ...] = ()

    def span(self, layer_idx: int) -> Span:
        """Which places the layer's rows have."""
        return self._spans[layer_idx]

    def begin(self, batch: Sequence[tuple[Row, int]]) -> None:
        """Before a pass that appends so many tokens to each of these rows."""
        for row, number in batch:
            if not number or row.length + number > row.capacity:
                raise ValueError(f"{number} tokens after {row.length}: room is for {row.capacity}")
            if not row.intact(row.length):
                raise ValueError("a pass that failed overwrote the row's window: truncate it first")
            row.reach = max(row.reach, row.length + number)
        self._batch = tuple(batch)
        if self.host is not None:
            self.host.begin([row for row, _ in batch])

    def open(self, layer_idx: int) -> torch.Tensor:
        """A layer's keys and values, (places, 2, G, E), while the pass is in it."""
        if layer_idx in self._memory:
            return self._memory[layer_idx]
        assert self.host is not None
        return self.host.open(layer_idx, [row for row, _ in self._batch])

    def open_home(self, layer_idx: int) -> torch.Tensor:
        """A layer's keys and values where they live, in host memory: (places, 2, G, E), with room
        for the pass's tokens, which is computed there."""
        assert self.host is not None
        return self.host.open_home(layer_idx, self._batch)

    def close_home(self, layer_idx: int) -> None:
        """The pass has stored its tokens there."""
        assert self.host is not None
        self.host.close_home(layer_idx, self._batch)

    def as_kept(self, layer_idx: int, heads: torch.Tensor) -> torch.Tensor:
        """New keys or values (..., E) as later passes get them from the layer: a pass that stores
        these sees its own tokens as others do, so that it matters to none which pass they were
        in."""
        return round_to_int8(heads) if self.codes(layer_idx) else heads

    def codes(self, layer_idx: int) -> bool:
        """True: the layer keeps its numbers in eight bits."""
        return self.layout.int8 and layer_idx not in self._memory

    def close_layer(self, layer_idx: int) -> None:
        """The pass has stored its tokens in the layer."""
        if layer_idx not in self._memory:
            assert self.host is not None
            self.host.close_layer(layer_idx, self._batch)

    def end(self) -> None:
        """The pass is complete in every layer."""
        for row, number in self._batch:
            row.length += number
            row.moved_from = None

    def move(self, moves: Sequence[Move]) -> None:
        """Move tokens to other places in their rows, in every layer, between passes. Waits for what
        is on its way to host memory."""
        if not moves:
            return
        for span in self.rows.spans:
            origins, goals = (
                torch.tensor(places, device=self.device) for places in moved_places(moves, span)
            )
            for layer_idx, memory in self._memory.items():
                if self._spans[layer_idx] is span:
                    memory[goals] = memory[origins]
        if self.host is not None:
            self.host.move(moves)
        for move in moves:
            move.row.moved_from = move.first

    def close(self) -> None:
        """Return all memory, after the streamer has been closed."""
        self._memory.clear()
        if self.host is not None:
            self.host.close()
