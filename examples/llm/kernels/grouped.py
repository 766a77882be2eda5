"""Triton kernels that unpack codes with scales beside them: rows of compressed-tensors and of FP8,
and AWQ's transposed words.

A program unpacks ROWS x CHUNKS chunks of 32 weights. Scales, zero points and everything else are
looked up once a chunk, so groups are multiples of 32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3(bits: tl.tensor) -> tl.tensor:
    """The float32 numbers of E4M3 bits without infinities, on any device: with an exponent that
    float16 biases by 8 more, they are float16 bits."""
    bits = bits.to(tl.int32)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    number = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def any_scale(scale: tl.tensor) -> tl.tensor:
    """Scales as float32; in uint8, powers of two: 2 ** (scale - 127), and NaN for 255."""
    if scale.dtype == tl.uint8:
        bits = scale.to(tl.int32)
        # 2 ** -127 is subnormal; 255 << 23 is infinity.
        number = tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)
        number = tl.where(bits == 255, float("nan"), number)
    else:
        number = scale.to(tl.float32)
    return number


@triton.jit(do_not_specialize=["start", "rows", "first_row"])
def unpack_ct4(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    out: tl.tensor,
    start: int,
    rows: int,
    chunks: int,
    first_row: int,
    code_stride: int,
    scale_row: int,
    scale_group: int,
    zero_row: int,
    zero_group: int,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """4-bit codes in offset binary, the lower half of a byte first.

    ``codes`` are bytes, of which rows from ``start`` on are unpacked. A row has ``chunks``; a group
    is GROUP of them, or 0: all.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    codes += (start + first) * code_stride
    row = tl.arange(0, ROWS)[:, None, None]
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)[None, :, None]
    inside = (row < rows - first) & (chunk < chunks)
    group = chunk // GROUP if GROUP else chunk * 0
    share = start + first.to(tl.int32) + row
    step = scale + share * scale_row + group * scale_group
    step = tl.load(step, mask=inside, other=0).to(tl.float32)
    middle = 8
    if not SYMMETRIC:
        line = first_row + share
        words = zero + (line // 8) * zero_row + group * zero_group
        middle = (tl.load(words, mask=inside, other=0) >> (line % 8 * 4)) & 15
    # As many bytes a thread as make the weights that it stores at once.
    byte = tl.max_contiguous(chunk * 16 + tl.arange(0, 16)[None, None, :], [1, 1, 4])
    pairs = tl.load(codes + row * code_stride + byte, mask=inside, other=0)
    low = ((pairs & 15).to(tl.int32) - middle).to(tl.float32) * step
    high = ((pairs >> 4).to(tl.int32) - middle).to(tl.float32) * step
    place = out + first * (chunks * 32) + row * (chunks * 32)
    place += chunk * 32 + tl.arange(0, 32)[None, None, :]
    tl.store(place, tl.interleave(low, high).to(out.dtype.element_ty), mask=inside)


@triton.jit
def byte_zero(  # noqa: PLR0913 - a kernel has no records
    zero: tl.tensor,
    row: tl.tensor,
    line: tl.tensor,
    zero_row: int,
    group: tl.tensor,
    mask: tl.tensor,
    KIND: tl.constexpr,
) -> tl.tensor:
    """Zero points of 8-bit codes: bytes of rows, or four lines in a word."""
    if KIND == "int8":
        found = tl.load(zero + row * zero_row + group, mask=mask, other=0).to(tl.int32)
    else:
        words = tl.load(zero + (line // 4) * zero_row + group, mask=mask, other=0)
        found = (words >> (line % 4 * 8)) & 255
    return found


@triton.jit(do_not_specialize=["start", "rows", "first_row"])
def unpack_bytes(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    out: tl.tensor,
    start: int,
    rows: int,
    chunks: int,
    first_row: int,
    code_stride: int,
    scale_row: int,
    scale_group: int,
    zero_row: int,
    zero_group: int,
    KIND: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """One byte a weight: KIND "ct8" in offset binary, "int8" signed, or "fp8".

    As ``unpack_ct4``; GROUP_ROWS rows share a scale, or 0: all.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    codes += (start + first) * code_stride
    row = tl.arange(0, ROWS)[:, None, None]
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)[None, :, None]
    inside = (row < rows - first) & (chunk < chunks)
    group = chunk // GROUP if GROUP else chunk * 0
    share = start + first.to(tl.int32) + row
    line = first_row + share
    if KIND == "fp8":
        share = line // GROUP_ROWS if GROUP_ROWS else row * 0
    step = tl.load(scale + share * scale_row + group * scale_group, mask=inside, other=0)
    byte = tl.max_contiguous(chunk * 32 + tl.arange(0, 32)[None, None, :], [1, 1, 8])
    bits = tl.load(codes + row * code_stride + byte, mask=inside, other=0)
    if KIND == "fp8":
        number = e4m3(bits)
    else:
        middle = 0 if KIND == "int8" else 128
        if not SYMMETRIC:
            middle = byte_zero(zero, share, line, zero_row, group * zero_group, inside, KIND)
        if KIND == "int8":
            bits = bits.to(tl.int8, bitcast=True)
        number = (bits.to(tl.int32) - middle).to(tl.float32)
    weight = number * any_scale(step)
    place = out + first * (chunks * 32) + row * (chunks * 32) + byte
    tl.store(place, weight.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "rows"])
def unpack_awq(  # noqa: PLR0913 - a kernel has no records
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    out: tl.tensor,
    start: int,
    rows: int,
    width: int,
    group: int,
    code_stride: int,
    scale_stride: int,
    zero_stride: int,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Words of eight rows each, column by column; strides are from one column or group to the next.

    A program unpacks COLUMNS columns, which divides the group, of 8 * WORDS of the rows from
    ``start``, a multiple of 8, and turns them over. Row r of a word is in the four bits from
    4 * (r // 2 + r % 2 * 4) on.
    """
    first = tl.program_id(1) * COLUMNS
    at = first // group
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)[:, None]
    row = tl.arange(0, 8)[None, :]
    shift = (row // 2 + row % 2 * 4) * 4
    inside = word * 8 < rows
    middle = tl.load(zero + start // 8 + at * zero_stride + word, mask=inside, other=0)
    middle = ((middle >> shift) & 15)[None, :, :]
    step = tl.load(scale + start + at * scale_stride + word * 8 + row, mask=inside, other=0)
    step = step.to(tl.float32)[None, :, :]
    column = first + tl.arange(0, COLUMNS)[:, None, None]
    words = codes + start // 8 + column.to(tl.int64) * code_stride + word[None, :, :]
    number = (tl.load(words, mask=inside[None, :, :], other=0) >> shift[None, :, :]) & 15
    weight = ((number - middle).to(tl.float32) * step).to(out.dtype.element_ty)
    weight = weight.reshape(COLUMNS, WORDS * 8).trans()
    row = tl.program_id(0) * WORDS * 8 + tl.arange(0, WORDS * 8)[:, None]
    place = out + row.to(tl.int64) * width + first + tl.arange(0, COLUMNS)[None, :]
    tl.store(place, weight, mask=row < rows)
