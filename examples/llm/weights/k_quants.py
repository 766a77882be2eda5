"""GGUF blocks of 256 weights: scales of scales. How ``unpack`` functions work is in ``quants``."""

from __future__ import annotations

from functools import cache

import torch

from .scratch import Scratch

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the nibbles of the IQ4 types stand for."""


def unpack_q2_k(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """16 bytes (low nibble a scale, high one a minimum), 64 bytes of bit pairs, and the float16
    scales of both.

    Two halves of 128 weights: the lowest pairs of 32 bytes, then the next ones.
    """
    blocks = raw.numel() // 84
    rows, halves = raw.view(blocks, 84), raw.view(torch.float16).view(blocks, 42)
    scales, minima = scratch.take(torch.float32, 2, blocks, 16)
    scales.copy_(rows[:, :16] & 15).mul_(halves[:, 40:41].float())
    minima.copy_(rows[:, :16] >> 4).mul_(halves[:, 41:].float())
    _put_pairs(rows[:, 16:80], out.view(blocks, 2, 4, 32), scratch)
    out.view(blocks, 16, 16).mul_(scales[:, :, None]).sub_(minima[:, :, None])


def unpack_q3_k(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """32 bytes of third bits, 64 bytes of bit pairs as in Q2_K, 12 bytes with 16 scales of six
    bits, their float16 scale; 4 stands for zero, and 32 for a scale of zero.

    Bit i of the 32 bytes is of weights 32 i to 32 i + 31.
    """
    blocks = raw.numel() // 110
    rows, halves = raw.view(blocks, 110), raw.view(torch.float16).view(blocks, 55)
    scales = scratch.take(torch.float32, blocks, 16)
    scales[:, :8] = rows[:, 96:104] & 15
    scales[:, 8:] = rows[:, 96:104] >> 4
    for pair in range(4):
        upper = (rows[:, 104:108] >> (2 * pair)) & 3
        scales[:, 4 * pair : 4 * pair + 4].add_(upper, alpha=16)
    scales.sub_(32).mul_(halves[:, 54:].float())
    _put_pairs(rows[:, 32:96], out.view(blocks, 2, 4, 32), scratch)
    _add_bits(rows[:, :32], out.view(blocks, 8, 32), scratch, worth=4)
    out.view(blocks, 16, 16).sub_(4).mul_(scales[:, :, None])


def unpack_q4_k(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale of scales, float16 scale of minima, 12 bytes of both, 128 bytes of nibbles.

    Eight groups of 32 weights: of each 32 bytes, the low nibbles, then the high ones.
    """
    blocks = raw.numel() // 144
    scales, minima = _six_bit_scales(raw, 144, scratch)
    _put_groups(raw, 144, out, scratch)
    out.view(blocks, 8, 32).mul_(scales[:, :, None]).sub_(minima[:, :, None])


def unpack_q5_k(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles; bit i is of group i."""
    blocks = raw.numel() // 176
    scales, minima = _six_bit_scales(raw, 176, scratch)
    _put_groups(raw, 176, out, scratch)
    _add_bits(raw.view(blocks, 176)[:, 16:48], out.view(blocks, 8, 32), scratch, worth=16)
    out.view(blocks, 8, 32).mul_(scales[:, :, None]).sub_(minima[:, :, None])


def unpack_q6_k(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """128 bytes of nibbles, 64 bytes of upper bit pairs, 16 signed scales, their float16 scale.

    Two halves of 128 weights: the low nibbles of 64 bytes, then the high ones; the bit pairs of
    32 bytes serve four rows of 32. 32 stands for zero.
    """
    blocks = raw.numel() // 210
    rows = raw.view(blocks, 210)
    scales = scratch.take(torch.float32, blocks, 16)
    scales.copy_(raw.view(torch.int8).view(blocks, 210)[:, 192:208])
    scales.mul_(raw.view(torch.float16).view(blocks, 105)[:, 104:].float())
    low, high = scratch.nibbles(raw)
    nibbles = out.view(blocks, 2, 2, 64)
    nibbles[:, :, 0] = low.view(blocks, 210)[:, :128].unflatten(1, (2, 64))
    nibbles[:, :, 1] = high.view(blocks, 210)[:, :128].unflatten(1, (2, 64))
    upper = scratch.take(torch.uint8, blocks, 64)
    for pair in range(4):
        torch.bitwise_right_shift(rows[:, 128:192], 2 * pair, out=upper)
        upper.bitwise_and_(3)
        out.view(blocks, 2, 4, 32)[:, :, pair].add_(upper.view(blocks, 2, 32), alpha=16)
    out.view(blocks, 16, 16).sub_(32).mul_(scales[:, :, None])


def unpack_iq4_xs(raw: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """float16 scale, 16 upper bits and 4 bytes of lower bits of 8 scales, 128 bytes of nibbles.

    Of each 16 bytes, the low nibbles, then the high ones; they number LEVELS.
    """
    blocks = raw.numel() // 136
    rows, halves = raw.view(blocks, 136), raw.view(torch.float16).view(blocks, 68)
    scales = scratch.take(torch.float32, blocks, 8)
    scales[:, 0::2] = rows[:, 4:8] & 15
    scales[:, 1::2] = rows[:, 4:8] >> 4
    for i in range(8):
        upper = (rows[:, 2 + i // 4] >> (2 * (i % 4))) & 3
        scales[:, i].add_(upper, alpha=16)
    scales.sub_(32).mul_(halves[:, :1].float())
    nibbles = rows[:, 8:].unflatten(1, (8, 16))
    put_levels(nibbles, out.view(blocks, 8, 2, 16), scratch)
    out.view(blocks, 8, 32).mul_(scales[:, :, None])


def put_levels(
    nibbles: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
    levels: tuple[int, ...] = LEVELS,
) -> None:
    """Write the levels of low and high nibbles: of bytes (..., 16) into floats (..., 2, 16)."""
    table = _on_device(levels, nibbles.device)
    numbers = scratch.take(torch.int32, *nibbles.shape)
    found = scratch.take(torch.int8, nibbles.numel())
    for half in range(2):
        numbers.copy_(nibbles)
        numbers.bitwise_right_shift_(4) if half else numbers.bitwise_and_(15)
        torch.index_select(table, 0, numbers.view(-1), out=found)
        out[..., half, :] = found.view(nibbles.shape)


@cache
def _on_device(levels: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Levels on a device, where they are put once: a copy would wait for the device's work."""
    with torch.inference_mode(False):
        return torch.tensor(levels, dtype=torch.int8, device=device)


def _six_bit_scales(
    raw: torch.Tensor, nbytes: int, scratch: Scratch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of Q4_K and Q5_K, (blocks, 8) each."""
    blocks = raw.numel() // nbytes
    rows, halves = raw.view(blocks, nbytes), raw.view(torch.float16).view(blocks, nbytes // 2)
    scales, minima = scratch.take(torch.float32, 2, blocks, 8)
    first, second, rest = rows[:, 4:8], rows[:, 8:12], rows[:, 12:16]
    scales[:, :4] = first & 63
    scales[:, 4:] = (rest & 15) | ((first >> 2) & 48)
    minima[:, :4] = second & 63
    minima[:, 4:] = (rest >> 4) | ((second >> 2) & 48)
    scales.mul_(halves[:, :1].float())
    minima.mul_(halves[:, 1:2].float())
    return scales, minima


def _put_groups(raw: torch.Tensor, nbytes: int, out: torch.Tensor, scratch: Scratch) -> None:
    """Write the nibbles of the last 128 bytes of each block."""
    low, high = scratch.nibbles(raw)
    pairs = out.view(-1, 4, 2, 32)
    pairs[:, :, 0] = low.view(-1, nbytes)[:, -128:].unflatten(1, (4, 32))
    pairs[:, :, 1] = high.view(-1, nbytes)[:, -128:].unflatten(1, (4, 32))


def _put_pairs(pairs: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """Write the four bit pairs of 64 bytes a block: (blocks, 64) into (blocks, 2, 4, 32)."""
    found = scratch.take(torch.uint8, *pairs.shape)
    for pair in range(4):
        torch.bitwise_right_shift(pairs, 2 * pair, out=found)
        out[:, :, pair] = found.bitwise_and_(3).view(-1, 2, 32)


def _add_bits(bits: torch.Tensor, out: torch.Tensor, scratch: Scratch, *, worth: int) -> None:
    """Add ``worth`` where bit i of byte j is set: (blocks, 32) to weight (blocks, i, j)."""
    found = scratch.take(torch.uint8, *bits.shape)
    for bit in range(8):
        torch.bitwise_right_shift(bits, bit, out=found)
        out[:, bit].add_(found.bitwise_and_(1), alpha=worth)
