"""Attention of one chunk of a pass: stores new keys and values, and looks back row by row.

Rows that decode one token each are taken together on a device where a call costs more than its
work: their keys are gathered, padded to the longest of a few, and masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..host_kernels.tokens import look_back, looks
from ..kv.blocks import BLOCK
from ..kv.cache import KVCache
from ..kv.rows import BlockTable, Row, Span
from ..models.config import ModelConfig
from . import attention
from .batch import Chunk, Piece

GATHER_NBYTES = 64 << 20
"""Keys and values that are gathered at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Decoding rows that are attended to together, in one span."""

    offsets_R: torch.Tensor
    """Where in the chunk their tokens are."""
    new_R: torch.Tensor
    """The places of their tokens."""
    places_RP: torch.Tensor
    mask_RP: torch.Tensor


class RowAttention:
    """The attention of one chunk in any layer. Lives as long as its pass."""

    rotates = False

    def __init__(
        self,
        chunk: Chunk,
        config: ModelConfig,
        kv: KVCache,
        *,
        most_together: int,
        widened: bool = False,
    ) -> None:
        """Rows that decode are taken together if they have up to ``most_together`` tokens.
        ``widened``: of those that are not, keys and values are looked at in float32, as queries
        then are: torch's products of bfloat16 on a CPU take ten times as long."""
        self._config, self._kv, self._widened = config, kv, widened
        short = [
            p
            for p in chunk.pieces
            if p.count == 1 and p.branches is None and p.position < most_together
        ]
        self._together = short if len(short) > 1 else []
        taken = set(map(id, self._together))
        self._single = [piece for piece in chunk.pieces if id(piece) not in taken]
        self._groups: dict[Span, list[Group]] = {}

    def __call__(
        self,
        layer_idx: int,
        span: Span,
        memory: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mixed values (H, T, E) of queries (H, T, E) and new keys and values (G, T, E).

        ``memory`` (places, 2, G, E) are the layer's keys and values, which get the new ones.
        """
        q_HTE = qkv[0]
        k_GTE, v_GTE = (self._kv.as_kept(layer_idx, x) for x in qkv[1:])
        heads, tokens, width = q_HTE.shape
        mixed_THE = q_HTE.new_empty(tokens, heads, width)
        scale = self._config.attention_scale
        attend, attend_masked, attend_rows = (
            partial(function, scale=scale, sinks_H=sinks_H)
            for function in (attention.attend, attention.attend_masked, attention.attend_rows)
        )
        for piece in self._single:
            part = slice(piece.offset, piece.offset + piece.count)
            own = q_HTE[:, part], k_GTE[:, part], v_GTE[:, part]
            mixed = self._in_one(span, memory, piece, own, sinks_H)
            if mixed is None:
                k, v = store_and_look_back(span, memory, piece, *own[1:])
                if self._widened:
                    k, v = k.float(), v.float()
                if piece.branches is None:
                    mixed = attend(own[0], k, v, window=span.window)
                else:
                    seen, end = piece.seen(span.window), piece.position + piece.count
                    mask = piece.branches.mask(piece.position, end, seen, span.window)
                    mixed = attend_masked(own[0], k, v, mask)
            if piece.count == tokens:
                return mixed
            mixed_THE[part] = mixed.transpose(0, 1)
        if self._together:
            if span not in self._groups:
                self._groups[span] = list(make_groups(self._together, span, memory))
            for group in self._groups[span]:
                new = torch.stack((k_GTE, v_GTE), 0)[:, :, group.offsets_R]
                memory[group.new_R] = new.permute(2, 0, 1, 3)
                q_RHE = q_HTE[:, group.offsets_R].transpose(0, 1)
                k_RGPE, v_RGPE = memory[group.places_RP].permute(2, 0, 3, 1, 4)
                mixed = attend_rows(q_RHE, k_RGPE, v_RGPE, group.mask_RP)
                mixed_THE[group.offsets_R] = mixed
        return mixed_THE.transpose(0, 1)

    def _in_one(
        self,
        span: Span,
        memory: torch.Tensor,
        piece: Piece,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """What a processor's own kernel mixes for a row's few tokens, whose keys and values are
        stored first; None: it does not serve, and nothing is stored."""
        first, end, seen = piece.position, piece.position + piece.count, piece.seen(span.window)
        fits = sinks_H is None and piece.branches is None and piece.row.holds(span, seen, end)
        if not fits or not looks(qkv[0], memory):
            return None
        _store(span, memory, piece.row, (first, end), *qkv[1:])
        runs = list(piece.row.places(span, seen, end))
        scale, window = self._config.attention_scale, span.window
        return look_back(qkv[0], memory, runs, scale=scale, window=window)


def store_and_look_back(
    span: Span, memory: torch.Tensor, piece: Piece, k_GTE: torch.Tensor, v_GTE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store a row's new tokens; keys and values (G, P, E) of all that its queries see."""
    first, end = piece.position, piece.position + piece.count
    seen = piece.seen(span.window)
    if piece.row.holds(span, seen, end):
        _store(span, memory, piece.row, (first, end), k_GTE, v_GTE)
        both = _read(span, memory, piece.row, seen, end)
        return both[:, 0].transpose(0, 1), both[:, 1].transpose(0, 1)
    # The new tokens overwrite some that their own queries see: look back first.
    before = _read(span, memory, piece.row, seen, first)
    keys = torch.cat((before[:, 0].transpose(0, 1), k_GTE), 1)
    values = torch.cat((before[:, 1].transpose(0, 1), v_GTE), 1)
    _store(span, memory, piece.row, (first, end), k_GTE, v_GTE)
    return keys, values


def _read(span: Span, memory: torch.Tensor, row: Row, first: int, end: int) -> torch.Tensor:
    """Positions from first to end, (P, 2, G, E): a view if they lie together."""
    parts = [memory[place : place + count] for place, count in row.places(span, first, end)]
    if not parts:
        return memory[:0]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _store(
    span: Span,
    memory: torch.Tensor,
    row: Row,
    positions: tuple[int, int],
    k_GTE: torch.Tensor,
    v_GTE: torch.Tensor,
) -> None:
    """Keep as many of the new tokens as the row has places for: the last ones."""
    places = row.places(span, *positions)
    at = k_GTE.shape[1] - sum(count for _, count in places)
    for place, count in places:
        part = slice(at, at + count)
        memory[place : place + count, 0] = k_GTE[:, part].transpose(0, 1)
        memory[place : place + count, 1] = v_GTE[:, part].transpose(0, 1)
        at += count


def make_groups(pieces: Sequence[Piece], span: Span, memory: torch.Tensor) -> Iterator[Group]:
    """The decoding rows in groups of similar length, of GATHER_NBYTES each at most."""
    limit = GATHER_NBYTES // memory[:1].nbytes

    def seen(piece: Piece) -> int:
        return min(piece.position + 1, span.window or piece.position + 1)

    waiting = sorted(pieces, key=seen, reverse=True)
    while waiting:
        count = max(1, min(len(waiting), limit // seen(waiting[0])))
        yield _make_group(waiting[:count], [seen(piece) for piece in waiting[:count]], span, memory)
        del waiting[:count]


def _make_group(
    pieces: Sequence[Piece], seen: Sequence[int], span: Span, memory: torch.Tensor
) -> Group:
    rows = BlockTable([span]).lines([piece.row for piece in pieces])
    numbers = [(p.offset, p.position, n) for p, n in zip(pieces, seen, strict=True)]
    lines = [[*n, *line] for n, line in zip(numbers, rows, strict=True)]
    both = torch.tensor(lines, device="cpu").to(memory.device)
    (offsets, positions, counts, sizes), blocks = both[:, :4].unbind(1), both[:, 4:]
    back = torch.arange(max(seen), device=memory.device)  # 0 is the token itself
    mask = back < counts[:, None]
    places = (positions[:, None] - torch.where(mask, back, 0)).remainder(sizes[:, None])
    places = blocks.gather(1, places // BLOCK) * BLOCK + places % BLOCK
    return Group(offsets, places[:, 0], places, mask)
