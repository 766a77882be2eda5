"""Codes of a matrix in words of 32 bits, as compressed-tensors packs them, and what they stand for.

Shapes, here and beside it:
  N rows (outputs)     K width (inputs)     G groups of a row, of K / G weights each
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def code_range(bits: int) -> tuple[int, int]:
    """The least and the largest code: of 4 bits -8 and 7."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def pack_codes(codes_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of int32 (N, K * bits / 32, rounded up), the first code in the lowest bits.

    ``codes_NK``: int8 within :func:`code_range`, of 4 or 8 bits. Each is stored as what it is above
    the least; what fills the last word is 0.
    """
    low, _ = code_range(bits)
    stored = (codes_NK.to(torch.int16) - low).to(torch.uint8)
    stored = F.pad(stored, (0, -stored.shape[1] % (32 // bits)))
    if bits == 4:
        stored = stored[:, 0::2] | (stored[:, 1::2] << 4)
    return stored.contiguous().view(torch.int32)


def unpack_codes(words_NW: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """The codes (N, width) that :func:`pack_codes` packed, int8."""
    low, _ = code_range(bits)
    stored = words_NW.contiguous().view(torch.uint8)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), -1).flatten(1)
    return (stored[:, :width].to(torch.int16) + low).to(torch.int8)


def decode(codes_NK: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
    """The weights that codes stand for: code times the scale of its group, in float32 (N, K)."""
    groups: torch.Tensor = codes_NK.unflatten(1, (scales_NG.shape[1], -1)).float()
    return (groups * scales_NG.float()[:, :, None]).flatten(1)
