"""A Triton kernel that unpacks AWQ's transposed words."""

from __future__ import annotations

import triton
import triton.language as tl


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
