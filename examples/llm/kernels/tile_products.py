"""Triton kernels that multiply tokens by a packed matrix on tensor cores, without unpacking it to
memory.

A program has ROWS rows of the matrix and TOKENS tokens. It goes along its rows in steps, each of
which makes one or two tiles of weights in registers: what unpacking to the dtype of x gives, bit
for bit, rounded where that rounds. Tensor cores multiply a tile by the columns of x that it belongs
to, and sum up in float32. So the product differs from that of unpacked rows by the order of sums
alone.

Weights are the left factor, tokens the right one: tensor cores of Hopper take no fewer than 64 rows
on the left, but as few as eight columns on the right. Where a byte has codes of columns far from
each other, the lower halves are one tile and the upper ones another, with the columns of x to
match, so that nothing is put in order. Codes of neighbours are in one thread, which names them in
order and moves nothing. Formats that are aligned to words are taken apart as in ``matvec``; of the
others unpacking's own functions are called.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks32 import q4_0_weights, q8_0_weights
from .blocks256 import half_float, head_word, q6_k_weights
from .code_floats import code, fp4, power_of_two
from .matvec_q4_k import scales_and_minima
from .pointwise import rounded


@triton.jit
def in_order(first: tl.tensor, second: tl.tensor, third: tl.tensor, fourth: tl.tensor) -> tl.tensor:
    """Four tensors (A, B, C), neighbours in the last dimension of one (A, B, 4 * C)."""
    four = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(four, (first.shape[0], first.shape[1], 4 * first.shape[2]))


@triton.jit
def q4_k_weights(
    raw: tl.tensor, block: int, chunk: tl.tensor, inside: tl.tensor, one: int
) -> tuple[tl.tensor, tl.tensor]:
    """Of chunks of 64 (0 to 3) of a block of rows: weights of low nibbles, and of high ones."""
    both = head_word(raw, block * 144, inside)
    first = head_word(raw, block * 144 + 4, inside)
    second = head_word(raw, block * 144 + 8, inside)
    rest = head_word(raw, block * 144 + 12, inside)
    scale, minimum = scales_and_minima(first, second, rest, chunk)
    words = raw.to(tl.pointer_type(tl.uint32)) + block * 36 + 4 + chunk * 8
    words = tl.load(words + tl.arange(0, 8)[None, None, :], mask=inside, other=0)
    upper = words >> 12
    factor = code(scale, one, 0, 8, 0) * half_float(both)
    taken = code(minimum, one, 0, 8, 0) * half_float(both >> 16)
    low = in_order(
        code(words, one, 0, 4, 0) * factor - taken,
        code(words, one, 8, 4, 0) * factor - taken,
        code(words, one, 16, 4, 0) * factor - taken,
        code(upper, one, 12, 4, 0) * factor - taken,
    )
    factor = code(scale, one, 8, 8, 0) * half_float(both)
    taken = code(minimum, one, 8, 8, 0) * half_float(both >> 16)
    high = in_order(
        code(words, one, 4, 4, 0) * factor - taken,
        code(words, one, 12, 4, 0) * factor - taken,
        code(upper, one, 8, 4, 0) * factor - taken,
        code(upper, one, 16, 4, 0) * factor - taken,
    )
    return low, high


@triton.jit
def word_weights(words: tl.tensor, factor: tl.tensor, one: int, BITS: tl.constexpr) -> tl.tensor:
    """Of codes in offset binary, eight or four in each word (A, B, BITS): (A, B, 32)."""
    upper = words >> 12
    if BITS == 4:
        even = in_order(
            code(words, one, 0, 4, 8) * factor,
            code(words, one, 8, 4, 8) * factor,
            code(words, one, 16, 4, 8) * factor,
            code(upper, one, 12, 4, 8) * factor,
        )
        odd = in_order(
            code(words, one, 4, 4, 8) * factor,
            code(words, one, 12, 4, 8) * factor,
            code(upper, one, 8, 4, 8) * factor,
            code(upper, one, 16, 4, 8) * factor,
        )
        weight = tl.interleave(even, odd)
    else:
        weight = in_order(
            code(words, one, 0, 8, 128) * factor,
            code(words, one, 8, 8, 128) * factor,
            code(upper, one, 4, 8, 128) * factor,
            code(upper, one, 12, 8, 128) * factor,
        )
    return weight


@triton.jit
def fp4_weights(words: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """Of E2M1 codes, eight in each word (A, B, 4): (A, B, 32)."""
    a, b, c, d = fp4(words, 0), fp4(words, 8), fp4(words, 16), fp4(words, 24)
    even = in_order(a * factor, b * factor, c * factor, d * factor)
    a, b, c, d = fp4(words, 4), fp4(words, 12), fp4(words, 20), fp4(words, 28)
    return tl.interleave(even, in_order(a * factor, b * factor, c * factor, d * factor))


@triton.jit
def block_tiles(
    raw: tl.tensor,
    step: int,
    inside: tl.tensor,
    one: int,
    KIND: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> tl.tuple:
    """Of rows (ROWS, 1, 1) of GGML's blocks, the tiles of a step, float32. CHUNKS of Q4_K divide 4,
    those of Q6_K 2: a step is in one block."""
    ROWS: tl.constexpr = raw.shape[0]
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    byte = tl.arange(0, 32)[None, None, :]
    half = tl.arange(0, 16)[None, None, :]
    first = step * CHUNKS
    if KIND == "Q4_K":
        low, high = q4_k_weights(raw, first // 4, first % 4 + chunk, inside, one)
    elif KIND == "Q6_K":
        sixteen = first % 2 * 4 + tl.arange(0, 4 * CHUNKS)[None, :, None]
        low, high = q6_k_weights(raw, first // 2, sixteen, half, inside)
    elif KIND == "Q4_0":
        low, high = q4_0_weights(raw, first + chunk, half, inside)
    else:
        low = q8_0_weights(raw, first + chunk, byte, inside)
        high = low
    COLUMNS: tl.constexpr = low.shape[1] * low.shape[2]
    tiles: tl.tuple = (tl.reshape(low, (ROWS, COLUMNS)),)
    if KIND != "Q8_0":
        tiles += (tl.reshape(high, (ROWS, COLUMNS)),)
    return tiles


@triton.jit
def grouped_tiles(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor,
    scales: tl.tensor,
    scale_group: int,
    step: int,
    inside: tl.tensor,
    one: int,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> tl.tuple:
    """The same of codes of BITS beside scales, which GROUP chunks of 32 share, or all, if 0; of
    E2M1 where scales are exponents in bytes."""
    ROWS: tl.constexpr = codes.shape[0]
    chunk = step * CHUNKS + tl.arange(0, CHUNKS)[None, :, None]
    group = chunk // GROUP if GROUP else chunk * 0
    factor = tl.load(scales + group * scale_group, mask=inside, other=0)
    at = codes.to(tl.pointer_type(tl.uint32)) + chunk * BITS + tl.arange(0, BITS)[None, None, :]
    words = tl.load(at, mask=inside, other=0)
    if scales.dtype.element_ty == tl.uint8:
        weights = fp4_weights(words, power_of_two(factor))
    else:
        weights = word_weights(words, factor.to(tl.float32), one, BITS)
    return (tl.reshape(weights, (ROWS, CHUNKS * 32)),)


@triton.jit
def step_tiles(  # noqa: PLR0913
    lines: tl.tensor,
    scales: tl.tensor,
    scale_group: int,
    step: int,
    chunks: int,
    one: int,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
) -> tl.tuple:
    """One or two tiles of any format, zeros past the last of ``chunks``."""
    inside = tl.full((1, 1, 1), True, tl.int1)
    if not EVEN:
        inside = step * CHUNKS + tl.arange(0, CHUNKS)[None, :, None] < chunks
    if KIND == "ct4" or KIND == "mxfp4":  # noqa: PLR1714 - Triton knows no sets
        tiles = grouped_tiles(lines, scales, scale_group, step, inside, one, 4, GROUP, CHUNKS)
    elif KIND == "ct8":
        tiles = grouped_tiles(lines, scales, scale_group, step, inside, one, 8, GROUP, CHUNKS)
    else:
        tiles = block_tiles(lines, step, inside, one, KIND, CHUNKS)
    return tiles


@triton.jit
def store_totals(  # noqa: PLR0913
    total: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    rows: int,
    tokens: int,
    BIAS: tl.constexpr,
) -> None:
    """Totals (ROWS, TOKENS) of these rows and tokens to y (tokens, rows)."""
    inside = row[:, None] < rows
    number = rounded(total, bias, row[:, None], inside, y.dtype.element_ty, BIAS)
    place = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(place, number, mask=inside & (token < tokens)[None, :])


@triton.jit
def tile_columns(STEP: tl.constexpr) -> tl.tensor:
    """Which columns of a step its first tile has: (K, 1)."""
    column = tl.arange(0, STEP[0] * STEP[2])
    return (column // STEP[0] * STEP[1] + column % STEP[0])[:, None]


@triton.jit
def tile_totals(  # noqa: PLR0913
    lines: tl.tensor,
    scales: tl.tensor,
    numbers: tl.tensor,
    first: int,
    last: int,
    width: int,
    scale_group: int,
    one: int,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """What steps from ``first`` to before ``last`` give of rows at ``lines`` (ROWS, 1, 1) and of
    tokens at ``numbers`` (1, TOKENS): sums, (ROWS, TOKENS), float32."""
    PIECE: tl.constexpr = STEP[0]
    CHUNK: tl.constexpr = STEP[1]
    CHUNKS: tl.constexpr = STEP[2]
    column = tile_columns(STEP)
    total = tl.zeros((lines.shape[0], TOKENS), tl.float32)
    for step in range(first, last):
        tiles = step_tiles(
            lines, scales, scale_group, step, width // CHUNK, one, KIND, GROUP, CHUNKS, EVEN
        )
        for i in tl.static_range(CHUNK // PIECE):
            at = step * (CHUNKS * CHUNK) + i * PIECE + column
            x_KT = tl.load(numbers + at) if EVEN else tl.load(numbers + at, at < width, 0)
            total = tl.dot(tiles[i].to(x_KT.dtype), x_KT, total)
    return total


@triton.jit(do_not_specialize=["rows", "tokens", "one", "splits"])
def multiply_tiles(  # noqa: PLR0913
    codes: tl.tensor,
    scale: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: int,
    tokens: int,
    width: int,
    one: int,
    splits: int,
    pieces: int,
    scale_row: int,
    scale_group: int,
    KIND: tl.constexpr,
    NBYTES: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """x (tokens, width) times rows of codes, ``pieces`` of NBYTES apart: y (tokens, rows).

    STEP is a ``tiles.Step``; EVEN: none goes past the last column. Each of ``splits`` programs has
    a share of the steps; of several, y has the sums: (splits, tokens, rows), float32.
    """
    CHUNK: tl.constexpr = STEP[1]
    CHUNKS: tl.constexpr = STEP[2]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    own_row = tl.minimum(row, rows - 1).to(tl.int64)[:, None, None]
    lines, scales = codes + own_row * (pieces * NBYTES), scale + own_row * scale_row
    numbers = x + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * width
    steps = tl.cdiv(width, CHUNKS * CHUNK)
    first, share = tl.program_id(2) * tl.cdiv(steps, splits), tl.cdiv(steps, splits)
    last = tl.minimum(first + share, steps)
    total = tile_totals(
        lines, scales, numbers, first, last, width, scale_group, one,
        KIND, GROUP, STEP, EVEN, TOKENS,
    )  # fmt: skip
    own_y = y + tl.program_id(2).to(tl.int64) * tokens * rows
    store_totals(total, bias, own_y, row, token, rows, tokens, BIAS)
