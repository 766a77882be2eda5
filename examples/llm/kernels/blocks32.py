"""Triton kernels that unpack GGML's blocks of 32 weights, and the weights of such blocks.

A program unpacks TILE of the ``blocks`` blocks from number ``start`` on, which ``out`` begins with;
``raw`` begins with block 0, so that its alignment does not depend on ``start``. Blocks of 18, 22
and 34 bytes are aligned to no more than two; each thread loads the bytes of the eight weights that
it then stores at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_scale(raw: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The float16 numbers at these even byte offsets, as float32."""
    return tl.load(raw.to(tl.pointer_type(tl.float16)) + at // 2, mask=mask, other=0).to(tl.float32)


@triton.jit
def q4_0_weights(
    raw: tl.tensor, block: tl.tensor, byte: tl.tensor, inside: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Of these bytes, 0 to 15, of blocks: the weights with these numbers, and those 16 after them,
    as float32. float16 scale, 16 bytes: low nibbles, then high nibbles; 8 stands for zero."""
    scale = block_scale(raw, block * 18, inside)
    pairs = tl.load(raw + block * 18 + 2 + byte, mask=inside, other=0)
    low = ((pairs & 15).to(tl.float32) - 8) * scale
    high = ((pairs >> 4).to(tl.float32) - 8) * scale
    return low, high


@triton.jit
def q8_0_weights(raw: tl.tensor, block: tl.tensor, byte: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Of these bytes, 0 to 31, of blocks, as float32. float16 scale, 32 signed bytes."""
    scale = block_scale(raw, block * 34, inside)
    codes = raw.to(tl.pointer_type(tl.int8)) + block * 34 + 2 + byte
    return tl.load(codes, mask=inside, other=0).to(tl.float32) * scale


@triton.jit(do_not_specialize=["start", "blocks"])
def unpack_q4_0(
    raw: tl.tensor, out: tl.tensor, start: int, blocks: int, TILE: tl.constexpr
) -> None:
    """See ``q4_0_weights``."""
    first = tl.program_id(0).to(tl.int64) * TILE
    raw += (start + first) * 18
    block = tl.arange(0, TILE)[:, None]
    inside = block < blocks - first
    byte = tl.arange(0, 16)[None, :]
    low, high = q4_0_weights(raw, block, byte, inside)
    place = out + first * 32 + block * 32 + byte
    tl.store(place, low.to(out.dtype.element_ty), mask=inside)
    tl.store(place + 16, high.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "blocks"])
def unpack_q4_1(
    raw: tl.tensor, out: tl.tensor, start: int, blocks: int, TILE: tl.constexpr
) -> None:
    """float16 scale, float16 minimum, 16 bytes as in Q4_0."""
    first = tl.program_id(0).to(tl.int64) * TILE
    raw += (start + first) * 20
    block = tl.arange(0, TILE)[:, None]
    inside = block < blocks - first
    byte = tl.arange(0, 16)[None, :]
    scale = block_scale(raw, block * 20, inside)
    minimum = block_scale(raw, block * 20 + 2, inside)
    pairs = tl.load(raw + block * 20 + 4 + byte, mask=inside, other=0)
    low = (pairs & 15).to(tl.float32) * scale + minimum
    high = (pairs >> 4).to(tl.float32) * scale + minimum
    place = out + first * 32 + block * 32 + byte
    tl.store(place, low.to(out.dtype.element_ty), mask=inside)
    tl.store(place + 16, high.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "blocks"])
def unpack_q5_0(
    raw: tl.tensor, out: tl.tensor, start: int, blocks: int, TILE: tl.constexpr
) -> None:
    """float16 scale, 32 fifth bits, 16 bytes as in Q4_0; 16 stands for zero."""
    first = tl.program_id(0).to(tl.int64) * TILE
    raw += (start + first) * 22
    block = tl.arange(0, TILE)[:, None]
    inside = block < blocks - first
    byte = tl.arange(0, 16)[None, :]
    scale = block_scale(raw, block * 22, inside)
    words = raw.to(tl.pointer_type(tl.uint16)) + block * 11
    fifth = tl.load(words + 1, mask=inside, other=0).to(tl.int32) >> byte
    upper = tl.load(words + 2, mask=inside, other=0).to(tl.int32) >> byte
    pairs = tl.load(raw + block * 22 + 6 + byte, mask=inside, other=0).to(tl.int32)
    low = ((pairs & 15) | ((fifth & 1) << 4)) - 16
    high = ((pairs >> 4) | ((upper & 1) << 4)) - 16
    place = out + first * 32 + block * 32 + byte
    tl.store(place, (low.to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside)
    tl.store(place + 16, (high.to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "blocks"])
def unpack_q8_0(
    raw: tl.tensor, out: tl.tensor, start: int, blocks: int, TILE: tl.constexpr
) -> None:
    """See ``q8_0_weights``."""
    first = tl.program_id(0).to(tl.int64) * TILE
    raw += (start + first) * 34
    block = tl.arange(0, TILE)[:, None]
    inside = block < blocks - first
    byte = tl.arange(0, 32)[None, :]
    weight = q8_0_weights(raw, block, byte, inside)
    place = out + first * 32 + block * 32 + byte
    tl.store(place, weight.to(out.dtype.element_ty), mask=inside)
