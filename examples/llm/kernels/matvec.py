"""Triton kernels that multiply few tokens by a packed matrix, without unpacking it to memory.

A program computes ROWS numbers of each of TOKENS tokens. It goes along its rows in steps of PIECES
pieces, which are what a thread takes at a time: it sums up what a piece gives and multiplies that
by the scale. At the end threads add up their sums, in an order that depends on nothing but the
width and the tile. Everything is float32 inside, so weights are not rounded.

Tensors are (tokens, rows, pieces). With 32 pieces for each warp, a thread has all tokens and rows
of its pieces, and nothing changes hands before the end. Past the last piece and row the last one
is read again, and its sum not taken: that costs less than loads that may not be done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks256 import half_float
from .code_floats import code, eight_x, four_words, signed_byte, sum_of_eight


@triton.jit
def own_rows(base: tl.tensor, stride: int, rows: int, ROWS: tl.constexpr) -> tl.tensor:
    """Pointers to the program's rows, of ``stride`` elements each."""
    first = tl.program_id(0) * ROWS
    row = tl.minimum(tl.arange(0, ROWS), rows - 1 - first)[None, :, None]
    return base + first.to(tl.int64) * stride + row * stride


@triton.jit
def own_tokens(tokens: int, TOKENS: tl.constexpr) -> tl.tensor:
    """Numbers of the program's tokens."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    return tl.minimum(token, tokens - 1)


@triton.jit
def store_sums(
    y: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    rows: int,
    tokens: int,
    BIAS: tl.constexpr,
) -> None:
    """Of each token and row, the sum over pieces; rounded, and the bias added to that, if BIAS."""
    TOKENS: tl.constexpr = total.shape[0]
    ROWS: tl.constexpr = total.shape[1]
    sums = tl.sum(total, axis=2).to(y.dtype.element_ty)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    if BIAS:
        added = tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
        sums = (sums.to(tl.float32) + added).to(y.dtype.element_ty)
    inside = (row < rows) & (token < tokens)
    tl.store(y + token.to(tl.int64) * rows + row, sums, mask=inside)


@triton.jit
def add_nibbles(part: tl.tensor, word: tl.tensor, x: tl.tuple, one: int) -> tl.tensor:
    """part, plus the products of the eight codes in words, less 8, with eight of x."""
    upper = word >> 12
    for k in tl.static_range(4):
        part += code(word, one, 4 * k, 4, 8) * x[k]
    for k in tl.static_range(4):
        part += code(upper, one, 4 * k + 4, 4, 8) * x[k + 4]
    return part


@triton.jit
def add_bytes(
    part: tl.tensor, word: tl.tensor, x: tl.tuple, one: int, FIRST: tl.constexpr
) -> tl.tensor:
    """part, plus the products of the four codes in words, less 128, with x from number FIRST on."""
    upper = word >> 12
    part += code(word, one, 0, 8, 128) * x[FIRST]
    part += code(word, one, 8, 8, 128) * x[FIRST + 1]
    part += code(upper, one, 4, 8, 128) * x[FIRST + 2]
    part += code(upper, one, 12, 8, 128) * x[FIRST + 3]
    return part


@triton.jit(do_not_specialize=["rows", "tokens", "one"])
def multiply_words(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor,
    scale: tl.tensor,
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: int,
    tokens: int,
    pieces: int,
    one: int,
    code_pieces: int,
    scale_row: int,
    scale_group: int,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Codes of 4 or 8 bits, symmetric, scales beside them: a piece is 32, rows lie ``code_pieces``
    of them apart, GROUP of them share a scale, or all, if 0. x is (tokens, 32 * pieces), y
    (tokens, rows)."""
    words = own_rows(codes.to(tl.pointer_type(tl.uint32)), code_pieces * BITS, rows, ROWS)
    scales = own_rows(scale, scale_row, rows, ROWS)
    x_token = own_tokens(tokens, TOKENS) * (32 * pieces)
    total = tl.zeros((TOKENS, ROWS, PIECES), tl.float32)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)[None, None, :]
        piece = tl.minimum(own, pieces - 1)
        group = piece // GROUP if GROUP else piece * 0
        factor = tl.load(scales + group * scale_group).to(tl.float32)
        part = tl.zeros((TOKENS, ROWS, PIECES), tl.float32)
        for q in tl.static_range(4):
            numbers = eight_x(x, x_token + piece * 32 + 8 * q)
            if BITS == 4:
                if q == 0:
                    word = four_words(words + piece * 4)
                part = add_nibbles(part, word[q], numbers, one)
            else:
                if q % 2 == 0:
                    word = four_words(words + piece * 8 + 2 * q)
                part = add_bytes(part, word[q % 2 * 2], numbers, one, 0)
                part = add_bytes(part, word[q % 2 * 2 + 1], numbers, one, 4)
        total = tl.where(own < pieces, total + part * factor, total)
    store_sums(y, bias, total, rows, tokens, BIAS)


@triton.jit(do_not_specialize=["rows", "tokens", "one"])
def multiply_blocks(  # noqa: PLR0913 - a kernel has no records
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
    x_token = own_tokens(tokens, TOKENS) * (64 // BITS * pieces)
    total = tl.zeros((TOKENS, ROWS, PIECES), tl.float32)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)[None, None, :]
        piece = tl.minimum(own, pieces - 1)
        block, place = piece // IN_BLOCK, piece % IN_BLOCK
        head = halves + block * HALVES
        factor = tl.load(head).to(tl.float16, bitcast=True).to(tl.float32)
        part = tl.zeros((TOKENS, ROWS, PIECES), tl.float32)
        at = x_token + block * 32 + place * 8
        first = eight_x(x, at)
        if BITS == 4:
            second = eight_x(x, at + 16)
        for i in tl.static_range(4):
            pair = tl.load(head + place * 4 + (1 + i)).to(tl.uint32)
            if BITS == 4:
                part += code(pair, one, 0, 4, 8) * first[2 * i]
                part += code(pair, one, 4, 4, 8) * second[2 * i]
                part += code(pair, one, 8, 4, 8) * first[2 * i + 1]
                part += code(pair, one, 12, 4, 8) * second[2 * i + 1]
            else:
                part += signed_byte(pair, one, 0) * first[2 * i]
                part += signed_byte(pair, one, 8) * first[2 * i + 1]
        total = tl.where(own < pieces, total + part * factor, total)
    store_sums(y, bias, total, rows, tokens, BIAS)


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
    x_token = own_tokens(tokens, TOKENS) * (64 * pieces)
    total = tl.zeros((TOKENS, ROWS, PIECES), tl.float32)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)[None, None, :]
        piece = tl.minimum(own, pieces - 1)
        block = piece // 4
        both, first, second, rest = four_words(words + block * 36)
        scale, minimum = scales_and_minima(first, second, rest, piece % 4)
        low = tl.zeros((TOKENS, ROWS, PIECES), tl.float32)
        high = tl.zeros((TOKENS, ROWS, PIECES), tl.float32)
        x_low = tl.zeros((TOKENS, 1, PIECES), tl.float32)
        x_high = tl.zeros((TOKENS, 1, PIECES), tl.float32)
        for half in tl.static_range(2):
            word = four_words(words + block * 36 + 4 + piece % 4 * 8 + 4 * half)
            at = x_token + piece * 64 + 16 * half
            for q in tl.static_range(2):
                lows, highs = eight_x(x, at + 8 * q), eight_x(x, at + 32 + 8 * q)
                low, high = low_and_high(low, high, word[2 * q], lows, highs, one, 0)
                low, high = low_and_high(low, high, word[2 * q + 1], lows, highs, one, 4)
                x_low += sum_of_eight(lows)
                x_high += sum_of_eight(highs)
        part = code(scale, one, 0, 8, 0) * low + code(scale, one, 8, 8, 0) * high
        taken = code(minimum, one, 0, 8, 0) * x_low + code(minimum, one, 8, 8, 0) * x_high
        part = half_float(both) * part - half_float(both >> 16) * taken
        total = tl.where(own < pieces, total + part, total)
    store_sums(y, bias, total, rows, tokens, BIAS)
