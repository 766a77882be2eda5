"""The launch of the kernels that compute: products with few tokens, norms, SwiGLU, rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from ..weights.packed import Packed
from . import matvec, matvec_blocks, matvec_q4_k, pointwise
from .code_floats import ONE
from .triton_support import run_kernel
from .unpacking import CHUNK, EXACT, Launch, Tile

TOKENS_AT_ONCE = 4
"""A program keeps the sums of that many tokens; more are other programs' work."""

PRODUCTS = {
    "ct4": Launch(matvec.multiply_words, (4, 64), warps=2),
    "ct8": Launch(matvec.multiply_words, (2, 64), warps=2),
    "Q4_0": Launch(matvec_blocks.multiply_blocks, (4, 64), warps=2),
    "Q8_0": Launch(matvec_blocks.multiply_blocks, (2, 64), warps=2),
    "Q4_K": Launch(matvec_q4_k.multiply_q4_k, (4, 64), warps=2),
}
"""Tiles are (rows for one token, pieces of a step): 32 pieces or more for each warp. Pieces and
warps, and with them the order of sums, are the same for any number of tokens: they follow from the
width."""

PIECE = {"ct4": 32, "ct8": 32, "Q4_0": 16, "Q8_0": 8, "Q4_K": 64}
"""Weights of a piece."""

PRODUCT_ALTERNATIVES: tuple[tuple[Tile, int], ...] = (
    *(((1, 32), 1), ((2, 32), 1), ((4, 32), 1), ((1, 64), 1), ((2, 64), 1)),
    *(((1, 64), 2), ((2, 64), 2), ((4, 64), 2), ((1, 128), 4), ((2, 128), 4)),
)
"""(tile, warps) that bench_kernels.py compares."""

WARP = 32
"""Threads."""
WARPS = 1600
"""A matrix of fewer rows than give work to so many warps has fewer of them in each: about twelve
warps on each multiprocessor of the largest GPUs, so that there are loads under way while others
compute."""
MANY_ROWS = 4
"""That a program has for more than one token, where matrix and registers allow it."""
MOST_SUMS = 16
"""A thread's sums, of tokens times rows times pieces, where registers allow no more."""


def multiplies(packed: Packed, x_TD: torch.Tensor) -> bool:
    """True: ``multiply`` can be called."""
    if packed.format not in PRODUCTS or not packed.symmetric or "g_idx" in packed.parts:
        return False
    if packed.width % CHUNK or packed.group % CHUNK or not x_TD.is_contiguous():
        return False
    if packed.format in ("ct4", "ct8"):
        codes, words = packed.parts["packed"], 4 if packed.format == "ct4" else 8
        return codes.stride(-1) == 1 and codes.stride(0) % words == 0
    raw = packed.parts["raw"]
    return raw.is_contiguous() and raw.data_ptr() % 4 == 0


def multiply(
    packed: Packed,
    x_TD: torch.Tensor,
    launch: Launch | None = None,
    bias_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """x times the transposed matrix, plus a bias: (T, rows), in the dtype of x."""
    tokens = x_TD.shape[0]
    at_once = min(triton.next_power_of_2(tokens), TOKENS_AT_ONCE)
    own = launch or PRODUCTS[packed.format]
    height, pieces = own.tile
    if launch is None:
        own = narrowed(own, packed.width // PIECE[packed.format])
        height, pieces = rows_at_once(own, packed.rows, at_once), own.tile[1]
    y_TN = x_TD.new_empty(tokens, packed.rows)
    parts, bits = packed.parts, 8 if "8" in packed.format else 4
    tile: dict[str, Any] = {"TOKENS": at_once, "ROWS": height, "PIECES": pieces}
    beside = list[torch.Tensor]()
    strides = list[int]()
    if packed.format in ("ct4", "ct8"):
        codes, scale = parts["packed"], parts["scale"]
        tile |= {"BITS": bits, "GROUP": packed.group // CHUNK}
        beside, strides = [scale], [codes.stride(0) // bits, *scale.stride()]
    else:
        codes = parts["raw"]
        tile |= {} if packed.format == "Q4_K" else {"BITS": bits}
    run_kernel(
        own.kernel,
        (triton.cdiv(packed.rows, height), triton.cdiv(tokens, at_once)),
        codes,
        *beside,
        x_TD,
        y_TN if bias_N is None else bias_N,
        y_TN,
        packed.rows,
        tokens,
        packed.width // PIECE[packed.format],
        ONE,
        *strides,
        BIAS=int(bias_N is not None),
        num_warps=own.warps,
        **tile,
    )
    return y_TN


def narrowed(launch: Launch, pieces: int) -> Launch:
    """Of rows of so many pieces: one warp, if these are no more than it takes in a step."""
    height, most = launch.tile
    return Launch(launch.kernel, (height, WARP), 1) if pieces <= WARP < most else launch


def rows_at_once(launch: Launch, rows: int, at_once: int) -> int:
    """How many rows a program has; the order of sums does not depend on it."""
    height, pieces = launch.tile
    threads = WARP * launch.warps
    if at_once > 1:  # x, read by all rows of a thread, is what takes time
        height = max(height, MANY_ROWS)
    while height > 1 and (
        rows * launch.warps < WARPS * height or at_once * height * pieces > MOST_SUMS * threads
    ):
        height //= 2
    return height


def launch_norm(
    x_TD: torch.Tensor, added_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + added (or x itself) and its norm, of contiguous tensors."""
    tokens, width = x_TD.shape
    normed = torch.empty_like(x_TD)
    total = x_TD if added_TD is None else torch.empty_like(x_TD)
    block = triton.next_power_of_2(width)
    run_kernel(
        pointwise.add_and_norm,
        (tokens,),
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
    run_kernel(pointwise.silu_times, grid, gate, up, count, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return gate


def launch_clamped(
    gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float
) -> torch.Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) of both clamped, gate above alone, in place of
    ``gate``; both contiguous."""
    count = gate.numel()
    grid = (triton.cdiv(count, SWIGLU_BLOCK),)
    run_kernel(
        pointwise.clamped_times,
        grid,
        gate,
        up,
        count,
        alpha,
        limit,
        BLOCK=SWIGLU_BLOCK,
        num_warps=4,
    )
    return gate


HEADS_AT_ONCE = 4


def launch_rotate(
    heads: Sequence[torch.Tensor], table_2TE: torch.Tensor, *, interleaved: bool
) -> list[torch.Tensor]:
    """One or two tensors (H, T, E) rotated as by ``rope.rotate``, bit for bit: contiguous.

    Theirs and the table's last strides are 1. Two are of one dtype, T and E.
    """
    q, k = heads[0], heads[-1]
    turned = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in heads]
    (count, tokens, width), others = q.shape, len(k) if len(heads) > 1 else 0
    programs = triton.cdiv(count, HEADS_AT_ONCE) + triton.cdiv(others, HEADS_AT_ONCE)
    run_kernel(
        pointwise.rotate_pairs,
        (tokens, programs),
        q,
        k,
        turned[0],
        turned[-1],
        table_2TE,
        count,
        others,
        tokens,
        *q.stride()[:2],
        *k.stride()[:2],
        *table_2TE.stride()[:2],
        HALF=width // 2,
        INTERLEAVED=interleaved,
        HEADS=HEADS_AT_ONCE,
        BLOCK=triton.next_power_of_2(width // 2),
        num_warps=2,
        **EXACT,
    )
    return turned


COMBINE_BLOCK = 512


def launch_combine(y_PD: torch.Tensor, shares_TK: torch.Tensor) -> torch.Tensor:
    """(T, D): each token's K rows of y (T * K, D), in their order, times its shares, float32,
    summed in float32 and rounded to y's dtype. Both contiguous."""
    (tokens, per_token), width = shares_TK.shape, y_PD.shape[1]
    out_TD = y_PD.new_empty(tokens, width)
    run_kernel(
        pointwise.combine_shares,
        (tokens, triton.cdiv(width, COMBINE_BLOCK)),
        y_PD,
        shares_TK,
        out_TD,
        width,
        K=per_token,
        BLOCK=COMBINE_BLOCK,
        num_warps=4,
        **EXACT,
    )
    return out_TD


MOST_EXPERTS = 1024


def launch_choose(
    logits_TX: torch.Tensor, per_token: int, *, normed: bool, rounded: bool, over_chosen: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts, int64, ascending, and their shares, float32, (T, K) both, from
    contiguous logits of at most MOST_EXPERTS."""
    tokens, count = logits_TX.shape
    ids_TK = logits_TX.new_empty(tokens, per_token, dtype=torch.int64)
    shares_TK = logits_TX.new_empty(tokens, per_token, dtype=torch.float32)
    run_kernel(
        pointwise.choose_experts,
        (tokens,),
        logits_TX,
        ids_TK,
        shares_TK,
        count,
        K=per_token,
        NORMED=normed,
        OVER_CHOSEN=over_chosen,
        ROUNDED=rounded,
        BLOCK=triton.next_power_of_2(count),
        num_warps=max(1, min(4, count // 128)),
    )
    return ids_TK, shares_TK
