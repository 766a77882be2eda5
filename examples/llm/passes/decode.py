"""Passes in which every row takes one token, over a model of which nothing streams.

Where the GPU computes a layer faster than Python launches its kernels, launching is what takes the
time. Such a pass is launched once for each number of rows, captured in a CUDA graph, and replayed:
what differs from pass to pass, tokens, positions and places, is in device memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..kernels.triton_support import triton_serves
from ..kv.cache import KVCache
from ..kv.rows import BlockTable, Row, Span
from ..models.config import ModelConfig
from ..models.rope import Rotary
from ..models.rope_config import Rope
from .batch import Batch, Chunk, Entry
from .graphs import Graphs
from .layers import Layers
from .splits import STATS, block_of, fits_kernels, splits_of

if TYPE_CHECKING:
    from ..kernels.decode_launching import Look

logger = logging.getLogger(__name__)

MOST_ROWS = 8
"""Rows up to which passes are captured: with more, the work outgrows the launches."""


def captured_rows(device: torch.device, config: ModelConfig) -> int:
    """Rows up to which passes may be captured on this device; 0: none can be."""
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    served = device.type == "cuda" and fits_kernels(*heads) and triton_serves(device)
    return MOST_ROWS if served else 0


def obstacle(streamer: Layers, kv: KVCache, config: ModelConfig) -> str | None:
    """Why no pass over this model can be captured; None: those that decode can."""
    if len(streamer.devices) > 1:
        return "layers are on several devices"
    if set(streamer.plan.tiers) != {"device"}:
        return "layers are streamed"
    if kv.host is not None:
        return "keys and values are in host memory"
    if not fits_kernels(config.num_heads, config.num_kv_heads, config.head_dim):
        return "its heads are too wide for the kernels"
    return None if triton_serves(kv.device) else "Triton does not serve the device"


class Decoder:
    """Does the passes in which every row takes one token.

    ``steps`` are what a pass of the streamer has handed out, all of it resident on the device;
    empty until there was one. So scales have been checked, in that pass. On a GPU, passes are
    captured; on a CPU, where Triton's interpreter serves, they are only launched.
    """

    def __init__(
        self, config: ModelConfig, kv: KVCache, rotary: Rotary, *, rows: int, interleaved: bool
    ) -> None:
        """``rows``: the most that are taken. ``interleaved``: see ``rope.rotate``."""
        self.steps: Sequence[tuple[int, Mapping[str, torch.Tensor]]] = ()
        self.passes = 0
        """How many have been done here."""
        self._config, self._rotary, self._rows = config, rotary, rows
        self._interleaved = interleaved
        device = kv.device
        self._spans = kv.rows.spans
        self._table = BlockTable(self._spans)
        self._filled: list[Row] = []
        """Whose blocks are in the table."""
        block = block_of(config.head_dim, kv.layout.dtype)
        most = kv.layout.tokens
        splits = {s: splits_of(min(s.window or most, most), block) for s in self._spans}
        lines = rows * config.num_heads * max(splits.values())
        with torch.inference_mode(False):
            self._numbers = torch.zeros(rows, 3, dtype=torch.long, device=device)
            self._blocks = torch.zeros(rows, self._table.width, dtype=torch.int32, device=device)
            self._last = torch.arange(rows, device=device)
            self._logits = torch.empty(rows, config.vocab_size, dtype=torch.float32, device=device)
            self._sums = torch.empty(lines * config.head_dim, dtype=torch.float32, device=device)
            self._stats = torch.empty(lines * STATS, dtype=torch.float32, device=device)
        self._block, self._splits = block, splits
        self._graphs = Graphs(device) if device.type == "cuda" else None

    def takes(self, entries: Sequence[Entry]) -> bool:
        """True: ``forward`` can do this pass."""
        if not self.steps or len(entries) > self._rows:
            return False
        if self._graphs is not None and self._graphs.failed:
            return False
        return all(len(ids) == 1 for _, ids in entries)

    def fill(self, entries: Sequence[Entry]) -> Batch:
        """What the pass needs to know, brought to where its launches look for it."""
        rows = [row for row, _ in entries]
        values = [[row.length, line, row.length + 1] for line, row in enumerate(rows)]
        numbers = self._numbers[: len(values)]
        # From pageable memory, which the driver has read when this returns.
        numbers.copy_(torch.tensor(values, device="cpu"), non_blocking=True)
        if rows != self._filled:
            lines = torch.tensor(self._table.lines(rows), dtype=torch.int32, device="cpu")
            self._blocks[: len(lines)].copy_(lines, non_blocking=True)
            self._filled = rows
        chunk = Chunk(0, (), numbers[:, 0], numbers[:, 2])
        ids = torch.tensor([int(ids[0]) for _, ids in entries], device="cpu")
        return Batch(ids, tuple((row, 1) for row in rows), (chunk,), self._last[: len(rows)])

    def attention(self, batch: Batch) -> DecodeAttention:
        """How the rows of a pass look back."""
        from ..kernels.decode_launching import Look

        numbers = self._numbers[: len(batch.ids)]
        looks = {
            span: Look(
                numbers=numbers,
                blocks=self._blocks,
                column=self._table.columns[span],
                window=span.window,
                splits=self._splits[span],
                block=self._block,
                sums=self._sums,
                stats=self._stats,
            )
            for span in self._spans
        }
        return DecodeAttention(
            self._config, self._rotary, batch, looks, interleaved=self._interleaved
        )

    def logits(self, batch: Batch) -> torch.Tensor:
        """Where a pass writes them, (R, V): the same memory in every pass."""
        return self._logits[: len(batch.ids)]

    def forward(self, batch: Batch, work: Callable[[], None]) -> torch.Tensor | None:
        """The logits of a pass whose launches are ``work``; None: it failed, nothing is changed
        but what the same pass will write again."""
        if self._graphs is None:
            work()
        elif not self._graphs.run(len(batch.ids), work):
            return None
        self.passes += 1
        return self.logits(batch).clone()


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
        self._tables: dict[Rope, torch.Tensor] = {}

    def __call__(
        self,
        layer_idx: int,
        span: Span,
        memory: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """As ``RowAttention``, of queries and keys that have not been rotated."""
        from ..kernels.decode_launching import launch_attention, launch_rotate_and_store

        look, table = self._looks[span], self._table(layer_idx)
        turned_THE = launch_rotate_and_store(
            qkv, table, memory, look, interleaved=self._interleaved
        )
        scale = self._config.attention_scale
        return launch_attention(turned_THE, memory, look, scale).transpose(0, 1)

    def _table(self, layer_idx: int) -> torch.Tensor:
        rope = self._config.rope(layer_idx)
        if rope not in self._tables:
            positions, lengths = self._chunk.positions, self._chunk.lengths
            self._tables[rope] = self._rotary.rows(layer_idx, positions, lengths)
        return self._tables[rope]


def open_decoder(
    streamer: Layers,
    config: ModelConfig,
    kv: KVCache,
    rotary: Rotary,
    *,
    rows: int,
    interleaved: bool,
) -> Decoder | None:
    """A decoder for up to so many rows, where one can serve; where not, a line says why."""
    if not rows:
        return None
    problem = obstacle(streamer, kv, config)
    if problem is not None:
        logger.info("decoding goes layer by layer: %s", problem)
        return None
    return Decoder(config, kv, rotary, rows=rows, interleaved=interleaved)
