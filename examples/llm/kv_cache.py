"""Keys and values of the tokens seen so far, preallocated on the device."""

from __future__ import annotations

import torch

from .config import ModelConfig


class KVCache:
    """One sequence's keys and values, for every layer.

    A pass appends its tokens layer by layer and is made permanent by :meth:`advance` at its end,
    so a pass that fails half way leaves the cache as it was.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (config.num_layers, 2, config.num_kv_heads, max_positions, config.head_dim)
        self._store = torch.empty(shape, dtype=dtype, device=device)
        self.max_positions = max_positions
        self.length = 0
        """Tokens whose keys and values are in place."""

    @property
    def nbytes(self) -> int:
        return self._store.nbytes

    def append(
        self, layer_idx: int, k_GTE: torch.Tensor, v_GTE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new tokens of one layer; returns views of all its (G, P, E) keys and values."""
        end = self.length + k_GTE.shape[1]
        keys, values = self._store[layer_idx]
        keys[:, self.length : end] = k_GTE
        values[:, self.length : end] = v_GTE
        return keys[:, :end], values[:, :end]

    def advance(self, num_tokens: int) -> None:
        """The pass over these tokens is complete in every layer."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length}: the cache holds {self.length} tokens")
        self.length = length
