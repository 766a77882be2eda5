"""The bytes of packed GGUF blocks, and their unpacking with torch operations on any device.

An ``unpack`` function gets the raw bytes of whole blocks (uint8, contiguous) and writes their
weights as float32 in order. Its results equal the gguf package's bit for bit, so the order of its
float operations is part of the format. Blocks of 256 weights are in ``k_quants``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import k_quants
from .scratch import Scratch

FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""What the sixteen codes of four bits stand for, doubled. Minus zero is zero."""

Unpack = Callable[[torch.Tensor, torch.Tensor, Scratch], None]


def unpack_q4_0(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, 16 bytes: low nibbles 0..15, high nibbles 16..31; 8 stands for zero."""
    blocks = raw.numel() // 18
    scales = _halves(raw, 18, scratch, 0)
    _put_nibbles(raw, out, scratch, (18, 2))
    out.view(blocks, 32).sub_(8).mul_(scales[0, :, None])


def unpack_q4_1(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, float16 minimum, 16 bytes of nibbles as in Q4_0."""
    blocks = raw.numel() // 20
    scales, minima = _halves(raw, 20, scratch, 0, 1)
    _put_nibbles(raw, out, scratch, (20, 4))
    out.view(blocks, 32).mul_(scales[:, None]).add_(minima[:, None])


def unpack_q5_0(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, 32 fifth bits, 16 bytes of nibbles; 16 stands for zero."""
    blocks = raw.numel() // 22
    scales = _halves(raw, 22, scratch, 0)
    _put_nibbles(raw, out, scratch, (22, 6))
    _add_fifth_bits(raw.view(blocks, 22)[:, 2:6], out, scratch)
    out.view(blocks, 32).sub_(16).mul_(scales[0, :, None])


def unpack_q5_1(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, float16 minimum, 32 fifth bits, 16 bytes of nibbles."""
    blocks = raw.numel() // 24
    scales, minima = _halves(raw, 24, scratch, 0, 1)
    _put_nibbles(raw, out, scratch, (24, 8))
    _add_fifth_bits(raw.view(blocks, 24)[:, 4:8], out, scratch)
    out.view(blocks, 32).mul_(scales[:, None]).add_(minima[:, None])


def unpack_q8_0(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, 32 signed bytes."""
    blocks = raw.numel() // 34
    scales = _halves(raw, 34, scratch, 0)
    weights = out.view(blocks, 32)
    weights.copy_(raw.view(torch.int8).view(blocks, 34)[:, 2:])
    weights.mul_(scales[0, :, None])


def unpack_iq4_nl(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, 16 bytes of nibbles as in Q4_0, which number sixteen uneven levels."""
    blocks = raw.numel() // 18
    scales = _halves(raw, 18, scratch, 0)
    k_quants.put_levels(raw.view(blocks, 18)[:, 2:], out.view(blocks, 2, 16), scratch)
    out.view(blocks, 32).mul_(scales[0, :, None])


def unpack_mxfp4(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """A power of two in a byte, 16 bytes of nibbles as in Q4_0, which number the FP4_LEVELS."""
    blocks = raw.view(-1, 17)
    k_quants.put_levels(blocks[:, 1:], out.view(-1, 2, 16), scratch, FP4_LEVELS)
    out.view(-1, 32).mul_(powers_of_two(blocks[:, :1]).mul_(0.5))


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** (exponent - 127) of bytes, as float32; nan of 255."""
    return exponents.view(torch.float8_e8m0fnu).float()


def _halves(raw: torch.Tensor, nbytes: int, scratch: Scratch, *places: int) -> torch.Tensor:
    """The float16 numbers at the first places of each block, as float32: (places, blocks)."""
    blocks = raw.numel() // nbytes
    scales = scratch.take(torch.float32, len(places), blocks)
    stored = raw.view(torch.float16).view(blocks, nbytes // 2)
    scales.copy_(stored[:, places[0] : places[-1] + 1].t())
    return scales


def _put_nibbles(
    raw: torch.Tensor, out: torch.Tensor, scratch: Scratch, place: tuple[int, int]
) -> None:
    """Write the nibbles of 16 bytes a block; ``place`` is the block's bytes, and where they are."""
    nbytes, first = place
    low, high = scratch.nibbles(raw)
    halves = out.view(-1, 2, 16)
    halves[:, 0] = low.view(-1, nbytes)[:, first:]
    halves[:, 1] = high.view(-1, nbytes)[:, first:]


def _add_fifth_bits(bits: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """Add 16 where the bit of a weight is set: (blocks, 4) bytes, weight 0 in the lowest bit."""
    fifth = scratch.take(torch.uint8, *bits.shape)
    weights = out.view(-1, 4, 8)
    for bit in range(8):
        torch.bitwise_right_shift(bits, bit, out=fifth)
        weights[:, :, bit].add_(fifth.bitwise_and_(1), alpha=16)


@dataclass(frozen=True, slots=True)
class BlockType:
    """One packed GGML type."""

    weights: int
    """Weights in one block."""
    nbytes: int
    """Bytes of one block."""
    unpack: Unpack
    scales: tuple[int, ...]
    """Where a block's float16 numbers are, in bytes; a power of two in blocks of odd size."""


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, unpack_q4_0, (0,)),
    "Q4_1": BlockType(32, 20, unpack_q4_1, (0, 2)),
    "Q5_0": BlockType(32, 22, unpack_q5_0, (0,)),
    "Q5_1": BlockType(32, 24, unpack_q5_1, (0, 2)),
    "Q8_0": BlockType(32, 34, unpack_q8_0, (0,)),
    "Q2_K": BlockType(256, 84, k_quants.unpack_q2_k, (80, 82)),
    "Q3_K": BlockType(256, 110, k_quants.unpack_q3_k, (108,)),
    "Q4_K": BlockType(256, 144, k_quants.unpack_q4_k, (0, 2)),
    "Q5_K": BlockType(256, 176, k_quants.unpack_q5_k, (0, 2)),
    "Q6_K": BlockType(256, 210, k_quants.unpack_q6_k, (208,)),
    "IQ4_NL": BlockType(32, 18, unpack_iq4_nl, (0,)),
    "MXFP4": BlockType(32, 17, unpack_mxfp4, (0,)),
    "IQ4_XS": BlockType(256, 136, k_quants.unpack_iq4_xs, (0,)),
}
"""The packed types that can be unpacked, by their GGML names."""

SCRATCH_NBYTES = 3
"""Bytes of scratch for each weight, enough for every type."""
