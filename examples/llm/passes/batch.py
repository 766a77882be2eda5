"""The tokens of one pass: those of several rows one after the other, cut into chunks. Pure.

Nothing is padded: norms and matrices see packed tokens, and only attention knows of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from ..drafts.branches import Branches
from ..drafts.tree import Tree
from ..kv.rows import Row

Entry = tuple[Row, Sequence[int]]
"""A row and the tokens that a pass appends to it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one row within a chunk."""

    row: Row
    offset: int
    """Where in the chunk they begin."""
    count: int
    position: int
    """Of the first of them in its row."""
    branches: Branches | None = None
    """Where some of them are a draft that is no chain; then ``position`` is a place."""

    def seen(self, window: int | None) -> int:
        """From which place of its row on something is seen by them."""
        if self.branches is not None:
            return self.branches.seen(self.position, self.position + self.count, window)
        return 0 if window is None else max(0, self.position - window + 1)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Tokens that go through a layer at a time."""

    first: int
    """Where in the pass they begin."""
    pieces: tuple[Piece, ...]
    positions: torch.Tensor
    """(T,): each token's position in its row."""
    lengths: torch.Tensor
    """(T,): how many tokens its row has after the pass, without those that are a draft; to one of
    these it ends with it."""

    @property
    def count(self) -> int:
        return len(self.positions)

    def on(self, device: torch.device) -> Chunk:
        """The same for another device."""
        pieces = list(self.pieces)
        for i, piece in enumerate(pieces):
            if piece.branches is not None:
                there = Branches(piece.branches.first, piece.branches.tree, device)
                pieces[i] = replace(piece, branches=there)
        positions, lengths = (
            some.to(device, non_blocking=True) for some in (self.positions, self.lengths)
        )
        return Chunk(self.first, tuple(pieces), positions, lengths)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one pass computes."""

    ids: torch.Tensor
    """(N,), packed, on the host."""
    rows: tuple[tuple[Row, int], ...]
    """Rows in their order in ``ids``, and how many of its tokens are theirs."""
    chunks: tuple[Chunk, ...]
    last: torch.Tensor
    """(W,): where the last tokens of each row are of which logits are wanted, packed as the rows
    are, on the device."""

    def on(self, device: torch.device) -> Batch:
        """The same for another device, whose layers compute it, too."""
        if self.last.device == device:
            return self
        chunks = tuple(chunk.on(device) for chunk in self.chunks)
        return replace(self, chunks=chunks, last=self.last.to(device, non_blocking=True))


def pack(
    entries: Sequence[Entry],
    chunk_tokens: int,
    device: torch.device,
    wanted: Sequence[int] | None = None,
    drafts: Sequence[Tree] | None = None,
) -> Batch:
    """Lay the tokens of a pass out; what the device needs to know goes there in one transfer.

    ``wanted``: of how many of its last tokens each row's logits are; None: of one. ``drafts``:
    one of each row, perhaps of no tokens, which are the row's last ones.
    """
    ids = [token for _, tokens in entries for token in tokens]
    rows = tuple((row, len(tokens)) for row, tokens in entries)
    branches = _branches(rows, drafts or (), device)
    ends = accumulate(number for _, number in rows)
    drafted = [0] * len(rows) if drafts is None else list(map(len, drafts))
    table = [
        (row.length, end - number, number, row.length + number - behind)
        for end, (row, number), behind in zip(ends, rows, drafted, strict=True)
    ]
    known_R, first_R, count_R, length_R = (
        torch.tensor(table, dtype=torch.long, device="cpu").view(-1, 4).unbind(1)
    )
    # By tensors: a list of a long prompt's positions takes as long as a chunk of it on a GPU.
    positions = torch.arange(len(ids), device="cpu") + (known_R - first_R).repeat_interleave(
        count_R
    )
    for i, own in branches.items():
        end = sum(table[i][1:3])
        positions[end - len(own.tree) : end] = torch.tensor(own.positions, device="cpu")
    lengths = length_R.repeat_interleave(count_R)
    if any(drafted):
        lengths = torch.maximum(lengths, positions + 1)
    wanted_R = torch.ones_like(count_R) if wanted is None else torch.tensor(wanted, device="cpu")
    ends_R = wanted_R.cumsum(0)
    # Of the i-th that is wanted, its place among those of its row, and from there in the pass.
    last = torch.arange(int(ends_R[-1]), device="cpu") + (
        first_R + count_R - ends_R
    ).repeat_interleave(wanted_R)
    numbers = torch.cat((positions, lengths, last)).to(device)
    positions_N, lengths_N, last_R = numbers.split([len(ids), len(ids), len(last)])
    chunks = []
    for first in range(0, len(ids), chunk_tokens):
        end = min(first + chunk_tokens, len(ids))
        pieces = _pieces(rows, branches, first, end)
        chunks.append(Chunk(first, pieces, positions_N[first:end], lengths_N[first:end]))
    return Batch(torch.tensor(ids, device="cpu"), rows, tuple(chunks), last_R)


def _branches(
    rows: Sequence[tuple[Row, int]], drafts: Sequence[Tree], device: torch.device
) -> dict[int, Branches]:
    """Those of the drafts that are no chains, by the numbers of their rows."""
    return {
        i: Branches(rows[i][0].length + rows[i][1] - len(tree), tree, device)
        for i, tree in enumerate(drafts)
        if not tree.is_chain
    }


def _pieces(
    rows: Sequence[tuple[Row, int]], branches: Mapping[int, Branches], first: int, end: int
) -> tuple[Piece, ...]:
    """The rows' parts of the tokens from first to end of a pass."""
    pieces, at = [], 0
    for i, (row, number) in enumerate(rows):
        start, stop = max(at, first), min(at + number, end)
        if start < stop:
            own = branches.get(i)
            if own is not None and row.length + stop - at <= own.first:
                own = None  # none of the tree's
            place = row.length + start - at
            pieces.append(Piece(row, start - first, stop - start, place, own))
        at += number
    return tuple(pieces)
