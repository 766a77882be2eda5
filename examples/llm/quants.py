"""The bytes of packed GGUF blocks, and their unpacking with torch operations on any device.

An ``unpack`` function gets the raw bytes of whole blocks (uint8, contiguous), writes their weights
as float32 in order, and uses scratch that is made once: temporaries as large as the weights would
cost more time than the arithmetic. Its results equal the gguf package's bit for bit, so the order
of its float operations is part of the format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


class Scratch:
    """Bytes and floats for unpacking up to ``limit`` weights at a time, on one device."""

    def __init__(self, limit: int, device: torch.device) -> None:
        self.bytes = torch.empty(2 * limit, dtype=torch.uint8, device=device)
        self.floats = torch.empty(limit // 16, device=device)

    @property
    def nbytes(self) -> int:
        return self.bytes.nbytes + self.floats.nbytes

    def nibbles(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high four bits of every byte, scales included: contiguous is faster."""
        low, high = self.bytes[: 2 * raw.numel()].view(2, -1)
        torch.bitwise_and(raw, 15, out=low)
        torch.bitwise_right_shift(raw, 4, out=high)
        return low, high


Unpack = Callable[[torch.Tensor, torch.Tensor, Scratch], None]


def unpack_q4_1(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, float16 minimum, 16 bytes: low nibbles 0..15, high nibbles 16..31."""
    blocks = raw.numel() // 20
    scales = scratch.floats[: 2 * blocks].view(2, blocks)
    scales.copy_(raw.view(torch.float16).view(blocks, 10)[:, :2].t())
    low, high = scratch.nibbles(raw)
    halves = out.view(blocks, 2, 16)
    halves[:, 0] = low.view(blocks, 20)[:, 4:]
    halves[:, 1] = high.view(blocks, 20)[:, 4:]
    out.view(blocks, 32).mul_(scales[0, :, None]).add_(scales[1, :, None])


def unpack_q5_0(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, 32 fifth bits, 16 bytes of nibbles as in Q4_1; 16 stands for zero."""
    blocks = raw.numel() // 22
    scales = scratch.floats[:blocks]
    scales.copy_(raw.view(torch.float16).view(blocks, 11)[:, 0])
    low, high = scratch.nibbles(raw)
    halves = out.view(blocks, 2, 16)
    halves[:, 0] = low.view(blocks, 22)[:, 6:]
    halves[:, 1] = high.view(blocks, 22)[:, 6:]
    fifth = scratch.bytes[: blocks * 4].view(blocks, 4)
    for bit in range(8):
        torch.bitwise_right_shift(raw.view(blocks, 22)[:, 2:6], bit, out=fifth)
        out.view(blocks, 4, 8)[:, :, bit].add_(fifth.bitwise_and_(1), alpha=16)
    out.view(blocks, 32).sub_(16).mul_(scales[:, None])


def unpack_q8_0(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, 32 signed bytes."""
    blocks = raw.numel() // 34
    scales = scratch.floats[:blocks]
    scales.copy_(raw.view(torch.float16).view(blocks, 17)[:, 0])
    weights = out.view(blocks, 32)
    weights.copy_(raw.view(torch.int8).view(blocks, 34)[:, 2:])
    weights.mul_(scales[:, None])


def unpack_q4_k(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale of scales, float16 scale of minima, 12 bytes of both, 128 bytes of nibbles.

    Eight groups of 32 weights: of each 32 bytes, the low nibbles, then the high ones.
    """
    blocks = raw.numel() // 144
    rows = raw.view(blocks, 144)
    scales, minima = scratch.floats[: blocks * 16].view(2, blocks, 8)
    first, second, rest = rows[:, 4:8], rows[:, 8:12], rows[:, 12:16]
    scales[:, :4] = first & 63
    scales[:, 4:] = (rest & 15) | ((first >> 2) & 48)
    minima[:, :4] = second & 63
    minima[:, 4:] = (rest >> 4) | ((second >> 2) & 48)
    halves = raw.view(torch.float16).view(blocks, 72)
    scales.mul_(halves[:, :1].float())
    minima.mul_(halves[:, 1:2].float())
    low, high = scratch.nibbles(raw)
    pairs = out.view(blocks, 4, 2, 32)
    pairs[:, :, 0] = low.view(blocks, 144)[:, 16:].unflatten(1, (4, 32))
    pairs[:, :, 1] = high.view(blocks, 144)[:, 16:].unflatten(1, (4, 32))
    out.view(blocks, 8, 32).mul_(scales[:, :, None]).sub_(minima[:, :, None])


def unpack_q6_k(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """128 bytes of nibbles, 64 bytes of upper bit pairs, 16 signed scales, their float16 scale.

    Two halves of 128 weights: the low nibbles of 64 bytes, then the high ones; the bit pairs of
    32 bytes serve four rows of 32. 32 stands for zero.
    """
    blocks = raw.numel() // 210
    rows = raw.view(blocks, 210)
    scales = scratch.floats[: blocks * 16].view(blocks, 16)
    scales.copy_(raw.view(torch.int8).view(blocks, 210)[:, 192:208])
    scales.mul_(raw.view(torch.float16).view(blocks, 105)[:, 104:].float())
    low, high = scratch.nibbles(raw)
    nibbles = out.view(blocks, 2, 2, 64)
    nibbles[:, :, 0] = low.view(blocks, 210)[:, :128].unflatten(1, (2, 64))
    nibbles[:, :, 1] = high.view(blocks, 210)[:, :128].unflatten(1, (2, 64))
    upper = scratch.bytes[: blocks * 64].view(blocks, 64)
    for pair in range(4):
        torch.bitwise_right_shift(rows[:, 128:192], 2 * pair, out=upper)
        upper.bitwise_and_(3)
        out.view(blocks, 2, 4, 32)[:, :, pair].add_(upper.view(blocks, 2, 32), alpha=16)
    out.view(blocks, 16, 16).sub_(32).mul_(scales[:, :, None])


@dataclass(frozen=True, slots=True)
class BlockType:
    """One packed GGML type."""

    weights: int
    """Weights in one block."""
    nbytes: int
    """Bytes of one block."""
    unpack: Unpack


BLOCK_TYPES = {
    "Q4_1": BlockType(32, 20, unpack_q4_1),
    "Q5_0": BlockType(32, 22, unpack_q5_0),
    "Q8_0": BlockType(32, 34, unpack_q8_0),
    "Q4_K": BlockType(256, 144, unpack_q4_k),
    "Q6_K": BlockType(256, 210, unpack_q6_k),
}
"""The packed types that can be unpacked, by their GGML names."""
