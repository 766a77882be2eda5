"""The Triton kernel that multiplies few tokens by a matrix of Q4_K, as those in ``matvec`` do."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks256 import half_float
from .code_floats import code, eight_x, four, sum_of_eight
from .matvec import own_rows, own_tokens, store_sums


@triton.jit
def scales_and_minima(
    first: tl.tensor, second: tl.tensor, rest: tl.tensor, pair: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Of groups 2 * pair and 2 * pair + 1 of Q4_K blocks, ``pair`` 0 to 3: six bits each in bytes 0
    and 1, of these words of their beginning. See ``blocks256.scale_and_minimum``."""
    plain = pair < 2
    shift = (pair % 2 * 16).to(tl.uint32)
    low_bits = tl.where(plain, 0x3F3F, 0x0F0F).to(tl.uint32)
    high_bits = tl.where(plain, 0, 0x3030).to(tl.uint32)
    scale = (tl.where(plain, first, rest) >> shift) & low_bits
    scale |= (first >> (shift + 2)) & high_bits
    shifted = shift + tl.where(plain, 0, 4).to(tl.uint32)
    minimum = (tl.where(plain, second, rest) >> shifted) & low_bits
    minimum |= (second >> (shift + 2)) & high_bits
    return scale, minimum


@triton.jit
def low_and_high(  # noqa: PLR0913 - a kernel has no records
    low: tl.tensor,
    high: tl.tensor,
    word: tl.tensor,
    x: tl.tuple,
    x_high: tl.tuple,
    one: int,
    FIRST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """low, plus products of the low nibbles of four bytes with four of x, from number FIRST on;
    high, plus those of the high nibbles with four of x_high."""
    upper = word >> 12
    low += code(word, one, 0, 4, 0) * x[FIRST]
    high += code(word, one, 4, 4, 0) * x_high[FIRST]
    low += code(word, one, 8, 4, 0) * x[FIRST + 1]
    high += code(word, one, 12, 4, 0) * x_high[FIRST + 1]
    low += code(word, one, 16, 4, 0) * x[FIRST + 2]
    high += code(upper, one, 8, 4, 0) * x_high[FIRST + 2]
    low += code(upper, one, 12, 4, 0) * x[FIRST + 3]
    high += code(upper, one, 16, 4, 0) * x_high[FIRST + 3]
    return low, high


@triton.jit
def block_words(words: tl.tensor, piece: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of pieces of Q4_K: the first four words of the block, and the eight with the codes."""
    place = tl.arange(0, 4)[None, None, None, :]
    block = (words + piece // 4 * 36)[:, :, :, None] + place
    codes = (words + (piece // 4 * 36 + piece % 4 * 8 + 4))[:, :, :, None] + place
    return tl.load(block), tl.load(codes), tl.load(codes + 4)


@triton.jit
def two_groups(
    codes: tl.tensor, more: tl.tensor, x: tl.tensor, at: tl.tensor, one: int
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of the low nibbles of pieces and of the high ones the products with x from ``at`` on, and
    the sums of that x."""
    TOKENS: tl.constexpr = at.shape[0]
    PIECES: tl.constexpr = at.shape[2]
    low = tl.zeros((TOKENS, codes.shape[1], PIECES), tl.float32)
    high = tl.zeros((TOKENS, codes.shape[1], PIECES), tl.float32)
    x_low = tl.zeros((TOKENS, 1, PIECES), tl.float32)
    x_high = tl.zeros((TOKENS, 1, PIECES), tl.float32)
    for half in tl.static_range(2):
        word = four(codes if half == 0 else more)
        for q in tl.static_range(2):
            first = at + 16 * half + 8 * q
            lows, highs = eight_x(x, first), eight_x(x, first + 32)
            low, high = low_and_high(low, high, word[2 * q], lows, highs, one, 0)
            low, high = low_and_high(low, high, word[2 * q + 1], lows, highs, one, 4)
            x_low += sum_of_eight(lows)
            x_high += sum_of_eight(highs)
    return low, high, x_low, x_high


@triton.jit(do_not_specialize=["rows", "tokens", "one"])
def multiply_q4_k(  # noqa: PLR0913 - a kernel has no records
    raw: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: int,
    tokens: int,
    pieces: int,
    one: int,
    AHEAD: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Q4_K: a piece is the 64 codes of two groups; minima meet the sums of x. x is
    (tokens, 64 * pieces), y (tokens, rows)."""
    words = own_rows(raw.to(tl.pointer_type(tl.uint32)), pieces // 4 * 36, rows, ROWS)
    x_token = own_tokens(tokens, TOKENS) * (64 * pieces)
    total = tl.zeros((TOKENS, ROWS, PIECES), tl.float32)
    if AHEAD:
        piece = tl.minimum(tl.arange(0, PIECES)[None, None, :], pieces - 1)
        head, codes, more = block_words(words, piece)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)[None, None, :]
        piece = tl.minimum(own, pieces - 1)
        if AHEAD:
            later = tl.minimum(own + PIECES, pieces - 1)
            next_head, next_codes, next_more = block_words(words, later)
            tl.debug_barrier()
        else:
            head, codes, more = block_words(words, piece)
        both, first, second, rest = four(head)
        scale, minimum = scales_and_minima(first, second, rest, piece % 4)
        at = x_token + piece * 64
        low, high, x_low, x_high = two_groups(codes, more, x, at, one)
        # Which of two products is rounded is said here, or it would be the compiler's choice.
        part = tl.fma(code(scale, one, 0, 8, 0), low, code(scale, one, 8, 8, 0) * high)
        taken = tl.fma(code(minimum, one, 0, 8, 0), x_low, code(minimum, one, 8, 8, 0) * x_high)
        part = tl.fma(half_float(both), part, -(half_float(both >> 16) * taken))
        total = tl.where(own < pieces, total + part, total)
        if AHEAD:
            head, codes, more = next_head, next_codes, next_more
    store_sums(y, bias, total, rows, tokens, BIAS)
