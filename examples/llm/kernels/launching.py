"""The launch of the kernels that compute: products with few tokens, norms and SwiGLU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton

from ..packed import Packed
from . import matvec, pointwise
from .code_floats import ONE
from .unpacking import CHUNK, Launch

TOKENS_AT_ONCE = 4
"""A program keeps the sums of that many tokens; more are other programs' work."""

PRODUCTS = {
    "ct4": Launch(matvec.multiply_words, (4, 64), warps=2),
    "ct8": Launch(matvec.multiply_words, (4, 64), warps=2),
    "Q4_0": Launch(matvec.multiply_blocks, (4, 64), warps=2),
    "Q8_0": Launch(matvec.multiply_blocks, (4, 64), warps=2),
    "Q4_K": Launch(matvec.multiply_q4_k, (4, 64), warps=2),
}
"""Tiles are (rows, pieces of a step)."""

_PIECE = {"ct4": 32, "ct8": 16, "Q4_0": 16, "Q8_0": 8, "Q4_K": 32}
"""Weights of a piece."""

PRODUCT_ALTERNATIVES = tuple(
    ((rows, pieces), warps)
    for pieces, warps in ((32, 1), (64, 1), (64, 2), (128, 2), (128, 4))
    for rows in (1, 2, 4, 8)
)
"""(tile, warps) that bench_kernels.py compares."""

PROGRAMS = 1024
"""A matrix of fewer rows than fill so many programs has fewer of them in each."""


def multiplies(packed: Packed, x_TD: torch.Tensor) -> bool:
    """True: ``multiply`` can be called."""
    if packed.format not in PRODUCTS or not packed.symmetric or "g_idx" in packed.parts:
        return False
    if packed.width % CHUNK or packed.group % CHUNK or not x_TD.is_contiguous():
        return False
    if packed.format in ("ct4", "ct8"):
        return packed.parts["packed"].stride(-1) == 1
    raw = packed.parts["raw"]
    return raw.is_contiguous() and raw.data_ptr() % 4 == 0


def multiply(
    packed: Packed,
    x_TD: torch.Tensor,
    launch: Launch | None = None,
    bias_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """x times the transposed matrix, plus a bias: (T, rows), in the dtype of x."""
    launch = launch or _fitting(packed)
    tokens, (height, pieces) = x_TD.shape[0], launch.tile
    y_TN = x_TD.new_empty(tokens, packed.rows)
    at_once = min(triton.next_power_of_2(tokens), TOKENS_AT_ONCE)
    parts, bits = packed.parts, 8 if "8" in packed.format else 4
    tile: dict[str, Any] = {"TOKENS": at_once, "ROWS": height, "PIECES": pieces}
    beside = list[torch.Tensor]()
    strides = list[int]()
    if packed.format in ("ct4", "ct8"):
        codes, scale = parts["packed"], parts["scale"]
        tile |= {"BITS": bits, "GROUP": packed.group // _PIECE[packed.format]}
        beside, strides = [scale], [codes.stride(0), *scale.stride()]
    else:
        codes = parts["raw"]
        tile |= {} if packed.format == "Q4_K" else {"BITS": bits}
    launch.kernel[(triton.cdiv(packed.rows, height), triton.cdiv(tokens, at_once))](
        codes,
        *beside,
        x_TD,
        y_TN if bias_N is None else bias_N,
        y_TN,
        packed.rows,
        tokens,
        packed.width // _PIECE[packed.format],
        ONE,
        *strides,
        BIAS=bias_N is not None,
        num_warps=launch.warps,
        **tile,
    )
    return y_TN


def _fitting(packed: Packed) -> Launch:
    """How this matrix is multiplied; each number of y is the same whatever the rows at a time."""
    launch = PRODUCTS[packed.format]
    height, pieces = launch.tile
    while height > 1 and packed.rows < PROGRAMS * height:
        height //= 2
    return replace(launch, tile=(height, pieces))


WIDEST_TOKEN = 1 << 15
"""Numbers that one program can norm."""


def launch_norm(
    x_TD: torch.Tensor, added_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + added (or x itself) and its norm, of contiguous tensors of up to WIDEST_TOKEN a token."""
    tokens, width = x_TD.shape
    normed = torch.empty_like(x_TD)
    total = x_TD if added_TD is None else torch.empty_like(x_TD)
    block = triton.next_power_of_2(width)
    pointwise.add_and_norm[(tokens,)](
        x_TD,
        x_TD if added_TD is None else added_TD,
        weight_D,
        total,
        normed,
        width,
        eps,
        ADD=added_TD is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return total, normed


SWIGLU_BLOCK = 1024


def launch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in place of ``gate``; both contiguous."""
    count = gate.numel()
    grid = (triton.cdiv(count, SWIGLU_BLOCK),)
    pointwise.silu_times[grid](gate, up, count, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return gate
