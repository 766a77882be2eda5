"""Unpacking of quantized rows into one reused buffer of floats.

Knows how many rows to unpack at a time; the bytes of each type are in ``quants``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .quants import BLOCK_TYPES, Scratch

FLOAT_TYPES = ("F32", "F16", "BF16")
"""GGML types that arrive as torch floats and need no unpacking."""

_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 20, 1 << 24


def row_width(row_bytes: int, ggml_type: str) -> int:
    """Weights in a packed row of this many bytes."""
    kind = BLOCK_TYPES[ggml_type]
    return row_bytes // kind.nbytes * kind.weights


class Unpacker:
    """Unpacks rows, a few at a time, into one reused buffer on one device.

    On a CPU the buffer is small enough that floats are still in the cache when they are
    multiplied; on a GPU it is large enough to fill it. The buffer belongs to the caller until the
    next block is asked for; work on a GPU must stay on one stream.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, widest: int) -> None:
        """``widest`` is the longest packed row in weights: at least one row must fit. With 0,
        nothing is packed and no memory is taken."""
        self.device, self.dtype = device, dtype
        usual = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
        self._limit = max(usual, widest) if widest else 0
        self._floats = torch.empty(self._limit, device=device)
        self._cast = self._floats
        if dtype != torch.float32:
            self._cast = torch.empty(self._limit, dtype=dtype, device=device)
        self._scratch = Scratch(self._limit, device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, taken for good."""
        cast = 0 if self._cast is self._floats else self._cast.nbytes
        return self._floats.nbytes + cast + self._scratch.nbytes

    def blocks(
        self, rows_NB: torch.Tensor, ggml_type: str
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, end row, their weights (rows, width)) for all rows in order."""
        width = row_width(rows_NB.shape[1], ggml_type)
        step = max(1, self._limit // width)
        for start in range(0, rows_NB.shape[0], step):
            rows = rows_NB[start : start + step]
            yield start, start + rows.shape[0], self._unpack(rows, ggml_type, width)

    def _unpack(self, rows_NB: torch.Tensor, ggml_type: str, width: int) -> torch.Tensor:
        floats = self._floats[: rows_NB.shape[0] * width]
        BLOCK_TYPES[ggml_type].unpack(rows_NB.reshape(-1), floats, self._scratch)
        if self._cast is not self._floats:
            floats = self._cast[: floats.numel()].copy_(floats)
        return floats.view(-1, width)
