"""The ways in which passes can be computed, of which a runner takes one for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..kernels.fused import WIDEST_TOKEN
from ..kernels.triton_support import triton_serves
from ..kv.cache import KVCache
from ..kv.rows import Span
from ..models.config import ModelConfig
from ..models.rope import Rotary
from ..models.rope_config import rotated_alike
from ..weights.arithmetic import FASTEST, Arithmetic, Reproducible, tile_nbytes
from .aligned_attention import AlignedAttention, blocks_nbytes
from .batch import Chunk
from .row_attention import GATHER_NBYTES, RowAttention
from .splits import fits_kernels
from .token_attention import Parts, TokenAttention, parts_nbytes


class Attention(Protocol):
    """How the tokens of a chunk look back, in any layer."""

    @property
    def rotates(self) -> bool:
        """True: queries and keys are to come as they are, not rotated."""

    def __call__(
        self,
        layer_idx: int,
        span: Span,
        memory: torch.Tensor,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mixed values (H, T, E) of queries (H, T, E) and new keys and values (G, T, E).

        ``memory`` (places, 2, G, E) are the layer's keys and values, which get the new ones;
        ``sinks_H`` is a score that every query of a head has beside those of its positions.
        """


@dataclass(frozen=True, slots=True)
class Ways:
    """What computes the passes of a runner."""

    arithmetic: Arithmetic
    attention: Callable[[Chunk], Attention]
    takes_trees: bool = True
    """Drafts may be trees; False: chains only."""


def fastest(config: ModelConfig, dtype: torch.dtype, kv: KVCache, *, group_rows: bool) -> Ways:
    """By whatever is fastest for what a pass brings. ``group_rows``: see ``Chunking``."""
    token_nbytes = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
    together = GATHER_NBYTES // (2 * token_nbytes) if group_rows else 0
    return Ways(FASTEST, lambda chunk: RowAttention(chunk, config, kv, most_together=together))


def reproducible(
    config: ModelConfig, kv: KVCache, rotary: Rotary, device: torch.device, *, interleaved: bool
) -> Ways:
    """So that a token's result depends, to the bit, on what its row holds up to it, and on nothing
    else that shares its pass. Only where ``obstacle`` says nothing."""
    arithmetic = Reproducible(device)
    if not triton_serves(device):
        return Ways(
            arithmetic,
            lambda chunk: AlignedAttention(chunk, config, kv, rotary, interleaved=interleaved),
        )
    parts = Parts.take(config, device)
    return Ways(
        arithmetic,
        lambda chunk: TokenAttention(chunk, config, kv, rotary, parts, interleaved=interleaved),
        takes_trees=False,
    )


def obstacle(device: torch.device, config: ModelConfig, length: int) -> str | None:
    """Why rows of so many tokens of a model cannot be computed reproducibly; None: they can."""
    alike = rotated_alike(config.ropes)
    if length > alike:
        return (
            "the model's dynamic rope scaling rotates by how long a pass makes a row, beyond "
            f"max_length={alike:.0f}"
        )
    if device.type == "cpu" and not triton_serves(device):
        return None
    if not triton_serves(device):
        return "on a GPU it needs Triton, which does not serve this one"
    if not fits_kernels(config.num_heads, config.num_kv_heads, config.head_dim):
        return "the model's heads are too wide for the kernels"
    return None if config.hidden_size <= WIDEST_TOKEN else "its tokens are too wide for the kernels"


def tiles_nbytes(config: ModelConfig, device_type: str, dtype: torch.dtype) -> int:
    """What reproducible passes take on the device beside what others do, at most."""
    heads, width = config.num_heads, config.head_dim
    if device_type != "cpu":
        return parts_nbytes(heads, width)
    widest = max(config.hidden_size, config.widest_ffn, heads * width)
    return blocks_nbytes(heads, config.num_kv_heads, width) + tile_nbytes(widest, dtype)
