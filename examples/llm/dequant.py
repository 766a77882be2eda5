"""Unpacking of quantized GGUF rows into floats, with torch operations on any device.

Knows the bytes of each block and nothing of models. In float32 the result equals the gguf
package's bit for bit. Everything is written into scratch that is made once: temporaries as large
as the weights would cost more time than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 32
"""Weights in one block, of every packed type here."""

BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}
"""Bytes of one block: of float16 scales first, then of the quantized weights."""

FLOAT_TYPES = ("F32", "F16", "BF16")
"""GGML types that arrive as torch floats and need no unpacking."""

_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 20, 1 << 24


def row_width(row_bytes: int, ggml_type: str) -> int:
    """Weights in a packed row of this many bytes."""
    return row_bytes // BLOCK_BYTES[ggml_type] * BLOCK


class Unpacker:
    """Unpacks rows, a few at a time, into one reused buffer on one device.

    On a CPU the buffer is small enough that floats are still in the cache when they are
    multiplied; on a GPU it is large enough to fill it. The buffer belongs to the caller until the
    next block is asked for; work on a GPU must stay on one stream.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, widest: int) -> None:
        """``widest`` is the longest row in weights: at least one row must fit."""
        self.device, self.dtype = device, dtype
        self._limit = max(_CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS, widest)
        self._floats = torch.empty(self._limit, device=device)
        self._cast = self._floats
        if dtype != torch.float32:
            self._cast = torch.empty(self._limit, dtype=dtype, device=device)
        blocks = self._limit // BLOCK
        self._scales = torch.empty(2, blocks, device=device)
        self._nibbles = torch.empty(
            2, blocks * BLOCK_BYTES["Q4_1"], dtype=torch.uint8, device=device
        )

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
        raw = rows_NB.reshape(-1)
        floats = self._floats[: rows_NB.shape[0] * width]
        if ggml_type == "Q4_1":
            self._q4_1(raw, floats)
        else:
            self._q8_0(raw, floats)
        if self._cast is not self._floats:
            floats = self._cast[: floats.numel()].copy_(floats)
        return floats.view(-1, width)

    def _q4_1(self, raw: torch.Tensor, out: torch.Tensor) -> None:
        """float16 scale, float16 minimum, 16 bytes: low nibbles 0..15, high nibbles 16..31."""
        blocks = raw.numel() // 20
        scales = self._scales[:, :blocks]
        scales.copy_(raw.view(torch.float16).view(blocks, 10)[:, :2].t())
        low, high = self._nibbles[:, : raw.numel()]
        torch.bitwise_and(raw, 15, out=low)  # of the scales' bytes too: contiguous is faster
        torch.bitwise_right_shift(raw, 4, out=high)
        halves = out.view(blocks, 2, 16)
        halves[:, 0] = low.view(blocks, 20)[:, 4:]
        halves[:, 1] = high.view(blocks, 20)[:, 4:]
        out.view(blocks, BLOCK).mul_(scales[0, :, None]).add_(scales[1, :, None])

    def _q8_0(self, raw: torch.Tensor, out: torch.Tensor) -> None:
        """float16 scale, 32 signed bytes."""
        blocks = raw.numel() // 34
        scales = self._scales[0, :blocks]
        scales.copy_(raw.view(torch.float16).view(blocks, 17)[:, 0])
        weights = out.view(blocks, BLOCK)
        weights.copy_(raw.view(torch.int8).view(blocks, 34)[:, 2:])
        weights.mul_(scales[:, None])
