"""The launch of the kernels that unpack: which serves which matrix, with which tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..weights.packed import Packed
from ..weights.quants import BLOCK_TYPES
from . import blocks32, blocks256, grouped
from .triton_support import run_kernel

CHUNK = 32
"""Weights that share a scale in every format that ``grouped`` knows."""

Tile = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is launched."""

    kernel: Any
    tile: Tile
    """Blocks; (rows, chunks); or for AWQ (words of eight rows, columns)."""
    warps: int = 4


LAUNCHES = {
    "Q4_0": Launch(blocks32.unpack_q4_0, (128,)),
    "Q4_1": Launch(blocks32.unpack_q4_1, (128,)),
    "Q5_0": Launch(blocks32.unpack_q5_0, (128,)),
    "Q8_0": Launch(blocks32.unpack_q8_0, (64,)),
    "Q4_K": Launch(blocks256.unpack_q4_k, (16,)),
    "Q5_K": Launch(blocks256.unpack_q5_k, (16,)),
    "Q6_K": Launch(blocks256.unpack_q6_k, (16,)),
    "ct4": Launch(grouped.unpack_ct4, (2, 32)),
    "ct8": Launch(grouped.unpack_bytes, (2, 32)),
    "int8": Launch(grouped.unpack_bytes, (2, 32)),
    "fp8": Launch(grouped.unpack_bytes, (4, 32)),
    "awq4": Launch(grouped.unpack_awq, (16, 64), warps=8),
}
"""Fixed, so that nothing is tuned while a model runs; bench_kernels.py tries others."""


_BLOCKS32 = tuple(((tile,), warps) for tile in (32, 64, 128, 256) for warps in (2, 4, 8))
_BLOCKS256 = tuple(((tile,), warps) for tile in (8, 16, 32, 64) for warps in (2, 4, 8))
_ROWS = tuple(
    (tile, warps) for tile in ((1, 32), (2, 32), (4, 32), (1, 64), (1, 128)) for warps in (2, 4, 8)
)
_WORDS = tuple((tile, warps) for tile in ((8, 32), (8, 64), (16, 32), (16, 64)) for warps in (4, 8))
ALTERNATIVES = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q8_0"), _BLOCKS32),
    **dict.fromkeys(("Q4_K", "Q5_K", "Q6_K"), _BLOCKS256),
    **dict.fromkeys(("ct4", "ct8", "int8", "fp8"), _ROWS),
    "awq4": _WORDS,
}
"""(tile, warps) that bench_kernels.py compares."""


def serves(packed: Packed) -> bool:
    """True: ``launch_unpack`` can be called. Depends on nothing that differs between rows."""
    parts = packed.parts
    if packed.format in BLOCK_TYPES:
        raw = parts["raw"]
        return packed.format in LAUNCHES and raw.is_contiguous() and raw.data_ptr() % 4 == 0
    if packed.format not in LAUNCHES or "g_idx" in parts:
        return False
    if packed.width % CHUNK or packed.group % CHUNK:
        return False
    if packed.format == "awq4":
        return not packed.symmetric and all(part.stride(-1) == 1 for part in parts.values())
    codes = parts["packed" if packed.format in ("ct4", "ct8") else "weight"]
    return codes.stride(-1) == 1


def launch_unpack(
    packed: Packed, start: int, end: int, out: torch.Tensor, launch: Launch | None = None
) -> None:
    """``unpack_rows`` for what ``serves`` approves of; "awq4" from a multiple of 8 on.

    ``out`` is contiguous and on the matrix's device, which is the current one.
    """
    launch = launch or LAUNCHES[packed.format]
    if packed.format in BLOCK_TYPES:
        _launch_blocks(packed, (start, end), out, launch)
    elif packed.format == "awq4":
        _launch_awq(packed, (start, end), out, launch)
    else:
        _launch_grouped(packed, (start, end), out, launch)


EXACT = {"enable_fp_fusion": False}
"""A product and a sum that are rounded once would not be what plain torch computes."""


def _launch_blocks(
    packed: Packed, rows: tuple[int, int], out: torch.Tensor, launch: Launch
) -> None:
    in_row = packed.width // BLOCK_TYPES[packed.format].weights
    start, blocks = rows[0] * in_row, (rows[1] - rows[0]) * in_row
    (tile,) = launch.tile
    run_kernel(
        launch.kernel,
        (triton.cdiv(blocks, tile),),
        packed.parts["raw"],
        out,
        start,
        blocks,
        TILE=tile,
        num_warps=launch.warps,
        **EXACT,
    )


def _launch_grouped(
    packed: Packed, rows: tuple[int, int], out: torch.Tensor, launch: Launch
) -> None:
    parts, count, chunks = packed.parts, rows[1] - rows[0], packed.width // CHUNK
    codes = parts["packed" if packed.format in ("ct4", "ct8") else "weight"].view(torch.uint8)
    scale, zero = parts["scale"], parts.get("zero", parts["scale"])
    kind: dict[str, Any] = {}
    if packed.format != "ct4":
        kind = {"KIND": packed.format, "GROUP_ROWS": packed.group_rows}
    height, width = launch.tile
    run_kernel(
        launch.kernel,
        (triton.cdiv(count, height), triton.cdiv(chunks, width)),
        codes,
        scale,
        zero,
        out,
        rows[0],
        count,
        chunks,
        packed.first_row,
        codes.stride(0),
        *scale.stride(),
        *zero.stride(),
        GROUP=packed.group // CHUNK,
        SYMMETRIC=packed.symmetric,
        ROWS=height,
        CHUNKS=width,
        num_warps=launch.warps,
        **kind,
        **EXACT,
    )


def _launch_awq(packed: Packed, rows: tuple[int, int], out: torch.Tensor, launch: Launch) -> None:
    parts, group = packed.parts, packed.group or packed.width
    count, (words, columns) = rows[1] - rows[0], launch.tile
    columns = min(columns, group & -group)  # one group a program
    run_kernel(
        launch.kernel,
        (triton.cdiv(count, 8 * words), packed.width // columns),
        parts["packed"],
        parts["scale"],
        parts["zero"],
        out,
        rows[0],
        count,
        packed.width,
        group,
        parts["packed"].stride(0),
        parts["scale"].stride(0),
        parts["zero"].stride(0),
        WORDS=words,
        COLUMNS=columns,
        num_warps=launch.warps,
        **EXACT,
    )
