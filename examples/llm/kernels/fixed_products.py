"""A Triton kernel of products in which a token's bits depend on nothing but itself.

A program computes TOKENS tokens by ROWS rows of the matrix, over the whole width, STEP columns at a
time, in float32: no sum is shared out, so that every one is added up in the same order, whatever
shares the launch. Tokens that are not there are zeros. The tile is one for each dtype and never
goes by the number of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_support import run_kernel

TOKENS = 64
_TILES = {4: (64, 32), 2: (64, 64)}
"""By bytes of a number: (rows, columns of a step)."""


@triton.jit(do_not_specialize=["tokens"])
def multiply_tile(  # noqa: PLR0913 - a kernel has no records
    x: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    tokens: int,
    rows: int,
    width: int,
    row_stride: int,
    out_stride: int,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """out (tokens, rows) = x (tokens, width) times transposed weights (rows, width)."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, inside = token < tokens, row < rows
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(0, width, STEP):
        column = first + tl.arange(0, STEP)
        within = column < width
        at = x + token[:, None] * width + column[None, :]
        numbers = tl.load(at, mask=there[:, None] & within[None, :], other=0)
        at = weights + row[:, None] * row_stride + column[None, :]
        matrix = tl.load(at, mask=inside[:, None] & within[None, :], other=0)
        total += tl.dot(numbers, tl.trans(matrix), input_precision="ieee")
    at = out + token[:, None] * out_stride + row[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


def launch_tiles(x_TD: torch.Tensor, w_ND: torch.Tensor, out_TN: torch.Tensor) -> None:
    """Write x times transposed w to ``out_TN``. One dtype: float32, or 16 bits; x is contiguous, a
    row of w and a token of out are."""
    tokens, width = x_TD.shape
    height, step = _TILES[x_TD.element_size()]
    # Tokens first: those that share rows run side by side, and rows are read from memory once.
    grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(len(w_ND), height))
    run_kernel(
        multiply_tile,
        grid,
        x_TD,
        w_ND,
        out_TN,
        tokens,
        len(w_ND),
        width,
        w_ND.stride(0),
        out_TN.stride(0),
        TOKENS=TOKENS,
        ROWS=height,
        STEP=step,
        num_warps=4,
        num_stages=3,
    )
