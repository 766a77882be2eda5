"""Kernels by which a GPU itself keeps a table of slots, and fills them from page-locked memory.

The host is not asked, so that they can be captured in a CUDA graph together with what computes whom
to ask for. Imported only where Triton is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

PROGRAMS = 264
"""That read host memory at the same time: more than two hundred keep a link busy, and none of one
H100's or H200's multiprocessors has more than two."""
CHUNK = 1024
"""Words that a program reads at a stretch."""
LINE = 128
"""Bytes that a GPU asks a host for at once; reads that begin elsewhere ask for some twice."""
AGAIN = tl.constexpr(1 << 60)
"""Added to when it was asked for last, of who was asked for again while it was there."""
NEVER = tl.constexpr(0x7FFF_FFFF_FFFF_FFFF)
"""Later than all."""
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""By their bytes."""
MOST_SLOTS = 1 << 15
"""Of one table: a program holds when each was asked for."""
MOST_PAIRS = 1 << 6
"""That are asked for at once."""


class Table(NamedTuple):
    """A table of slots on a device; all contiguous. Keys are numbers of experts, of all layers."""

    slots: torch.Tensor
    """int32, by key: its slot, or -1."""
    keys: torch.Tensor
    """int32, by slot: who is in it, or -1."""
    ranks: torch.Tensor
    """int64, by slot: the lowest goes first; below 0 nobody is in it."""
    clock: torch.Tensor
    """int64 (2,): the time, and how many were asked for again."""


class Layer(NamedTuple):
    """Whose experts are asked for."""

    first_key: int
    """Of its experts, whose keys follow each other."""
    experts: int
    most_again: int
    """How many of the table's are kept apart since they were asked for again."""


class Pieces(NamedTuple):
    """Where experts lie in host memory, and in a slot."""

    sources: torch.Tensor
    """int64 (keys, pieces): addresses."""
    targets: torch.Tensor
    """int64 (pieces, 2): bytes from the beginning of a slot, and how many."""
    chunks: torch.Tensor
    """int32 (chunks, 2): of an expert, cut in chunks, the piece and its first word."""
    word: int
    """Bytes that all of it is a multiple of: 8, 4, 2 or 1."""


def place(
    table: Table, ids_P: torch.Tensor, layer: Layer, slots_P: torch.Tensor, told: torch.Tensor
) -> None:
    """Give experts slots, as ``SlotTable`` with a ``SegmentedLRU`` does.

    ``ids_P``: int64, in any order, each as often as one likes; no more may differ than there are
    slots. Where one is no expert of the layer nothing is done, and its slot is said to be 0.
    ``slots_P``, int64, gets the slot of each. ``told``, int32 (2 + 3 M,) for up to M pairs: how
    many are missing, and how many were asked for; then of those that are missing key and slot, and
    from 2 + 2 M on who was asked for, ascending.
    """
    pairs, count, asked_at = len(ids_P), len(table.keys), 2 + 2 * ((len(told) - 2) // 3)
    _place[(1,)](
        ids_P, *table, slots_P, told, asked_at, pairs, count, *layer,
        SLOTS=triton.next_power_of_2(count), PAIRS=max(2, triton.next_power_of_2(pairs)),
        num_warps=8 if count <= 1 << 12 else 16,
    )  # fmt: skip


def fill(pieces: Pieces, told: torch.Tensor, slab: torch.Tensor, slot_nbytes: int) -> None:
    """Bring those that :func:`place` has told are missing to their slots in ``slab`` (uint8)."""
    _fill[(PROGRAMS,)](
        pieces.sources, pieces.targets, pieces.chunks, told, slab, slot_nbytes,
        len(pieces.targets), len(pieces.chunks),
        WORD=pieces.word, CHUNK=CHUNK, LINE=LINE, num_warps=4,
    )  # fmt: skip


def cut(nbytes: list[int], word: int) -> list[tuple[int, int]]:
    """The chunks of pieces of so many bytes: one more line each, as they begin anywhere in one."""
    step = CHUNK * word
    return [
        (piece, at // word)
        for piece, size in enumerate(nbytes)
        for at in range(0, size + LINE if size else 0, step)
    ]


@triton.jit
def _of(values: tl.tensor, numbers: tl.tensor, one: tl.tensor) -> tl.tensor:
    """The one value whose number is this."""
    return tl.sum(tl.where(numbers == one, values, 0), 0)


@triton.jit
def _turns(asked: tl.tensor, real: tl.tensor, p: tl.tensor, PAIRS: tl.constexpr) -> tl.tensor:
    """Of each pair that stands for its expert, the first that asks for it, how many experts come
    before; -1 of the others."""
    # [i, j]: of pair j, where those without an index are of pair i.
    other = tl.trans(tl.broadcast_to(asked[:, None], [PAIRS, PAIRS]))
    earlier = tl.trans(tl.broadcast_to(p[:, None], [PAIRS, PAIRS])) < p[:, None]
    first = (tl.sum(((other == asked[:, None]) & earlier).to(tl.int32), 1) == 0) & real
    firsts = tl.trans(tl.broadcast_to(first.to(tl.int32)[:, None], [PAIRS, PAIRS]))
    return tl.where(first, tl.sum(tl.where(other < asked[:, None], firsts, 0), 1), -1)


@triton.jit
def _look(
    ids_ptr: tl.tensor, slot_ptr: tl.tensor, rank_ptr: tl.tensor, pairs: int, experts: int,
    PAIRS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Who is asked for, in which turn, and where they are and their ranks, for which there is
    ``NEVER`` in memory from here on."""
    p = tl.arange(0, PAIRS)
    asked = tl.load(ids_ptr + p, mask=p < pairs, other=-1).to(tl.int32)
    before = tl.load(ids_ptr + p - 1, mask=(p > 0) & (p < pairs), other=-1).to(tl.int32)
    real = (asked >= 0) & (asked < experts)
    turn = tl.where(p < pairs, p, -1)  # as one token's are, ascending
    if tl.min((real & (before < asked) | (p >= pairs)).to(tl.int32), 0) == 0:
        turn = _turns(asked, real, p, PAIRS)
    slot = tl.load(slot_ptr + asked, mask=real, other=-1)
    rank = tl.load(rank_ptr + slot, mask=slot >= 0, other=-1)
    tl.debug_barrier()
    tl.store(rank_ptr + slot, NEVER, mask=slot >= 0)
    tl.debug_barrier()
    return p, asked, turn, slot, rank


@triton.jit
def _demote(
    ranks: tl.tensor, rank: tl.tensor, s: tl.tensor, rank_ptr: tl.tensor, clock: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The one that was asked for longest ago, of those asked for again, is as one asked for once:
    one of the others, or of those that are asked for now, and will be or have been again."""
    oldest, back = tl.min(tl.where(ranks < AGAIN, NEVER, ranks), 0, return_indices=True)
    mine = tl.min(tl.where(rank < AGAIN, NEVER, rank), 0)
    if mine < oldest:
        rank = tl.where(rank == mine, clock + 1, rank)
    else:
        ranks = tl.where(s == back, clock + 1, ranks)
        tl.store(rank_ptr + back, clock + 1)
    return ranks, rank


@triton.jit(do_not_specialize=["asked_at", "pairs", "slots", "first_key", "experts", "most_again"])
def _place(  # noqa: PLR0913 - a kernel's operands
    ids_ptr: tl.tensor, slot_ptr: tl.tensor, key_ptr: tl.tensor, rank_ptr: tl.tensor,
    clock_ptr: tl.tensor, out_ptr: tl.tensor, missing_ptr: tl.tensor, asked_at: int, pairs: int,
    slots: int, first_key: int, experts: int, most_again: int,
    SLOTS: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    """One program, which goes through those that differ, ascending, as they were asked for one
    after the other. ``ranks`` has who may go: nobody who is asked for."""
    p, asked, turn, slot, rank = _look(
        ids_ptr, slot_ptr + first_key, rank_ptr, pairs, experts, PAIRS
    )
    s = tl.arange(0, SLOTS)
    ranks = tl.load(rank_ptr + s, mask=s < slots, other=NEVER)
    clock, again = tl.load(clock_ptr), tl.load(clock_ptr + 1)

    missing, told = 0, missing_ptr + asked_at
    count = tl.max(turn, 0) + 1
    for i in range(count):
        expert, own, last = _of(asked, turn, i), _of(slot, turn, i), _of(rank, turn, i)
        tl.store(told + i, expert)
        if own < 0:
            lowest, own = tl.min(ranks, 0, return_indices=True)
            ranks = tl.where(s == own, NEVER, ranks)
            gone = tl.load(key_ptr + own)
            again -= (lowest >= AGAIN).to(tl.int64)
            if gone >= 0:
                tl.store(slot_ptr + gone, -1)
            key = first_key + expert
            tl.store(key_ptr + own, key)
            tl.store(slot_ptr + key, own)
            tl.store(missing_ptr + 2 + 2 * missing, key)
            tl.store(missing_ptr + 3 + 2 * missing, own)
            rank = tl.where(asked == expert, clock, rank)
            slot = tl.where(asked == expert, own, slot)
            missing += 1
        else:
            rank = tl.where(slot == own, AGAIN + clock, rank)
            again += (last < AGAIN).to(tl.int64)
            if again > most_again:
                ranks, rank = _demote(ranks, rank, s, rank_ptr, clock)
                again -= 1
        clock += 2
    tl.debug_barrier()
    tl.store(rank_ptr + slot, rank, mask=slot >= 0)
    tl.store(clock_ptr, clock)
    tl.store(clock_ptr + 1, again)
    tl.store(missing_ptr, missing)
    tl.store(missing_ptr + 1, count)
    tl.store(out_ptr + p, tl.maximum(slot, 0).to(tl.int64), mask=p < pairs)


@triton.jit
def _fill(  # noqa: PLR0913 - a kernel's operands
    source_ptr: tl.tensor, target_ptr: tl.tensor, chunk_ptr: tl.tensor, missing_ptr: tl.tensor,
    slab_ptr: tl.tensor, slot_nbytes: int, pieces: int, chunks: int,
    WORD: tl.constexpr, CHUNK: tl.constexpr, LINE: tl.constexpr,
) -> None:  # fmt: skip
    """Every program takes chunks in turn, of all that are missing."""
    count = tl.load(missing_ptr)
    word = tl.arange(0, CHUNK)
    for turn in range(tl.program_id(0), count * chunks, tl.num_programs(0)):
        one, chunk = turn // chunks, turn % chunks
        key = tl.load(missing_ptr + 2 + 2 * one).to(tl.int64)
        slot = tl.load(missing_ptr + 3 + 2 * one).to(tl.int64)
        piece, first = tl.load(chunk_ptr + 2 * chunk), tl.load(chunk_ptr + 2 * chunk + 1)
        source = tl.load(source_ptr + key * pieces + piece)
        to = tl.load(target_ptr + 2 * piece)
        words = tl.load(target_ptr + 2 * piece + 1) // WORD
        if WORD == 8:
            kind = tl.pointer_type(tl.int64)
        elif WORD == 4:
            kind = tl.pointer_type(tl.int32)
        elif WORD == 2:
            kind = tl.pointer_type(tl.int16)
        else:
            kind = tl.pointer_type(tl.int8)
        at = first - (source % LINE) // WORD + word  # chunks begin with a line
        inside = (at >= 0) & (at < words)
        there = source.to(kind) + at
        here = (slab_ptr + slot * slot_nbytes + to).to(kind) + at
        tl.store(here, tl.load(there, mask=inside, eviction_policy="evict_first"), mask=inside)
