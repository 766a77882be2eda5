"""Triton kernels that unpack GGML's blocks of 256 weights.

A program unpacks TILE blocks, as in ``blocks32``. Q4_K and Q5_K are aligned to 16 bytes and begin
with 16 bytes of scales, which are read as four words; Q6_K is aligned to two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks32 import block_scale


@triton.jit
def head_word(raw: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The 32 bits at these byte offsets, multiples of four."""
    return tl.load(raw.to(tl.pointer_type(tl.uint32)) + at // 4, mask=mask, other=0)


@triton.jit
def half_float(bits: tl.tensor) -> tl.tensor:
    """The low 16 bits of words as float16, as float32."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_and_minimum(
    both: tl.tensor, first: tl.tensor, second: tl.tensor, rest: tl.tensor, group: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Of these groups (0..7) of Q4_K or Q5_K blocks with these words at their beginning.

    float16 scale of scales and float16 scale of minima; six bits each of the first four scales;
    of the first four minima; the low four bits of the other scales and minima, whose upper two
    bits are above those of the first.
    """
    shift = ((group & 3) * 8).to(tl.uint32)
    first = first >> shift
    second = second >> shift
    rest = rest >> shift
    scale = tl.where(group < 4, first & 63, (rest & 15) | ((first >> 2) & 48))
    minimum = tl.where(group < 4, second & 63, ((rest >> 4) & 15) | ((second >> 2) & 48))
    return (
        scale.to(tl.int32).to(tl.float32) * half_float(both),
        minimum.to(tl.int32).to(tl.float32) * half_float(both >> 16),
    )


@triton.jit(do_not_specialize=["start", "blocks"])
def unpack_q4_k(
    raw: tl.tensor, out: tl.tensor, start: int, blocks: int, TILE: tl.constexpr
) -> None:
    """16 bytes of scales, 128 bytes: of each 32, the low nibbles, then the high ones."""
    first = tl.program_id(0).to(tl.int64) * TILE
    raw += (start + first) * 144
    block = tl.arange(0, TILE)[:, None, None]
    inside = block < blocks - first
    chunk = tl.arange(0, 4)[None, :, None]
    byte = tl.arange(0, 32)[None, None, :]
    both = head_word(raw, block * 144, inside)
    word1 = head_word(raw, block * 144 + 4, inside)
    word2 = head_word(raw, block * 144 + 8, inside)
    word3 = head_word(raw, block * 144 + 12, inside)
    # No more bytes a thread than the weights that it stores at once, or they change hands.
    at = tl.max_contiguous(block * 144 + 16 + chunk * 32 + byte, [1, 1, 8])
    pairs = tl.load(raw + at, mask=inside, other=0)
    place = out + first * 256 + block * 256 + chunk * 64 + byte
    for half in tl.static_range(2):
        scale, minimum = scale_and_minimum(both, word1, word2, word3, 2 * chunk + half)
        codes = (pairs >> (4 * half)) & 15
        weight = codes.to(tl.float32) * scale - minimum
        tl.store(place + 32 * half, weight.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "blocks"])
def unpack_q5_k(
    raw: tl.tensor, out: tl.tensor, start: int, blocks: int, TILE: tl.constexpr
) -> None:
    """16 bytes of scales, 32 bytes whose bit i is the fifth of group i, 128 bytes as in Q4_K."""
    first = tl.program_id(0).to(tl.int64) * TILE
    raw += (start + first) * 176
    block = tl.arange(0, TILE)[:, None, None]
    inside = block < blocks - first
    chunk = tl.arange(0, 4)[None, :, None]
    byte = tl.arange(0, 32)[None, None, :]
    both = head_word(raw, block * 176, inside)
    word1 = head_word(raw, block * 176 + 4, inside)
    word2 = head_word(raw, block * 176 + 8, inside)
    word3 = head_word(raw, block * 176 + 12, inside)
    at = tl.max_contiguous(block * 176 + 48 + chunk * 32 + byte, [1, 1, 8])
    pairs = tl.load(raw + at, mask=inside, other=0).to(tl.int32)
    at = tl.max_contiguous(block * 176 + 16 + chunk * 0 + byte, [1, 1, 8])
    fifth = tl.load(raw + at, mask=inside, other=0).to(tl.int32) >> (2 * chunk)
    place = out + first * 256 + block * 256 + chunk * 64 + byte
    for half in tl.static_range(2):
        scale, minimum = scale_and_minimum(both, word1, word2, word3, 2 * chunk + half)
        codes = ((pairs >> (4 * half)) & 15) | (((fifth >> half) & 1) << 4)
        weight = codes.to(tl.float32) * scale - minimum
        tl.store(place + 32 * half, weight.to(out.dtype.element_ty), mask=inside)


@triton.jit
def q6_k_weights(
    raw: tl.tensor, block: tl.tensor, chunk: tl.tensor, byte: tl.tensor, inside: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Of bytes 0 to 15 of chunks 0 to 7 of blocks: weights 128 * (chunk // 4) + 16 * (chunk % 4) +
    byte, and those 64 after them, as float32.

    128 bytes of nibbles, 64 of upper bit pairs, 16 signed scales, their float16 scale. Two halves
    of 128 weights, of which each has two chunks of 32 bytes: the low nibbles of both, then the high
    ones. A byte of the upper bits serves four weights; 32 stands for zero.
    """
    half, part = chunk // 4, chunk % 4
    pairs = tl.load(raw + block * 210 + chunk * 16 + byte, mask=inside, other=0)
    upper = raw + block * 210 + 128 + half * 32 + (part % 2) * 16 + byte
    upper = tl.load(upper, mask=inside, other=0) >> (part // 2 * 2).to(tl.uint8)
    scales = raw.to(tl.pointer_type(tl.int8)) + block * 210 + 192 + half * 8 + part
    super_scale = block_scale(raw, block * 210 + 208, inside)
    scale = tl.load(scales, mask=inside, other=0).to(tl.float32) * super_scale
    codes = (pairs & 15) | ((upper & 3) << 4)
    low = (codes.to(tl.int32) - 32).to(tl.float32) * scale
    scale = tl.load(scales + 4, mask=inside, other=0).to(tl.float32) * super_scale
    codes = (pairs >> 4) | (((upper >> 4) & 3) << 4)
    high = (codes.to(tl.int32) - 32).to(tl.float32) * scale
    return low, high


@triton.jit(do_not_specialize=["start", "blocks"])
def unpack_q6_k(
    raw: tl.tensor, out: tl.tensor, start: int, blocks: int, TILE: tl.constexpr
) -> None:
    """See ``q6_k_weights``."""
    first = tl.program_id(0).to(tl.int64) * TILE
    raw += (start + first) * 210
    block = tl.arange(0, TILE)[:, None, None]
    inside = block < blocks - first
    chunk = tl.arange(0, 8)[None, :, None]  # 16 bytes each
    byte = tl.arange(0, 16)[None, None, :]
    low, high = q6_k_weights(raw, block, chunk, byte, inside)
    place = out + first * 256 + block * 256 + chunk // 4 * 128 + chunk % 4 * 16 + byte
    tl.store(place, low.to(out.dtype.element_ty), mask=inside)
    tl.store(place + 64, high.to(out.dtype.element_ty), mask=inside)
