"""The Triton kernel that multiplies few tokens by a matrix of Q4_0 or Q8_0, as those in ``matvec``
do."""

from __future__ import annotations

import triton
import triton.language as tl

from .code_floats import code, eight_x, signed_byte
from .matvec import add_scaled, own_rows, own_tokens, store_sums, zeros


@triton.jit
def pair_products(  # noqa: PLR0913
    part: tl.tensor, pair: tl.tensor, first: tl.tuple, second: tl.tuple, one: int,
    BITS: tl.constexpr, NUMBER: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """part, plus the products of the codes in two bytes, number NUMBER of four such pairs."""
    if BITS == 4:
        part += code(pair, one, 0, 4, 8) * first[2 * NUMBER]
        part += code(pair, one, 4, 4, 8) * second[2 * NUMBER]
        part += code(pair, one, 8, 4, 8) * first[2 * NUMBER + 1]
        part += code(pair, one, 12, 4, 8) * second[2 * NUMBER + 1]
    else:
        part += signed_byte(pair, one, 0) * first[2 * NUMBER]
        part += signed_byte(pair, one, 8) * first[2 * NUMBER + 1]
    return part


@triton.jit
def sums_of_blocks(  # noqa: PLR0913
    halves: tl.tuple,
    x: tl.tuple,
    pieces: int,
    one: int,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
) -> tl.tuple:
    """Of tokens and rows, the sums that threads have: see ``multiply_blocks``."""
    IN_BLOCK: tl.constexpr = BITS // 2  # pieces
    HALVES: tl.constexpr = 1 + 2 * BITS  # 16 bits each
    total = zeros(TOKENS * ROWS, PIECES)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)
        piece = tl.minimum(own, pieces - 1)
        block, place = piece // IN_BLOCK, piece % IN_BLOCK
        factors: tl.tuple = ()
        pairs: tl.tuple = ()
        for r in tl.static_range(ROWS):
            head = halves[r] + block * HALVES
            factors += (tl.load(head).to(tl.float16, bitcast=True),)
            for i in tl.static_range(4):
                pair = tl.load(head + place * 4 + (1 + i)).to(tl.uint32)
                pairs += (pair,)
        parts: tl.tuple = ()
        for t in tl.static_range(TOKENS):
            first = eight_x(x[t], block * 32 + place * 8)
            second = first
            if BITS == 4:
                second = eight_x(x[t], block * 32 + place * 8 + 16)
            for r in tl.static_range(ROWS):
                part = tl.zeros((PIECES,), tl.float32)
                for i in tl.static_range(4):
                    part = pair_products(part, pairs[4 * r + i], first, second, one, BITS, i)
                parts += (part,)
        total = add_scaled(total, parts, factors, own < pieces, TOKENS, ROWS)
    return total


@triton.jit(do_not_specialize=["rows", "tokens", "one"])
def multiply_blocks(  # noqa: PLR0913
    raw: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: int,
    tokens: int,
    pieces: int,
    one: int,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Q4_0 and Q8_0: a float16 scale and 32 codes, of which 8 bytes are a piece. They are aligned
    to no more than two. x is (tokens, 64 / BITS * pieces), y (tokens, rows)."""
    IN_BLOCK: tl.constexpr = BITS // 2  # pieces
    HALVES: tl.constexpr = 1 + 2 * BITS  # 16 bits each
    halves = raw.to(tl.pointer_type(tl.uint16))
    halves = own_rows(halves, pieces // IN_BLOCK * HALVES, rows, ROWS)
    numbers = own_tokens(x, 64 // BITS * pieces, tokens, TOKENS)
    total = sums_of_blocks(halves, numbers, pieces, one, BITS, TOKENS, ROWS, PIECES)
    store_sums(y, bias, total, rows, tokens, BIAS, TOKENS, ROWS)
