"""Triton kernels that multiply few tokens by a packed matrix, without unpacking it to memory.

A program computes ROWS numbers of each of TOKENS tokens. It goes along its rows in steps of PIECES
pieces, which are what a thread takes at a time: it sums up what a piece gives and multiplies that
by the scale. At the end threads add up their sums, in an order that depends on nothing but the
width and the tile. Everything is float32 inside, so weights are not rounded.

Tensors are (tokens, rows, pieces). With 32 pieces for each warp, a thread has all tokens and rows
of its pieces, and nothing changes hands before the end. Past the last piece and row the last one
is read again, and its sum not taken: that costs less than loads that may not be done.

AHEAD, a step's codes and scales are asked for before the step before it is computed, so that memory
is never waited for and computed with in turn. The barrier after them is for ptxas, which otherwise
moves loads to where they are used, to save registers. No bit of a result depends on AHEAD.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .code_floats import code, eight_x, four, signed_byte


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


@triton.jit
def piece_words(
    words: tl.tensor, piece: tl.tensor, BITS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The words of pieces of 32 codes: four, and the other four, or the same again of 4 bits."""
    at = (words + piece * BITS)[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
    held = tl.load(at)
    more = held
    if BITS == 8:
        more = tl.load(at + 4)
    return held, more


@triton.jit
def add_piece(  # noqa: PLR0913 - a kernel has no records
    part: tl.tensor,
    held: tl.tensor,
    more: tl.tensor,
    x: tl.tensor,
    at: tl.tensor,
    one: int,
    BITS: tl.constexpr,
) -> tl.tensor:
    """part, plus the products of the codes in what ``piece_words`` gives with x from ``at`` on."""
    word = four(held)
    for q in tl.static_range(4):
        numbers = eight_x(x, at + 8 * q)
        if BITS == 4:
            part = add_nibbles(part, word[q], numbers, one)
        else:
            if q == 2:
                word = four(more)
            part = add_bytes(part, word[q % 2 * 2], numbers, one, 0)
            part = add_bytes(part, word[q % 2 * 2 + 1], numbers, one, 4)
    return part


@triton.jit
def group_scale(
    scales: tl.tensor, piece: tl.tensor, scale_group: int, GROUP: tl.constexpr
) -> tl.tensor:
    """The scales of pieces, GROUP of which share one, or all, if 0."""
    group = piece // GROUP if GROUP else piece * 0
    return tl.load(scales + group * scale_group)


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
    AHEAD: tl.constexpr,
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
    if AHEAD:
        piece = tl.minimum(tl.arange(0, PIECES)[None, None, :], pieces - 1)
        factor = group_scale(scales, piece, scale_group, GROUP)
        held, more = piece_words(words, piece, BITS)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)[None, None, :]
        piece = tl.minimum(own, pieces - 1)
        if AHEAD:
            later = tl.minimum(own + PIECES, pieces - 1)
            next_factor = group_scale(scales, later, scale_group, GROUP)
            next_held, next_more = piece_words(words, later, BITS)
            tl.debug_barrier()
        else:
            factor = group_scale(scales, piece, scale_group, GROUP)
            held, more = piece_words(words, piece, BITS)
        part = tl.zeros((TOKENS, ROWS, PIECES), tl.float32)
        part = add_piece(part, held, more, x, x_token + piece * 32, one, BITS)
        total = tl.where(own < pieces, total + part * factor.to(tl.float32), total)
        if AHEAD:
            factor, held, more = next_factor, next_held, next_more
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
