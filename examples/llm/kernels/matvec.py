"""Triton kernels that multiply few tokens by a packed matrix, without unpacking it to memory.

A program computes ROWS numbers of each of TOKENS tokens. It goes along its rows in steps of PIECES
pieces, which are what a thread takes at a time: it sums up what a piece gives and multiplies that
by the scale. At the end threads add up their sums, in an order that depends on nothing but the
width and PIECES. Everything is float32 inside, so weights are not rounded.

Tensors have pieces alone; rows and tokens are tuples of them: number t * ROWS + r is of token t and
row r. So a thread has all tokens and rows of its pieces, and nothing changes hands before the end.
In tensors of three dimensions, compilers of before Triton 3.7 move words between threads in each
step, and the order of sums depends on ROWS and TOKENS. Past the last piece and row the last one is
read again, and its sum not taken: that costs less than loads that may not be done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .code_floats import code, eight_x, four, fp4, power_of_two


@triton.jit
def own_rows(base: tl.tensor, stride: int, rows: int, ROWS: tl.constexpr) -> tl.tuple:
    """Pointers to the program's rows, of ``stride`` elements each."""
    found: tl.tuple = ()
    for r in tl.static_range(ROWS):
        row = tl.minimum(tl.program_id(0) * ROWS + r, rows - 1)
        found += (base + row.to(tl.int64) * stride,)
    return found


@triton.jit
def own_tokens(x: tl.tensor, width: int, tokens: int, TOKENS: tl.constexpr) -> tl.tuple:
    """Pointers to the program's tokens, of ``width`` numbers each."""
    found: tl.tuple = ()
    for t in tl.static_range(TOKENS):
        token = tl.minimum(tl.program_id(1) * TOKENS + t, tokens - 1)
        found += (x + token * width,)
    return found


@triton.jit
def zeros(COUNT: tl.constexpr, PIECES: tl.constexpr) -> tl.tuple:
    """As many sums of pieces as are said."""
    found: tl.tuple = ()
    for _ in tl.static_range(COUNT):
        found += (tl.zeros((PIECES,), tl.float32),)
    return found


@triton.jit
def store_sums(  # noqa: PLR0913 - a kernel has no records
    y: tl.tensor,
    bias: tl.tensor,
    total: tl.tuple,
    rows: int,
    tokens: int,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Of each token and row, the sum over pieces; rounded, and the bias added to that, of rows that
    lie BIAS elements apart, unless BIAS is 0."""
    for r in tl.static_range(ROWS):
        row = tl.program_id(0) * ROWS + r
        if BIAS:
            added = tl.load(bias + row * BIAS, mask=row < rows, other=0).to(tl.float32)
        for t in tl.static_range(TOKENS):
            token = tl.program_id(1) * TOKENS + t
            one = tl.sum(total[t * ROWS + r], axis=0).to(y.dtype.element_ty)
            if BIAS:
                one = (one.to(tl.float32) + added).to(y.dtype.element_ty)
            inside = (row < rows) & (token < tokens)
            tl.store(y + token.to(tl.int64) * rows + row, one, mask=inside)


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
def load_words(
    words: tl.tuple, piece: tl.tensor, BITS: tl.constexpr, ROWS: tl.constexpr
) -> tuple[tl.tuple, tl.tuple]:
    """Of rows, the words of pieces of 32 codes: four, and the other four, or the same again of 4
    bits."""
    held: tl.tuple = ()
    more: tl.tuple = ()
    for r in tl.static_range(ROWS):
        at = (words[r] + piece * BITS)[:, None] + tl.arange(0, 4)[None, :]
        first = tl.load(at)
        second = first
        if BITS == 8:
            second = tl.load(at + 4)
        held += (first,)
        more += (second,)
    return held, more


@triton.jit
def load_scales(
    scales: tl.tuple,
    piece: tl.tensor,
    scale_group: int,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tuple:
    """Of rows, the scales of pieces, GROUP of which share one, or all, if 0."""
    group = piece // GROUP if GROUP else piece * 0
    found: tl.tuple = ()
    for r in tl.static_range(ROWS):
        found += (tl.load(scales[r] + group * scale_group),)
    return found


@triton.jit
def add_eight(  # noqa: PLR0913
    part: tl.tensor,
    held: tl.tensor,
    more: tl.tensor,
    x: tl.tuple,
    one: int,
    BITS: tl.constexpr,
    Q: tl.constexpr,
) -> tl.tensor:
    """part, plus the products of eight codes of pieces, from 8 * Q on, with eight of x."""
    if BITS == 4:
        part = add_nibbles(part, four(held)[Q], x, one)
    else:
        word = four(held if Q < 2 else more)
        part = add_bytes(part, word[Q % 2 * 2], x, one, 0)
        part = add_bytes(part, word[Q % 2 * 2 + 1], x, one, 4)
    return part


@triton.jit
def piece_products(  # noqa: PLR0913
    held: tl.tuple,
    more: tl.tuple,
    x: tl.tuple,
    at: tl.tensor,
    one: int,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tuple:
    """Of tokens and rows, the products of the codes that ``load_words`` gives with x from ``at``
    on."""
    PIECES: tl.constexpr = at.shape[0]
    parts = zeros(TOKENS * ROWS, PIECES)
    for q in tl.static_range(4):
        added: tl.tuple = ()
        for t in tl.static_range(TOKENS):
            numbers = eight_x(x[t], at + 8 * q)
            for r in tl.static_range(ROWS):
                part = add_eight(parts[t * ROWS + r], held[r], more[r], numbers, one, BITS, q)
                added += (part,)
        parts = added
    return parts


@triton.jit
def add_scaled(
    total: tl.tuple,
    parts: tl.tuple,
    factors: tl.tuple,
    inside: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tuple:
    """total, plus parts times the factors of their rows where that is inside."""
    added: tl.tuple = ()
    for t in tl.static_range(TOKENS):
        for r in tl.static_range(ROWS):
            before = total[t * ROWS + r]
            more = before + parts[t * ROWS + r] * factors[r].to(tl.float32)
            added += (tl.where(inside, more, before),)
    return added


@triton.jit
def sums_of_words(  # noqa: PLR0913
    words: tl.tuple,
    scales: tl.tuple,
    x: tl.tuple,
    pieces: int,
    one: int,
    scale_group: int,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
) -> tl.tuple:
    """Of tokens and rows, the sums that threads have: see ``multiply_words``."""
    total = zeros(TOKENS * ROWS, PIECES)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)
        piece = tl.minimum(own, pieces - 1)
        factors = load_scales(scales, piece, scale_group, GROUP, ROWS)
        held, more = load_words(words, piece, BITS, ROWS)
        parts = piece_products(held, more, x, piece * 32, one, BITS, TOKENS, ROWS)
        total = add_scaled(total, parts, factors, own < pieces, TOKENS, ROWS)
    return total


@triton.jit
def sums_of_fp4(
    words: tl.tuple,
    scales: tl.tuple,
    x: tl.tuple,
    pieces: int,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
) -> tl.tuple:
    """Of one token and rows of MXFP4, the sums that threads have; a piece is 32 codes of E2M1, with
    an exponent of its own in ``scales``."""
    total = zeros(ROWS, PIECES)
    for step in range(0, pieces, PIECES):
        own = step + tl.arange(0, PIECES)
        piece = tl.minimum(own, pieces - 1)
        held, _ = load_words(words, piece, 4, ROWS)
        parts = zeros(ROWS, PIECES)
        for q in tl.static_range(4):
            numbers = eight_x(x[0], piece * 32 + 8 * q)
            added: tl.tuple = ()
            for r in tl.static_range(ROWS):
                part, word = parts[r], four(held[r])[q]
                for k in tl.static_range(8):
                    part += fp4(word, 4 * k) * numbers[k]
                added += (part,)
            parts = added
        factors: tl.tuple = ()
        for r in tl.static_range(ROWS):
            factors += (power_of_two(tl.load(scales[r] + piece)),)
        total = add_scaled(total, parts, factors, own < pieces, 1, ROWS)
    return total


@triton.jit(do_not_specialize=["rows", "tokens", "one"])
def multiply_words(  # noqa: PLR0913
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
    numbers = own_tokens(x, 32 * pieces, tokens, TOKENS)
    total = sums_of_words(words, scales, numbers, pieces, one, scale_group,
                          BITS, GROUP, TOKENS, ROWS, PIECES)  # fmt: skip
    store_sums(y, bias, total, rows, tokens, BIAS, TOKENS, ROWS)
