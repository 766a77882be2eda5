"""Products of many tokens with the experts that they chose, in one launch, on tensor cores.

Experts lie in slots of one bank. Pairs of a token and an expert that it passes are taken in the
order of experts: a program has some that pass the same one, and some of its rows, as a program of
``tile_products`` has tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl

from ..weights.packed import Packed
from . import tiles
from .code_floats import ONE
from .pointwise import rounded
from .tile_products import tile_totals
from .triton_support import run_kernel
from .unpacking import CHUNK, EXACT


@dataclass(frozen=True, slots=True)
class Routed:
    """Pairs of tokens and experts, sorted by experts."""

    tiles_N3: torch.Tensor
    """Of each program's pairs: the slot of their expert, the first of them, the end, which is the
    first if there are none; int32."""
    order_P: torch.Tensor
    """Which pair each of the sorted ones is, token by token; int32."""
    at_once: int
    """Pairs of a program, at most."""


def route(order_P: torch.Tensor, ends: Sequence[int], slots: Sequence[tuple[int, int]]) -> Routed:
    """Programs for experts, given (expert, slot) of each. ``ends``: of each expert's pairs among
    the sorted ones, whose numbers before were ``order_P``. To be waited for by nobody."""
    starts = [0, *ends]
    at_once = _at_once(sum(ends[expert] - starts[expert] for expert, _ in slots), len(slots))
    found = [
        (slot, first, min(first + at_once, ends[expert]))
        for expert, slot in slots
        for first in range(starts[expert], ends[expert], at_once)
    ]
    numbers = torch.from_numpy(np.array(found, dtype=np.int32).reshape(-1, 3))
    if order_P.is_cuda:  # else the host waits until experts on their way have been copied
        numbers = numbers.pin_memory()
    return Routed(numbers.to(order_P.device, non_blocking=True), order_P.int(), at_once)


ROUTED_AT_ONCE = 2048
"""Pairs that a program of ``route_pairs`` looks at."""


def route_all(ids_TK: torch.Tensor, slots_X: torch.Tensor) -> Routed:
    """``route`` where all experts are in these slots, by the device: the host waits for nothing,
    and has programs that find nothing to do started, too. ``ids_TK``: contiguous."""
    pairs, experts, device = ids_TK.numel(), len(slots_X), ids_TK.device
    at_once = _at_once(pairs, experts)
    programs = pairs // at_once + experts
    tiles_N3 = torch.empty(programs, 3, dtype=torch.int32, device=device)
    order_P = torch.empty(pairs, dtype=torch.int32, device=device)
    run_kernel(
        route_pairs, (experts,),
        ids_TK, slots_X, order_P, tiles_N3, pairs, experts, programs,
        AT_ONCE=at_once, BLOCK=ROUTED_AT_ONCE, num_warps=8,
    )  # fmt: skip
    return Routed(tiles_N3, order_P, at_once)


def _at_once(pairs: int, experts: int) -> int:
    """Pairs of a program, where so many experts have so many."""
    mean = -(-pairs // max(experts, 1))
    at_once: int = triton.next_power_of_2(mean)
    return min(max(at_once, min(tiles.SHAPES)), max(tiles.SHAPES))


def one_by_one(slots_P: torch.Tensor) -> Routed:
    """A program for each pair, whose experts are in these slots, token by token."""
    order = torch.arange(len(slots_P), dtype=torch.int32, device=slots_P.device)
    tiles_N3 = torch.stack((slots_P.int(), order, order + 1), 1)
    return Routed(tiles_N3, order, min(tiles.SHAPES))


def multiplies(bank: Packed, x_TD: torch.Tensor) -> bool:
    """True: ``multiply`` can be called with this bank: parts have a dimension for slots, the
    first."""
    if bank.format not in tiles.STEPS or _codes(bank).stride(0) * _codes(bank).itemsize % 4:
        return False
    return tiles.multiplies(_first(bank), x_TD)


def multiply(
    bank: Packed, x: torch.Tensor, routed: Routed, out: torch.Tensor, *, per_token: int = 0
) -> None:
    """out = x times the transposed matrix of each pair's expert, plus its bias if it has one:
    (P, rows).

    ``per_token``: x has a row for each token, which so many pairs share, and ``out`` gets pairs as
    they are sorted; 0: x has a row for each sorted pair, and ``out`` gets them token by token.
    """
    shape = tiles.SHAPES[routed.at_once]
    step = tiles.STEPS[bank.format]
    codes, scale, strides, nbytes = tiles.parts_of(_first(bank))
    own = _codes(bank)
    slot_scales = bank.parts["scale"].stride(0) if "scale" in bank.parts else 0
    bias = bank.parts.get("bias")
    grid = (len(routed.tiles_N3), triton.cdiv(bank.rows, shape.rows))
    if not grid[0]:
        return
    run_kernel(
        multiply_in_slots,
        grid,
        codes,
        scale,
        x,
        out if bias is None else bias,
        out,
        routed.tiles_N3,
        routed.order_P,
        bank.rows,
        bank.width,
        max(per_token, 1),
        ONE,
        own.stride(0) * own.itemsize,
        slot_scales,
        0 if bias is None else bias.stride(0),
        *strides,
        KIND=bank.format,
        NBYTES=nbytes,
        GROUP=bank.group // CHUNK,
        STEP=(step.piece, step.chunk, step.chunks),
        EVEN=bank.width % (step.chunk * step.chunks) == 0,
        GATHERS=bool(per_token),
        BIAS=0 if bias is None else bias.stride(1),
        ROWS=shape.rows,
        TOKENS=routed.at_once,
        num_warps=shape.warps,
        num_stages=shape.stages,
        **EXACT,
    )


def _codes(bank: Packed) -> torch.Tensor:
    return bank.parts["raw" if "raw" in bank.parts else "packed"]


def _first(bank: Packed) -> Packed:
    """What is in the first slot."""
    return replace(bank, parts={name: part[0] for name, part in bank.parts.items()})


@triton.jit(do_not_specialize=["pairs", "programs"])
def route_pairs(  # noqa: PLR0913 - a kernel has no records
    ids: tl.tensor, slots: tl.tensor, order: tl.tensor, tiles: tl.tensor,
    pairs: int, experts: int, programs: int,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A program finds the pairs of an expert, in their order, and writes where they are sorted and
    who computes them. Expert e, whose pairs begin at s, has programs from s // AT_ONCE + e on: so
    each finds its place without the others, and some programs remain without pairs."""
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    start, count = 0, 0
    for first in range(0, pairs, BLOCK):
        asked = tl.load(ids + first + at, mask=first + at < pairs, other=experts)
        start += tl.sum((asked < expert).to(tl.int32), 0)
        count += tl.sum((asked == expert).to(tl.int32), 0)
    place = start
    for first in range(0, pairs, BLOCK):
        mine = tl.load(ids + first + at, mask=first + at < pairs, other=experts) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(order + place + rank - 1, first + at, mask=mine)
        place += tl.sum(mine.to(tl.int32), 0)
    end, slot = start + count, tl.load(slots + expert).to(tl.int32)
    own = start // AT_ONCE + expert
    following = end // AT_ONCE + expert + 1
    if expert == experts - 1:
        following = programs
    for tile in range(own, following):
        first = tl.minimum(start + (tile - own) * AT_ONCE, end)
        tl.store(tiles + 3 * tile, slot)
        tl.store(tiles + 3 * tile + 1, first)
        tl.store(tiles + 3 * tile + 2, tl.minimum(first + AT_ONCE, end))


@triton.jit(do_not_specialize=["rows", "per_token", "one"])
def multiply_in_slots(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor, scale: tl.tensor, x: tl.tensor, bias: tl.tensor, y: tl.tensor,
    tiles: tl.tensor, order: tl.tensor,
    rows: int, width: int, per_token: int, one: int, slot_nbytes: int, slot_scales: int,
    slot_biases: int, pieces: int, scale_row: int, scale_group: int,
    KIND: tl.constexpr, NBYTES: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    EVEN: tl.constexpr, GATHERS: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    """y from x and matrices ``slot_nbytes`` of codes and ``slot_scales`` scales apart. GATHERS: of
    x what sorted pairs come from; else they are written to where they came from."""
    CHUNK: tl.constexpr = STEP[1]
    CHUNKS: tl.constexpr = STEP[2]
    tile = tiles + tl.program_id(0) * 3
    slot, first, end = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pair = first + tl.arange(0, TOKENS)
    sorted_pair = tl.maximum(tl.minimum(pair, end - 1), 0)
    came_from = tl.load(order + sorted_pair).to(tl.int64)
    if GATHERS:
        from_row, to_row = came_from // per_token, sorted_pair.to(tl.int64)
    else:
        from_row, to_row = sorted_pair.to(tl.int64), came_from
    own_row = tl.minimum(row, rows - 1).to(tl.int64)[:, None, None]
    lines = codes + slot * slot_nbytes + own_row * (pieces * NBYTES)
    scales = scale + slot * slot_scales + own_row * scale_row
    numbers = x + from_row[None, :] * width
    steps = tl.where(first < end, tl.cdiv(width, CHUNKS * CHUNK), 0)
    total = tile_totals(
        lines, scales, numbers, 0, steps, width, scale_group, one,
        KIND, GROUP, STEP, EVEN, TOKENS,
    )  # fmt: skip
    inside = row[:, None] < rows
    added = bias + slot * slot_biases
    number = rounded(total, added, row[:, None], inside, y.dtype.element_ty, BIAS)
    tl.store(y + to_row[None, :] * rows + row[:, None], number, mask=inside & (pair < end)[None, :])
