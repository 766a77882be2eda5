"""Triton kernels that multiply few tokens by a packed matrix, without unpacking it to memory.

A program computes ROWS numbers of each of TOKENS tokens. It goes along its rows in steps of CHUNKS
chunks, keeps a sum for every place of a step, and adds those up at the end: in an order that
depends on nothing but the shape. Everything is float32 inside, so weights are not rounded.

Tensors are (tokens, rows, chunks, places). A thread loads as many weights as numbers of x, so that
they meet without changing hands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks32 import block_scale
from .blocks256 import half_float, head_word, scale_and_minimum


@triton.jit
def own_tokens(tokens: int, TOKENS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The numbers of the program's tokens, and which there are."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None, None, None]
    return token, token < tokens


@triton.jit
def load_x(x: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Numbers of x as float32."""
    return tl.load(x + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def load_x_pairs(x: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Numbers 2 * at and 2 * at + 1 of x as float32: in one word, where both fit in one."""
    if x.dtype.element_ty == tl.float32:
        first = load_x(x, 2 * at, mask)
        second = load_x(x, 2 * at + 1, mask)
    else:
        at = tl.max_contiguous(at, [1, 1, 1, 4])
        both = tl.load(x.to(tl.pointer_type(tl.uint32)) + at, mask=mask, other=0)
        if x.dtype.element_ty == tl.bfloat16:
            first = (both << 16).to(tl.float32, bitcast=True)
            second = (both & 0xFFFF0000).to(tl.float32, bitcast=True)
        else:
            first = half_float(both)
            second = half_float(both >> 16)
    return first, second


@triton.jit
def row_scale(  # noqa: PLR0913 - a kernel has no records
    scale: tl.tensor,
    row: tl.tensor,
    chunk: tl.tensor,
    scale_row: int,
    scale_group: int,
    mask: tl.tensor,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Scales that lie beside the codes; a group is GROUP chunks, or 0: all."""
    group = chunk // GROUP if GROUP else chunk * 0
    found = tl.load(scale + row * scale_row + group * scale_group, mask=mask, other=0)
    return found.to(tl.float32)


@triton.jit
def store_sums(
    y: tl.tensor,
    total: tl.tensor,
    rows: int,
    tokens: int,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Of each token and row, the sum over chunks and places."""
    sums = tl.sum(tl.sum(total, axis=3), axis=2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    place = y + token.to(tl.int64) * rows + row
    tl.store(place, sums.to(y.dtype.element_ty), mask=(row < rows) & (token < tokens))


@triton.jit(do_not_specialize=["rows", "tokens"])
def multiply_nibbles(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor,
    scale: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    rows: int,
    tokens: int,
    chunks: int,
    code_stride: int,
    scale_row: int,
    scale_group: int,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """Chunks of 32 weights in 16 bytes: "ct4", symmetric, or "Q4_0", whose scales are in
    ``codes``. x is (tokens, 32 * chunks), y (tokens, rows)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    codes += first * code_stride
    row = tl.arange(0, ROWS)[None, :, None, None]
    place = tl.arange(0, 16)[None, None, None, :]
    token, here = own_tokens(tokens, TOKENS)
    total = tl.zeros((TOKENS, ROWS, CHUNKS, 16), tl.float32)
    for step in range(0, chunks, CHUNKS):
        chunk = step + tl.arange(0, CHUNKS)[None, None, :, None]
        inside = (row < rows - first) & (chunk < chunks)
        seen = here & (chunk < chunks)
        if KIND == "ct4":
            at = tl.max_contiguous(row * code_stride + chunk * 16 + place, [1, 1, 1, 4])
            scales = scale + first * scale_row
            factor = row_scale(scales, row, chunk, scale_row, scale_group, inside, GROUP)
            x_low, x_high = load_x_pairs(x, (token * chunks + chunk) * 16 + place, seen)
        else:
            at = row * code_stride + chunk * 18 + 2 + place
            factor = block_scale(codes, row * code_stride + chunk * 18, inside)
            column = (token * chunks + chunk) * 32 + place
            column = tl.max_contiguous(column, [1, 1, 1, 2])
            x_low = load_x(x, column, seen)
            x_high = load_x(x, column + 16, seen)
        pairs = tl.load(codes + at, mask=inside, other=0)
        total += ((pairs & 15).to(tl.float32) - 8) * factor * x_low
        total += ((pairs >> 4).to(tl.float32) - 8) * factor * x_high
    store_sums(y, total, rows, tokens, TOKENS, ROWS)


@triton.jit(do_not_specialize=["rows", "tokens"])
def multiply_bytes(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor,
    scale: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    rows: int,
    tokens: int,
    chunks: int,
    code_stride: int,
    scale_row: int,
    scale_group: int,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """As ``multiply_nibbles``, chunks of 32 bytes: "ct8", symmetric, or "Q8_0"."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    codes += first * code_stride
    row = tl.arange(0, ROWS)[None, :, None, None]
    place = tl.arange(0, 32)[None, None, None, :]
    token, here = own_tokens(tokens, TOKENS)
    total = tl.zeros((TOKENS, ROWS, CHUNKS, 32), tl.float32)
    for step in range(0, chunks, CHUNKS):
        chunk = step + tl.arange(0, CHUNKS)[None, None, :, None]
        inside = (row < rows - first) & (chunk < chunks)
        column = (token * chunks + chunk) * 32 + place
        if KIND == "ct8":
            at = tl.max_contiguous(row * code_stride + chunk * 32 + place, [1, 1, 1, 8])
            scales = scale + first * scale_row
            factor = row_scale(scales, row, chunk, scale_row, scale_group, inside, GROUP)
            number = tl.load(codes + at, mask=inside, other=0).to(tl.float32) - 128
        else:
            at = row * code_stride + chunk * 34 + 2 + place
            factor = block_scale(codes, row * code_stride + chunk * 34, inside)
            number = codes.to(tl.pointer_type(tl.int8)) + at
            number = tl.load(number, mask=inside, other=0).to(tl.float32)
            column = tl.max_contiguous(column, [1, 1, 1, 2])
        total += number * factor * load_x(x, column, here & (chunk < chunks))
    store_sums(y, total, rows, tokens, TOKENS, ROWS)


@triton.jit(do_not_specialize=["rows", "tokens"])
def multiply_q4_k(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    rows: int,
    tokens: int,
    chunks: int,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """Q4_K in chunks of 64 weights, four a block. x is (tokens, 64 * chunks), y (tokens, rows)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    codes += first * (chunks * 36)
    row = tl.arange(0, ROWS)[None, :, None, None]
    place = tl.arange(0, 32)[None, None, None, :]
    token, here = own_tokens(tokens, TOKENS)
    total = tl.zeros((TOKENS, ROWS, CHUNKS, 32), tl.float32)
    for step in range(0, chunks, CHUNKS):
        chunk = step + tl.arange(0, CHUNKS)[None, None, :, None]
        inside = (row < rows - first) & (chunk < chunks)
        block = row * (chunks * 36) + chunk // 4 * 144
        both = head_word(codes, block, inside)
        word1 = head_word(codes, block + 4, inside)
        word2 = head_word(codes, block + 8, inside)
        word3 = head_word(codes, block + 12, inside)
        at = tl.max_contiguous(block + 16 + chunk % 4 * 32 + place, [1, 1, 1, 8])
        pairs = tl.load(codes + at, mask=inside, other=0)
        column = (token * chunks + chunk) * 64 + place
        for half in tl.static_range(2):
            group = chunk % 4 * 2 + half
            factor, minimum = scale_and_minimum(both, word1, word2, word3, group)
            weight = ((pairs >> (4 * half)) & 15).to(tl.float32) * factor - minimum
            total += weight * load_x(x, column + 32 * half, here & (chunk < chunks))
    store_sums(y, total, rows, tokens, TOKENS, ROWS)
