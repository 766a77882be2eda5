"""Memory that unpacking takes once and uses again for every few rows."""

from __future__ import annotations

import math

import torch

ALIGNMENT = 64
FEW_TENSORS = 16
"""More than any format takes at a time."""


class Scratch:
    """Bytes on one device, cut into tensors from the front.

    Temporaries as large as the weights would cost more time than the arithmetic; these are made
    once. What :meth:`take` gave is good until :meth:`reset`.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """``nbytes`` for all tensors together; what alignment takes comes on top."""
        size = nbytes + FEW_TENSORS * ALIGNMENT if nbytes else 0
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._end = 0

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def reset(self) -> None:
        """Everything is free again."""
        self._end = 0

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor with any content."""
        nbytes = math.prod(shape) * dtype.itemsize
        memory = self._memory[self._end : self._end + nbytes]
        assert memory.numel() == nbytes, "the scratch is too small"
        self._end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return memory.view(dtype).view(shape)

    def nibbles(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high four bits of every byte, scales included: contiguous is faster."""
        low, high = self.take(torch.uint8, 2, *raw.shape)
        torch.bitwise_and(raw, 15, out=low)
        torch.bitwise_right_shift(raw, 4, out=high)
        return low, high
