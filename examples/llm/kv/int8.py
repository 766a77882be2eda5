"""Keys and values in eight bits, for the part of a cache that travels over the link."""

from __future__ import annotations

import torch

SCALE = torch.float16


class Int8Rows:
    """Symmetric int8 with one float16 scale for each token and head: 8.125 bits at 128 wide heads.

    A token is one row of bytes: its 2 * G * E values, then its 2 * G scales.
    """

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        self._heads, self._width = 2 * num_kv_heads, head_dim
        self.token_nbytes = self._heads * (head_dim + SCALE.itemsize)

    def encode(self, kv_T2GE: torch.Tensor, out_TB: torch.Tensor) -> None:
        """Write T tokens as bytes."""
        values = kv_T2GE.reshape(-1, self._heads, self._width).float()
        scales = (values.abs().amax(-1) / 127).to(SCALE)
        steps = scales.float().clamp(min=torch.finfo(SCALE).tiny)[..., None]
        numbers = (values / steps).round_().clamp_(-127, 127).to(torch.int8)
        split = self._heads * self._width
        out_TB[:, :split] = numbers.flatten(1).view(torch.uint8)
        out_TB[:, split:] = scales.view(torch.uint8).view(len(scales), -1)

    def decode(self, raw_TB: torch.Tensor, out_T2GE: torch.Tensor) -> None:
        """Read T tokens."""
        split = self._heads * self._width
        numbers = raw_TB[:, :split].contiguous().view(torch.int8)
        scales = raw_TB[:, split:].contiguous().view(SCALE)
        values = numbers.view(-1, self._heads, self._width).float() * scales.float()[..., None]
        out_T2GE.copy_(values.view(out_T2GE.shape))
