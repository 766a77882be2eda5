"""The launch of the kernels of decode attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from ..kv.blocks import BLOCK
from . import decode_attention as kernels
from .triton_support import run_kernel

LEAST_SIDE = 16
"""Of a matrix that ``tl.dot`` takes."""


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """How the tokens of a pass look back in the layers of one span, as device memory has it."""

    numbers: torch.Tensor
    """(T, NUMBERS) int64: see kernels/decode_attention.py."""
    blocks: torch.Tensor
    """int32, contiguous: a BlockTable's lines."""
    column: int
    """Its of this span."""
    window: int | None
    splits: int
    """Parts that positions are shared out to."""
    block: int
    """Positions that a program takes at a time."""
    sums: torch.Tensor
    """float32, room for (T, H, splits, E)."""
    stats: torch.Tensor
    """float32, room for (T, H, splits, 2)."""
    places: int = BLOCK
    """Of one of the rows' blocks; a multiple of ``block``."""


def launch_rotate_and_store(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    table_2TE: torch.Tensor,
    memory: torch.Tensor,
    look: Look,
    *,
    interleaved: bool,
) -> torch.Tensor:
    """Rotated queries (T, H, E) of q (H, T, E); keys, rotated, and values (G, T, E) go to
    ``memory`` (places, 2, G, E). Heads are contiguous."""
    q_HTE, groups = qkv[0], qkv[1].shape[0]
    heads, tokens, width = q_HTE.shape
    turned_THE = q_HTE.new_empty(tokens, heads, width)
    run_kernel(
        kernels.rotate_and_store,
        (heads + 2 * groups, tokens),
        *qkv,
        table_2TE,
        turned_THE,
        memory,
        look.numbers,
        look.blocks,
        *(x.stride(i) for x in qkv for i in (1, 0)),
        NUMBERS=look.numbers.stride(0),
        BLOCKS=look.blocks.stride(0),
        COLUMN=look.column,
        PLACES=look.places,
        HEADS=heads,
        GROUPS=groups,
        WIDTH=width,
        COLUMNS=triton.next_power_of_2(width // 2),
        INTERLEAVED=interleaved,
        num_warps=1,
    )
    return turned_THE


LOG2_E = 1.4426950408889634


def launch_attention(
    q_THE: torch.Tensor,
    memory: torch.Tensor,
    look: Look,
    scale: float,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixed values (T, H, E) of contiguous queries, one of each row, over ``memory``. ``sinks_H``,
    contiguous: each head's score beside those of positions."""
    tokens, heads, width = q_THE.shape
    groups = memory.shape[2]
    columns = max(triton.next_power_of_2(width), LEAST_SIDE)
    sharing = max(triton.next_power_of_2(heads // groups), LEAST_SIDE)
    shared = {"NUMBERS": look.numbers.stride(0), "WINDOW": look.window or 0, "WIDTH": width}
    shared |= {"COLUMNS": columns, "SPLITS": look.splits, "BLOCK": look.block}
    run_kernel(
        kernels.attend_part,
        (look.splits, groups, tokens),
        q_THE,
        memory,
        look.numbers,
        look.blocks,
        look.sums,
        look.stats,
        scale * LOG2_E,
        BLOCKS=look.blocks.stride(0),
        COLUMN=look.column,
        PLACES=look.places,
        GROUP=heads // groups,
        HEADS=sharing,
        **shared,
        num_warps=4 if sharing * columns <= 4096 else 8,
        num_stages=2 if width * q_THE.element_size() <= 512 else 1,
    )
    mixed_THE = torch.empty_like(q_THE)
    run_kernel(
        kernels.combine_parts,
        (heads, tokens),
        look.sums,
        look.stats,
        look.numbers,
        look.stats if sinks_H is None else sinks_H,
        mixed_THE,
        ROUNDED=triton.next_power_of_2(look.splits),
        SINKS=sinks_H is not None,
        **shared,
        num_warps=4,
    )
    return mixed_THE
