"""How many tokens many rows are to hold together, where nobody says."""

from __future__ import annotations

import torch

from ..kv.host import TokenShape
from ..models.config import ModelConfig

ROWS = 256
"""At a time: a pass costs the moving of the weights, whatever it computes."""
TOKENS_A_ROW = 1024
SHARE = 4
"""A quarter of what is free or granted: the rest is the layers'."""


def kv_tokens(
    config: ModelConfig, dtype: torch.dtype, free: int, max_length: int, rows: int = ROWS
) -> int:
    """Tokens whose keys, values and residual stream take a share of ``free`` bytes: for as many
    rows as there may be at most, for one at least."""
    token = TokenShape(config.num_kv_heads, config.head_dim, dtype).nbytes * config.num_layers
    fitting = free // SHARE // (token + config.hidden_size * dtype.itemsize)
    return max(min(fitting, rows * min(TOKENS_A_ROW, max_length)), max_length)
