"""Embeddings whose rows are taken from host memory, where the file's own pages are: a token needs
one row, and the whole table would take device memory for as long as the model lives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..unbound import as_parameter

FEW = 64
"""So many ids are looked up as they come. Of more, each row is taken once: a long text has the same
words again and again."""


class Rows:
    """The hooks of one embedding: for its forward, its weight is the rows that are asked for.

    Thread rules: those of the model, one forward at a time.
    """

    def __init__(self, rows: torch.Tensor, away: torch.Tensor, device: torch.device) -> None:
        """``rows``: the table in host memory, shape (rows, width). ``away``: the parameter that is
        there between forwards; it has the dtype. ``device``: where the forward computes."""
        self._rows = rows
        self._away = away
        self._dtype = away.dtype
        self._device = device
        with torch.inference_mode(False):
            self._places = torch.arange(FEW, device=device)

    def register(self, module: nn.Embedding) -> None:
        """Before all other hooks that the module has."""
        module._parameters["weight"] = self._away  # type: ignore[assignment]
        module.padding_idx = None  # matters to gradients alone, and would have to be a row
        module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        ids = kwargs["input"] if "input" in kwargs else args[0]
        count = ids.numel()
        if count <= FEW:
            rows, places = self._take(ids.reshape(-1).cpu()), self._places[:count].view(ids.shape)
        else:
            unique, places = ids.cpu().unique(return_inverse=True)
            rows, places = self._take(unique), places.to(self._device)
        weight = as_parameter(rows.to(self._dtype), nn.Parameter, {})
        module._parameters["weight"] = weight  # type: ignore[assignment]
        if "input" in kwargs:
            return args, {**kwargs, "input": places}
        return (places, *args[1:]), kwargs

    def _take(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of these ids, shape (ids, width), on the device."""
        if self._device.type != "cuda" or len(ids) > FEW:
            return self._rows.index_select(0, ids).to(self._device)
        # From page-locked memory the copy is enqueued and nobody waits for it. It is torch's own,
        # which gives it to nobody else before the copy is done.
        staged = torch.empty(
            (len(ids), self._rows.shape[1]), dtype=self._rows.dtype, device="cpu", pin_memory=True
        )
        torch.index_select(self._rows, 0, ids, out=staged)
        return staged.to(self._device, non_blocking=True)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters["weight"] = self._away  # type: ignore[assignment]
