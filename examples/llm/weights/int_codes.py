"""Whole numbers that lie side by side in 32-bit words, of compressed-tensors, AWQ and GPTQ.

Functions named ``put_*`` write codes as floats into ``out`` (rows, width), through reused scratch;
those that give back zero points or scales make tensors of a group's size, which are small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .scratch import Scratch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 rows lies in which 4 bits of an AWQ word, from the lowest on."""


def put_row_codes(words: torch.Tensor, bits: int, out: torch.Tensor, scratch: Scratch) -> None:
    """Codes along the width: (rows, words)."""
    raw, width = words.view(torch.uint8), out.shape[1]
    if bits == 8:
        out.copy_(raw[:, :width])
        return
    low, high = scratch.nibbles(raw[:, : (width + 1) // 2])
    out[:, 0::2] = low
    out[:, 1::2] = high[:, : width // 2]


def put_awq_codes(words: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """Codes along the rows, in AWQ_ORDER: (width, rows / 8)."""
    codes = scratch.take(torch.int32, *words.shape)
    rows = out.view(words.shape[1], 8, -1)
    for place, row in enumerate(AWQ_ORDER):
        torch.bitwise_right_shift(words, 4 * place, out=codes)
        rows[:, row] = codes.bitwise_and_(15).t()


def put_gptq_codes(words: torch.Tensor, bits: int, out: torch.Tensor, scratch: Scratch) -> None:
    """Codes along the width, transposed: (width / pack, rows)."""
    codes, pack = scratch.take(torch.int32, *words.shape), 32 // bits
    columns = out.view(words.shape[1], -1, pack)
    for place in range(pack):
        torch.bitwise_right_shift(words, bits * place, out=codes)
        columns[:, :, place] = codes.bitwise_and_((1 << bits) - 1).t()


def zeros_along_rows(words: torch.Tensor, bits: int, numbers: torch.Tensor) -> torch.Tensor:
    """Zero points of the rows with these numbers, of words (all rows / pack, groups)."""
    pack = 32 // bits
    shifts = (numbers % pack * bits).to(torch.int32)[:, None]
    return (words[numbers // pack] >> shifts) & ((1 << bits) - 1)


def zeros_of_columns(
    words: torch.Tensor, bits: int, rows: tuple[int, int], order: Sequence[int]
) -> torch.Tensor:
    """Zero points (rows, groups) of words (groups, all rows / pack), codes in this order."""
    start, end = rows
    pack = len(order)
    first = start // pack
    words = words[:, first : -(-end // pack)]
    codes = words.new_empty(words.shape[1], pack, words.shape[0])
    for place, row in enumerate(order):
        codes[:, row] = ((words >> (bits * place)) & ((1 << bits) - 1)).t()
    return codes.flatten(0, 1)[start - first * pack : end - first * pack]


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words (rows / pack, rounded up; groups) of zero points (rows, groups): the other way."""
    pack = 32 // bits
    padded = codes.new_zeros(-(-codes.shape[0] // pack) * pack, codes.shape[1])
    padded[: codes.shape[0]] = codes
    words = codes.new_zeros(padded.shape[0] // pack, codes.shape[1])
    for place in range(pack):
        words |= padded[place::pack] << (bits * place)
    return words
