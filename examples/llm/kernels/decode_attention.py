"""Triton kernels of attention in passes that add one token to each of a few rows.

What changes from pass to pass, positions and places, is read from device memory, so that one
captured launch serves them all. A token has its numbers in one line of ``numbers`` (tokens,
NUMBERS), int64: its position, and its row's line in ``blocks`` (lines, BLOCKS), int32, where from
COLUMN on are how many places the row has in the layer, and which blocks of PLACES they are in:
position p lies where p modulo their number would.

  memory  (places, 2, groups, WIDTH): a token's keys, then its values, of each key-value head
  sums    (tokens, heads, SPLITS, WIDTH) float32: a part's values, weighted
  stats   (tokens, heads, SPLITS, 2) float32: a part's largest score, and its sum of weights
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keys_seen(numbers: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """How many positions a token sees, itself and those before it; WINDOW 0: all."""
    seen = tl.load(numbers).to(tl.int32) + 1
    return tl.minimum(seen, WINDOW) if WINDOW else seen


@triton.jit
def place_of(position: tl.tensor, blocks: tl.tensor, PLACES: tl.constexpr) -> tl.tensor:
    """Where one or several positions lie, by a row's size and blocks."""
    position %= tl.load(blocks)
    block = tl.load(blocks + 1 + position // PLACES)
    return block.to(tl.int64) * PLACES + position % PLACES


@triton.jit
def places_of(
    first: tl.tensor,
    blocks: tl.tensor,
    WINDOW: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Where BLOCK positions from ``first`` on are: without a window in one block, in no ring."""
    offset = tl.arange(0, BLOCK)
    if WINDOW:
        return place_of(first + offset, blocks, PLACES)
    block = tl.load(blocks + 1 + first // PLACES)
    return block.to(tl.int64) * PLACES + first % PLACES + offset


@triton.jit
def part_size(seen: tl.tensor, SPLITS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Positions of a part, in whole blocks: all parts but the last are of one size, so that few
    positions are few parts, and many are shared out evenly."""
    return tl.cdiv(tl.cdiv(seen, SPLITS), BLOCK) * BLOCK


@triton.jit
def own_part(
    numbers: tl.tensor, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """From which position to which the program's part goes; to none if it has no part."""
    seen = keys_seen(numbers, WINDOW)
    part = part_size(seen, SPLITS, BLOCK)
    length = tl.load(numbers).to(tl.int32) + 1
    begin = length - seen + tl.program_id(0) * part
    return begin, tl.minimum(begin + part, length)


@triton.jit
def add_block(  # noqa: PLR0913 - a kernel has no records
    largest: tl.tensor,
    weights: tl.tensor,
    mixed: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    there: tl.tensor,
    scale: float,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Largest score, sum of weights and weighted values of each head (HEADS, and COLUMNS), with
    those of a block of positions (BLOCK, COLUMNS), of which some are ``there``."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(there[None, :], scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, axis=1))
    shrink = tl.exp2(largest - larger)
    weight = tl.exp2(scores - larger[:, None])
    more = tl.dot(weight.to(values.dtype), values, input_precision="ieee")
    weights = weights * shrink + tl.sum(weight, axis=1)
    return larger, weights, mixed * shrink[:, None] + more


@triton.jit
def store_stats(stats: tl.tensor, largest: tl.tensor, weights: tl.tensor, own: tl.tensor) -> None:
    """A part's, of each head that is ``own``."""
    tl.store(stats, largest, mask=own)
    tl.store(stats + 1, weights, mask=own)


@triton.jit
def attend_part(  # noqa: PLR0913 - a kernel has no records
    q: tl.tensor,
    memory: tl.tensor,
    numbers: tl.tensor,
    blocks: tl.tensor,
    sums: tl.tensor,
    stats: tl.tensor,
    scale: float,
    NUMBERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMN: tl.constexpr,
    PLACES: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program takes a part of the positions that a token sees, if any, for the GROUP query heads
    of a group. q is (tokens, heads, WIDTH), ``scale`` of powers of two; HEADS, COLUMNS rounded."""
    split, group, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    numbers += token * NUMBERS
    begin, end = own_part(numbers, WINDOW, SPLITS, BLOCK)
    if begin < end:
        blocks += tl.load(numbers + 1) * BLOCKS + COLUMN
        memory += group * WIDTH
        head, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
        own = (head < GROUP)[:, None] & (column < WIDTH)[None, :]
        line = (token * groups + group) * GROUP + head
        queries = tl.load(q + line[:, None] * WIDTH + column[None, :], mask=own, other=0)
        largest = tl.full((HEADS,), float("-inf"), tl.float32)
        weights = tl.zeros((HEADS,), tl.float32)
        mixed = tl.zeros((HEADS, COLUMNS), tl.float32)
        for first in range(begin, end, BLOCK):
            position = first + tl.arange(0, BLOCK)
            there = position < end
            place = places_of(first, blocks, WINDOW, PLACES, BLOCK)
            at = memory + place[:, None] * (2 * groups * WIDTH) + column[None, :]
            inside = there[:, None] & (column < WIDTH)[None, :]
            keys = tl.load(at, mask=inside, other=0)
            values = tl.load(at + groups * WIDTH, mask=inside, other=0)
            largest, weights, mixed = add_block(
                largest, weights, mixed, queries, keys, values, there, scale
            )
        line = line * SPLITS + split
        store_stats(stats + line * 2, largest, weights, head < GROUP)
        tl.store(sums + line[:, None] * WIDTH + column[None, :], mixed, mask=own)


@triton.jit
def combine_parts(  # noqa: PLR0913 - a kernel has no records
    sums: tl.tensor,
    stats: tl.tensor,
    numbers: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    NUMBERS: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """A program adds up the parts of one head of one token: out is (tokens, heads, WIDTH). ROUNDED
    is SPLITS rounded up to a power of two. SINKS: ``sinks`` (heads) has a score of each head beside
    those of positions, not of powers of two."""
    token = tl.program_id(1)
    line = token * tl.num_programs(0) + tl.program_id(0)
    seen = keys_seen(numbers + token * NUMBERS, WINDOW)
    split, column = tl.arange(0, ROUNDED), tl.arange(0, COLUMNS)
    there = split < tl.cdiv(seen, part_size(seen, SPLITS, BLOCK))
    stats += (line * SPLITS + split) * 2
    largest = tl.load(stats, mask=there, other=float("-inf"))
    top = tl.max(largest, axis=0)
    if SINKS:
        sink = tl.load(sinks + tl.program_id(0)).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    share = tl.exp2(largest - top)
    weights = tl.sum(tl.load(stats + 1, mask=there, other=0) * share, axis=0)
    if SINKS:
        weights += tl.exp2(sink - top)
    inside = there[:, None] & (column < WIDTH)[None, :]
    at = (line * SPLITS + split)[:, None] * WIDTH + column[None, :]
    parts = tl.load(sums + at, mask=inside, other=0)
    mixed = tl.sum(parts * share[:, None], axis=0) / weights
    tl.store(out + line * WIDTH + column, mixed.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def rope(  # noqa: PLR0913 - a kernel has no records
    x: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """Rotate one head's pairs, (i, i + WIDTH / 2) or (2 i, 2 i + 1), and put them in the places
    (i, i + WIDTH / 2)."""
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH // 2
    first_at = 2 * column if INTERLEAVED else column
    second_at = 2 * column + 1 if INTERLEAVED else column + WIDTH // 2
    first = tl.load(x + first_at, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + second_at, mask=inside, other=0).to(tl.float32)
    cosine = tl.load(cosines + column, mask=inside, other=0)
    sine = tl.load(sines + column, mask=inside, other=0)
    kind = out.dtype.element_ty
    tl.store(out + column, (first * cosine - second * sine).to(kind), mask=inside)
    tl.store(out + column + WIDTH // 2, (second * cosine + first * sine).to(kind), mask=inside)


@triton.jit
def rotate_and_store(  # noqa: PLR0913 - a kernel has no records
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    table: tl.tensor,
    turned: tl.tensor,
    memory: tl.tensor,
    numbers: tl.tensor,
    blocks: tl.tensor,
    q_token: int,
    q_head: int,
    k_token: int,
    k_head: int,
    v_token: int,
    v_head: int,
    NUMBERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMN: tl.constexpr,
    PLACES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """A program takes one head of one token: a query's is rotated into ``turned`` (tokens, HEADS,
    WIDTH), a key's into its place in ``memory``, a value's is copied there.

    ``table`` is (2, tokens, WIDTH / 2) float32; COLUMNS is WIDTH / 2 rounded up.
    """
    head, token = tl.program_id(0), tl.program_id(1)
    cosines = table + token * (WIDTH // 2)
    sines = cosines + tl.num_programs(1) * (WIDTH // 2)
    numbers += token * NUMBERS
    blocks += tl.load(numbers + 1) * BLOCKS + COLUMN
    memory += place_of(tl.load(numbers), blocks, PLACES) * (2 * GROUPS * WIDTH)
    if head < HEADS:
        out = turned + (token * HEADS + head) * WIDTH
        rope(q + token * q_token + head * q_head, cosines, sines, out, WIDTH, COLUMNS, INTERLEAVED)
    elif head < HEADS + GROUPS:
        group = head - HEADS
        out = memory + group * WIDTH
        rope(k + token * k_token + group * k_head, cosines, sines, out, WIDTH, COLUMNS, INTERLEAVED)
    else:
        group = head - HEADS - GROUPS
        column = tl.arange(0, 2 * COLUMNS)
        inside = column < WIDTH
        value = tl.load(v + token * v_token + group * v_head + column, mask=inside, other=0)
        tl.store(memory + (GROUPS + group) * WIDTH + column, value, mask=inside)
