"""The Triton kernel that multiplies few tokens by a matrix of Q4_K, as those in ``matvec`` do."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks256 import half_float
from .code_floats import code, eight_x, four, sum_of_eight
from .matvec import own_rows, own_tokens, store_sums, zeros


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
def load_blocks(
    words: tl.tuple, piece: tl.tensor, ROWS: tl.constexpr
) -> tuple[tl.tuple, tl.tuple, tl.tuple]:
    """Of rows, of pieces of Q4_K: the first four words of the block, and the eight with the
    codes."""
    place = tl.arange(0, 4)[None, :]
    heads: tl.tuple = ()
    codes: tl.tuple = ()
    more: tl.tuple = ()
    for r in tl.static_range(ROWS):
        block = words[r] + piece // 4 * 36
        at = (block + (piece % 4 * 8 + 4))[:, None] + place
        heads += (tl.load(block[:, None] + place),)
        codes += (tl.load(at),)
        more += (tl.load(at + 4),)
    return heads, codes, more


@triton.jit
def two_groups(  # noqa: PLR0913
    codes: tl.tuple,
    more: tl.tuple,
    x: tl.tuple,
    at: tl.tensor,
    one: int,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple, tl.tuple, tl.tuple]:
    """Of tokens and rows, the products of the low nibbles of pieces and of the high ones with x
    from ``at`` on; and of tokens the sums of that x."""
    PIECES: tl.constexpr = at.shape[0]
    low, high = zeros(TOKENS * ROWS, PIECES), zeros(TOKENS * ROWS, PIECES)
    x_low, x_high = zeros(TOKENS, PIECES), zeros(TOKENS, PIECES)
    for q in tl.static_range(4):
        lower: tl.tuple = ()
        higher: tl.tuple = ()
        sums: tl.tuple = ()
        high_sums: tl.tuple = ()
        for t in tl.static_range(TOKENS):
            lows, highs = eight_x(x[t], at + 8 * q), eight_x(x[t], at + 8 * q + 32)
            for r in tl.static_range(ROWS):
                word = four(codes[r] if q < 2 else more[r])
                one_low, one_high = low_and_high(
                    low[t * ROWS + r], high[t * ROWS + r], word[q % 2 * 2], lows, highs, one, 0
                )
                one_low, one_high = low_and_high(
                    one_low, one_high, word[q % 2 * 2 + 1], lows, highs, one, 4
                )
                lower += (one_low,)
                higher += (one_high,)
            sums += (x_low[t] + sum_of_eight(lows),)
            high_sums += (x_high[t] + sum_of_eight(highs),)
        low, high, x_low, x_high = lower, higher, sums, high_sums
    return low, high, x_low, x_high


@triton.jit
def add_blocks(  # noqa: PLR0913
    total: tl.tuple,
    heads: tl.tuple,
    products: tl.tuple,
    piece: tl.tensor,
    inside: tl.tensor,
    one: int,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tuple:
    """total, plus what ``two_groups`` gives, times the scales of the groups, where inside."""
    low, high, x_low, x_high = products
    added: tl.tuple = ()
    for t in tl.static_range(TOKENS):
        for r in tl.static_range(ROWS):
            both, first, second, rest = four(heads[r])
            scale, minimum = scales_and_minima(first, second, rest, piece % 4)
            # Which of two products is rounded is said here, or it would be the compiler's choice.
            part = code(scale, one, 8, 8, 0) * high[t * ROWS + r]
            part = tl.fma(code(scale, one, 0, 8, 0), low[t * ROWS + r], part)
            taken = code(minimum, one, 8, 8, 0) * x_high[t]
            taken = tl.fma(code(minimum, one, 0, 8, 0), x_low[t], taken)
            part = tl.fma(half_float(both), part, -(half_float(both >> 16) * taken))
            before = total[t * ROWS + r]
            added += (tl.where(inside, before + part, before),)
    return added


@triton.jit
def sums_of_q4_k(  # noqa: PLR0913
    words: tl.tuple,
    x: tl.tuple,
    pieces: int,
    one: int,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
) -> tl.tuple:
    """Of tokens and rows, the sums that threads have: see ``multiply_q4_k``."""
    total = zeros(TOKENS * ROWS, PIECES)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)
        piece = tl.minimum(own, pieces - 1)
        heads, codes, more = load_blocks(words, piece, ROWS)
        products = two_groups(codes, more, x, piece * 64, one, TOKENS, ROWS)
        total = add_blocks(total, heads, products, piece, own < pieces, one, TOKENS, ROWS)
    return total


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
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Q4_K: a piece is the 64 codes of two groups; minima meet the sums of x. x is
    (tokens, 64 * pieces), y (tokens, rows)."""
    words = own_rows(raw.to(tl.pointer_type(tl.uint32)), pieces // 4 * 36, rows, ROWS)
    numbers = own_tokens(x, 64 * pieces, tokens, TOKENS)
    total = sums_of_q4_k(words, numbers, pieces, one, TOKENS, ROWS, PIECES)
    store_sums(y, bias, total, rows, tokens, BIAS, TOKENS, ROWS)
