"""Attention on a GPU in which a token's bits depend on its own row's keys and values only.

The kernels of decode attention serve: a program of theirs has one token, which it finds in device
memory, and parts of its positions that go by its own position. So any tokens can be taken by them,
those of a prompt, of a draft, of several rows, some at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..kernels.fused import current
from ..kv.blocks import BLOCK
from ..kv.cache import KVCache
from ..kv.rows import BlockTable, Span
from ..models.config import ModelConfig
from ..models.rope import Rotary
from ..models.rope_config import Rope
from .batch import Chunk
from .splits import STATS, block_of

if TYPE_CHECKING:
    from ..kernels.decode_launching import Look

SPLITS = 16
"""Parts of a token's positions, in any engine: one row that decodes gives work to so many times as
many programs as there are key-value heads."""
AT_ONCE = 64
"""Tokens of a launch: fewer than a ring's slack, so that none stores over what another one sees."""


def parts_nbytes(heads: int, width: int) -> int:
    """What the parts of a launch take on the device."""
    return AT_ONCE * heads * SPLITS * (width + STATS) * 4


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Memory for the parts of a launch, on one device."""

    sums: torch.Tensor
    stats: torch.Tensor

    @classmethod
    def take(cls, config: ModelConfig, device: torch.device) -> Parts:
        """For any launch of a model."""
        lines = AT_ONCE * config.num_heads * SPLITS
        with torch.inference_mode(False):
            sums = torch.empty(lines * config.head_dim, dtype=torch.float32, device=device)
            return cls(sums, torch.empty(lines * STATS, dtype=torch.float32, device=device))


class TokenAttention:
    """The attention of one chunk in any layer, which rotates by itself. Lives as long as its
    pass."""

    rotates = True

    def __init__(
        self,
        chunk: Chunk,
        config: ModelConfig,
        kv: KVCache,
        rotary: Rotary,
        parts: Parts,
        *,
        interleaved: bool,
    ) -> None:
        """``interleaved``: see ``rope.rotate``. ValueError for a draft that is no chain: a program
        finds positions by their places."""
        if any(piece.branches is not None for piece in chunk.pieces):
            raise ValueError("a draft that is a tree: only chains are computed reproducibly here")
        self._chunk, self._config, self._kv, self._rotary = chunk, config, kv, rotary
        self._parts, self._interleaved = parts, interleaved
        table, device = BlockTable(kv.rows.spans), chunk.positions.device
        counts = torch.tensor([piece.count for piece in chunk.pieces], device="cpu")
        lines = torch.arange(len(counts), device="cpu").repeat_interleave(counts).to(device)
        self._numbers = torch.stack((chunk.positions, lines), 1).split(AT_ONCE)
        rows = table.lines([piece.row for piece in chunk.pieces])
        self._blocks = torch.tensor(rows, dtype=torch.int32, device="cpu").to(device)
        self._columns = table.columns
        self._tables: dict[Rope, list[torch.Tensor]] = {}

    def __call__(
        self,
        layer_idx: int,
        span: Span,
        memory: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``RowAttention``, of queries and keys that have not been rotated."""
        from ..kernels.decode_launching import Look, launch_attention, launch_rotate_and_store

        look = Look(
            numbers=self._numbers[0],
            blocks=self._blocks,
            column=self._columns[span],
            window=span.window,
            splits=SPLITS,
            block=block_of(self._config.head_dim, memory.dtype),
            sums=self._parts.sums,
            stats=self._parts.stats,
        )
        mixed, first = [], 0
        for numbers, table in zip(self._numbers, self._table(layer_idx), strict=True):
            own = replace(look, numbers=numbers)
            q, k, v = (x[:, first : first + len(numbers)] for x in qkv)
            scale = self._config.attention_scale
            with current(memory):
                turned_THE = launch_rotate_and_store(
                    (q, k, v), table, memory, own, interleaved=self._interleaved
                )
                self._round(layer_idx, memory, own)
                mixed.append(launch_attention(turned_THE, memory, own, scale, sinks_H))
            first += len(numbers)
        return torch.cat(mixed).transpose(0, 1)

    def _round(self, layer_idx: int, memory: torch.Tensor, look: Look) -> None:
        """What a launch has stored, as the layer keeps it."""
        if self._kv.codes(layer_idx):
            positions, lines = look.numbers.unbind(1)
            positions = positions % look.blocks[lines, look.column]
            blocks = look.blocks[lines, look.column + 1 + positions // BLOCK]
            places = blocks.long() * BLOCK + positions % BLOCK
            memory[places] = self._kv.as_kept(layer_idx, memory[places])

    def _table(self, layer_idx: int) -> list[torch.Tensor]:
        """The rotations of the tokens of each launch."""
        rope, chunk = self._config.rope(layer_idx), self._chunk
        if rope not in self._tables:
            table = self._rotary.rows(layer_idx, chunk.positions, chunk.lengths)
            self._tables[rope] = [part.contiguous() for part in table.split(AT_ONCE, 1)]
        return self._tables[rope]
