"""Keys and values in eight bits, for the part of a cache that travels over the link."""

from __future__ import annotations

import torch

LARGEST = 127
SCALE_NBYTES = 2
DROPPED = 13
"""Of float32's digits, the last ones: a scale has ten behind the point."""
ROUNDED = {torch.float16: 16}
"""More are zeros, of these numbers' scales."""
BIAS = (127 - 40) << (23 - DROPPED)
"""Scales have six bits of float32's exponent: from 2 ** -40 to 2 ** 24."""
NOT_FINITE = 0xFFFF
"""The code of a scale of numbers of which one is not."""


class Int8Rows:
    """Symmetric int8 with one scale for each token and head: 8.125 bits at 128 wide heads.

    A token is one row of bytes: its 2 * G * E values, then its 2 * G scales.
    """

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        self._heads, self._width = 2 * num_kv_heads, head_dim
        self.token_nbytes = self._heads * (head_dim + SCALE_NBYTES)

    def encode(self, kv_T2GE: torch.Tensor, out_TB: torch.Tensor) -> None:
        """Write T tokens as bytes."""
        values = kv_T2GE.reshape(-1, self._heads, self._width)
        codes = _scale_codes(values)
        numbers = _numbers(values, codes).nan_to_num_(0.0).to(torch.int8)
        split = self._heads * self._width
        out_TB[:, :split] = numbers.flatten(1).view(torch.uint8)
        out_TB[:, split:] = codes.to(torch.int16).view(torch.uint8).view(len(codes), -1)

    def decode(self, raw_TB: torch.Tensor, out_T2GE: torch.Tensor) -> None:
        """Read T tokens."""
        split = self._heads * self._width
        numbers = raw_TB[:, :split].contiguous().view(torch.int8)
        codes = raw_TB[:, split:].contiguous().view(torch.int16).int() & NOT_FINITE
        values = numbers.view(-1, self._heads, self._width).float()
        out_T2GE.copy_(_values(values, codes[..., None], out_T2GE.dtype).view(out_T2GE.shape))


def round_to_int8(heads: torch.Tensor) -> torch.Tensor:
    """Heads (..., E), each as it comes back once it is encoded and decoded, in new memory.

    Doing so again changes no bit. The largest number of a head is then 127 times its scale, rounded
    to the dtype; and its scale is found again, since numbers and scales differ in how finely they
    are rounded: float32 has far more digits than a scale, bfloat16 fewer; float16 would have as
    many, which is why its scales get fewer.
    """
    codes = _scale_codes(heads)
    return _values(_numbers(heads, codes), codes, heads.dtype)


def _scale_codes(heads: torch.Tensor) -> torch.Tensor:
    """(..., 1) of int32 from 0 to NOT_FINITE."""
    largest = heads.abs().amax(-1, keepdim=True).float()
    bits = (largest / LARGEST).view(torch.int32)
    dropped = ROUNDED.get(heads.dtype, DROPPED)
    bits = ((bits + (1 << (dropped - 1))) >> dropped) << (dropped - DROPPED)
    codes = (bits - BIAS).clamp_(0, NOT_FINITE - 1)
    return codes.masked_fill_(~largest.isfinite(), NOT_FINITE)


def _scales(codes: torch.Tensor) -> torch.Tensor:
    scales = ((codes + BIAS) << DROPPED).view(torch.float32)
    return scales.masked_fill_(codes == NOT_FINITE, torch.nan)


def _numbers(heads: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (heads.float() / _scales(codes)).round_().clamp_(-LARGEST, LARGEST)


def _values(numbers: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(dtype).max  # rounded up, a scale may reach beyond float16
    return (numbers * _scales(codes)).clamp_(-most, most).to(dtype)
