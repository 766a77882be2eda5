"""The launch of the kernels that compute: products with few tokens, norms and SwiGLU."""

from __future__ import annotations

import torch
import triton

from ..packed import Packed
from . import matvec, pointwise
from .unpacking import CHUNK, Launch

TOKENS_AT_ONCE = 4
"""A program keeps the sums of that many tokens; more are other programs' work."""

PRODUCTS = {
    "ct4": Launch(matvec.multiply_nibbles, (2, 32)),
    "Q4_0": Launch(matvec.multiply_nibbles, (2, 32)),
    "ct8": Launch(matvec.multiply_bytes, (2, 32)),
    "Q8_0": Launch(matvec.multiply_bytes, (2, 32)),
    "Q4_K": Launch(matvec.multiply_q4_k, (2, 32)),
}
"""Tiles are (rows, chunks of a step)."""


PRODUCT_ALTERNATIVES = tuple(
    (tile, warps) for tile in ((1, 32), (2, 32), (4, 32), (1, 64), (2, 64)) for warps in (2, 4, 8)
)
"""(tile, warps) that bench_kernels.py compares."""


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


def multiply(packed: Packed, x_TD: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
    """x times the transposed matrix: (T, rows), in the dtype of x."""
    launch = launch or PRODUCTS[packed.format]
    tokens, (height, chunks) = x_TD.shape[0], launch.tile
    y_TN = x_TD.new_empty(tokens, packed.rows)
    at_once = min(triton.next_power_of_2(tokens), TOKENS_AT_ONCE)
    grid = (triton.cdiv(packed.rows, height), triton.cdiv(tokens, at_once))
    tile = {"TOKENS": at_once, "ROWS": height, "CHUNKS": chunks, "num_warps": launch.warps}
    parts = packed.parts
    if packed.format == "Q4_K":
        of_64 = packed.width // 64
        launch.kernel[grid](parts["raw"], x_TD, y_TN, packed.rows, tokens, of_64, **tile)
        return y_TN
    codes = parts["packed"].view(torch.uint8) if "packed" in parts else parts["raw"]
    scale = parts.get("scale", codes)
    launch.kernel[grid](
        codes,
        scale,
        x_TD,
        y_TN,
        packed.rows,
        tokens,
        packed.width // CHUNK,
        codes.stride(0),
        *scale.stride(),
        KIND=packed.format,
        GROUP=packed.group // CHUNK,
        **tile,
    )
    return y_TN


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
