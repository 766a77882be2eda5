"""Attention on a CPU in which a token's bits depend on its own row's keys and values only.

What torch's attention sums up, and in which order, goes by the numbers of queries and of keys.
Here queries and keys are cut at fixed positions of their row: a tile of QUERIES positions looks at
one block of KEYS positions after the other, from the first that its window reaches to its own. All
products and sums are of one shape whatever the pass brings, and a token always has the same place
in them. Positions that are not there are zeros, and what a query does not see weighs exactly 0.

Shapes, beside those of attention.py: L query heads of a group times QUERIES (L = S * QUERIES).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..drafts.branches import Branches
from ..kv.cache import KVCache
from ..kv.rows import Span
from ..models.config import ModelConfig
from ..models.rope import Rotary, plain_rotate
from ..models.rope_config import Rope
from .batch import Chunk, Piece
from .row_attention import store_and_look_back

QUERIES, KEYS = 8, 128
"""Of the sizes that were tried, the least together for one token and for a prompt. The second is a
multiple of the first, so that a tile ends in one block."""


class AlignedAttention:
    """The attention of one chunk in any layer, which rotates by itself. Lives as long as its pass.

    Computes in float32. Memory: queries and sums of the chunk, and one block of one row's keys and
    values.
    """

    rotates = True

    def __init__(
        self, chunk: Chunk, config: ModelConfig, kv: KVCache, rotary: Rotary, *, interleaved: bool
    ) -> None:
        """``interleaved``: see ``rope.rotate``."""
        self._chunk, self._config, self._kv, self._rotary = chunk, config, kv, rotary
        self._interleaved = interleaved
        self._tables: dict[Rope, torch.Tensor] = {}

    def __call__(
        self,
        layer_idx: int,
        span: Span,
        memory: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``RowAttention``, of queries and keys that have not been rotated."""
        table = self._table(layer_idx)
        q_HTE, k_GTE = (plain_rotate(x, table, interleaved=self._interleaved) for x in qkv[:2])
        k_GTE, v_GTE = (self._kv.as_kept(layer_idx, x) for x in (k_GTE, qkv[2]))
        heads, tokens, width = q_HTE.shape
        mixed_THE = q_HTE.new_empty(tokens, heads, width)
        for piece in self._chunk.pieces:
            part = slice(piece.offset, piece.offset + piece.count)
            k, v = store_and_look_back(span, memory, piece, k_GTE[:, part], v_GTE[:, part])
            own, seen = (q_HTE[:, part], k, v), _Seen(span.window, sinks_H)
            if piece.branches is None:
                mixed_THE[part] = self._attend(own, piece.position, seen).transpose(0, 1)
            else:
                self._attend_branches(own, piece, piece.branches, seen, mixed_THE[part])
        return mixed_THE.transpose(0, 1)

    def _attend_branches(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        piece: Piece,
        branches: Branches,
        look: _Seen,
        out_THE: torch.Tensor,
    ) -> None:
        """A piece with tokens of a tree, branch by branch, as if each stood alone."""
        q_HTE, k_GPE, v_GPE = qkv
        begin, seen = piece.position, piece.seen(look.window)
        for tokens, followed in branches.alone(begin, begin + piece.count):
            own = [place - begin for place in tokens]
            at = [place - seen for place in (*range(seen, branches.first), *followed)]
            position = seen + len(at) - len(own)
            taken = q_HTE[:, own], k_GPE[:, at], v_GPE[:, at]
            out_THE[own] = self._attend(taken, position, look).transpose(0, 1)

    def _attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        position: int,
        look: _Seen,
    ) -> torch.Tensor:
        """Mixed values (H, T, E) of a row's tokens from ``position`` on, the last T of the P that
        are given."""
        q_HTE, k_GPE, v_GPE = qkv
        tokens = q_HTE.shape[1]
        end = position + tokens
        first_tile = position // QUERIES
        before = position - first_tile * QUERIES
        count = -(-end // QUERIES) - first_tile
        q = q_HTE.new_zeros(len(q_HTE), count * QUERIES, q_HTE.shape[2], dtype=torch.float32)
        q[:, before : before + tokens] = q_HTE
        # (tiles, G, L, E): as each product takes it, in memory of its own
        shape = (k_GPE.shape[0], -1, count, QUERIES, q.shape[2])
        q = q.view(shape).permute(2, 0, 1, 3, 4).contiguous().flatten(2, 3)
        q *= self._config.attention_scale
        tiles = [_Tile((first_tile + i) * QUERIES, part, look) for i, part in enumerate(q)]
        for first, keys, values in _blocks(k_GPE, v_GPE, end):
            for tile in tiles:
                if tile.reaches(first):
                    tile.add(first, keys, values)
        mixed = torch.stack([tile.mixed() for tile in tiles], 2)
        mixed = mixed.unflatten(1, (-1, QUERIES)).transpose(2, 3).flatten(0, 1).flatten(1, 2)
        own: torch.Tensor = mixed[:, before : before + tokens]
        return own

    def _table(self, layer_idx: int) -> torch.Tensor:
        """The rotations of the chunk's tokens, (2, T, E / 2). Each is computed by itself: torch
        takes the ends of a tensor by another cosine than what it takes as vectors."""
        rope, chunk = self._config.rope(layer_idx), self._chunk
        if rope not in self._tables:
            numbers = zip(chunk.positions.split(1), chunk.lengths.split(1), strict=True)
            self._tables[rope] = torch.cat([self._rotary.rows(layer_idx, *n) for n in numbers], 1)
        return self._tables[rope]


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """What the queries of a layer see beside keys up to their own."""

    window: int | None
    sinks_H: torch.Tensor | None


class _Tile:
    """Queries at QUERIES positions, and what has been added up for them."""

    def __init__(self, first: int, q_GLE: torch.Tensor, look: _Seen) -> None:
        """``q_GLE``: scaled, those of the position ``first`` and of the next ones."""
        self._first, self._q, self._window = first, q_GLE, look.window
        self._largest = q_GLE.new_full((*q_GLE.shape[:2], 1), -torch.inf)
        self._weights = q_GLE.new_zeros(self._largest.shape)
        if look.sinks_H is not None:  # as if it had been seen before all keys
            sinks_GS = look.sinks_H.float().view(len(q_GLE), -1)
            self._largest[..., 0] = sinks_GS.repeat_interleave(QUERIES, 1)
            self._weights.fill_(1.0)
        self._mixed = torch.zeros_like(q_GLE)

    def reaches(self, block: int) -> bool:
        """True if any of the positions, there or not, sees any of a block that begins there."""
        if block > self._first:
            return False
        return self._window is None or block + KEYS > self._first - self._window + 1

    def add(self, block: int, k_GKE: torch.Tensor, v_GKE: torch.Tensor) -> None:
        """A block of keys and values. One of which a query sees nothing leaves its sums as they
        are, to the bit."""
        scores = torch.bmm(self._q, k_GKE.transpose(1, 2))
        hidden = self._hidden(block)
        if hidden is not None:
            scores.unflatten(1, (-1, QUERIES)).masked_fill_(hidden, -torch.inf)
        larger = torch.maximum(self._largest, scores.amax(-1, keepdim=True))
        base = larger.masked_fill(larger == -torch.inf, 0.0)  # nothing was seen yet
        shrink = (self._largest - base).exp_()
        weights = scores.sub_(base).exp_()
        self._weights.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        self._mixed.mul_(shrink).add_(torch.bmm(weights, v_GKE))
        self._largest = larger

    def mixed(self) -> torch.Tensor:
        """(G, L, E), at the end."""
        return self._mixed.div_(self._weights)

    def _hidden(self, block: int) -> torch.Tensor | None:
        """Which keys of a block each of the positions does not see, (QUERIES, KEYS); None: of all
        it sees all."""
        last, window = self._first + QUERIES - 1, self._window
        if block + KEYS - 1 <= self._first and (window is None or block > last - window):
            return None
        at = torch.arange(self._first, last + 1, device="cpu")[:, None]
        keys = torch.arange(block, block + KEYS, device="cpu")
        hidden = keys > at
        return hidden if window is None else hidden | (keys <= at - window)


def _blocks(
    k_GPE: torch.Tensor, v_GPE: torch.Tensor, end: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first position, keys, values (G, KEYS, E) in float32) of all blocks that the P positions
    before ``end`` are in, zeros where they are not."""
    seen = end - k_GPE.shape[1]
    for first in range(seen // KEYS * KEYS, end, KEYS):
        begin, stop = max(first, seen), min(first + KEYS, end)
        shape = (k_GPE.shape[0], KEYS, k_GPE.shape[2])
        both = k_GPE.new_zeros(2, *shape, dtype=torch.float32)
        both[0, :, begin - first : stop - first] = k_GPE[:, begin - seen : stop - seen]
        both[1, :, begin - first : stop - first] = v_GPE[:, begin - seen : stop - seen]
        yield first, both[0], both[1]


def blocks_nbytes(heads: int, groups: int, width: int) -> int:
    """What one block of keys and values takes at a time, with its scores, and tiles that a row
    fills in part only."""
    scores, padding = 4 * QUERIES * KEYS * heads, 2 * 4 * QUERIES * heads * width
    return 4 * (4 * KEYS * groups * width + scores + padding)
