"""One matrix, quantized some rows at a time."""

from __future__ import annotations

import torch

from ..weights.converted import in_order
from .codes import decode, pack_codes
from .errors import Errors
from .scales import Rounding, search_scales

CPU_BLOCK, DEVICE_BLOCK = 1 << 18, 1 << 24
"""Weights that are rounded at a time: on a CPU so few that temporaries stay in its caches."""


class Quantized:
    """A matrix of which rows are added until it is complete."""

    def __init__(self, group: int, rounding: Rounding, importance: torch.Tensor | None) -> None:
        """``importance`` (width,): what each column counts; None: all alike."""
        self.errors = Errors()
        self._group, self._rounding = group, rounding
        self._importance = None if importance is None else importance.view(-1, group)
        self._words: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []
        self._width = 0

    def add(self, rows_NK: torch.Tensor) -> None:
        """Quantize the next rows, float32."""
        self._width = rows_NK.shape[1]
        most = CPU_BLOCK if rows_NK.device.type == "cpu" else DEVICE_BLOCK
        for part in rows_NK.split(max(1, most // self._width)):
            groups = part.unflatten(1, (-1, self._group))
            scales = search_scales(groups, self._importance, self._rounding)
            codes = self._rounding.codes(groups, scales).flatten(1).to(torch.int8)
            self.errors.see(decode(codes, scales), part)
            self._words.append(pack_codes(codes, self._rounding.bits).cpu())
            self._scales.append(scales.to(self._rounding.dtype).cpu())

    def tensors(self, permuted_heads: int) -> dict[str, torch.Tensor]:
        """By the names that compressed-tensors gives them, on the host; rows that are permuted
        within so many heads are put in their order."""
        words, scales = torch.cat(self._words), torch.cat(self._scales)
        if permuted_heads:
            words, scales = in_order(words, permuted_heads), in_order(scales, permuted_heads)
        shape = torch.tensor([words.shape[0], self._width], device="cpu")
        return {"weight_packed": words, "weight_scale": scales, "weight_shape": shape}
