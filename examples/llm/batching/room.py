"""How many rows are to share the passes, and how many tokens they hold, where nobody says."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kv.host import TokenShape
from ..models.config import ModelConfig

MOST_ROWS, LEAST_ROWS = 256, 8
"""A pass costs the moving of the weights, whatever it computes."""
TOKENS_A_ROW = 1024
"""At most, if there are so many rows."""
FOR_TOKENS, FOR_LOGITS = 4, 16
"""Parts of the memory that is free or granted: a quarter, a sixteenth. The rest is the layers'."""
LOGIT_NBYTES = 8
"""Of a row and a token of the vocabulary."""


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine is to hold."""

    max_batch: int
    kv_tokens: int


def room_for(
    config: ModelConfig, dtype: torch.dtype, free: int, max_length: int, rows: int | None = None
) -> Room:
    """What ``free`` bytes suffice for beside layers, one row of full length at least; ``rows``: if
    somebody says."""
    if rows is None:
        fitting = free // FOR_LOGITS // (LOGIT_NBYTES * config.vocab_size)
        rows = min(max(fitting, LEAST_ROWS), MOST_ROWS)
    token = TokenShape(config.num_kv_heads, config.head_dim, dtype).nbytes * config.num_layers
    fitting = free // FOR_TOKENS // (token + config.hidden_size * dtype.itemsize)
    return Room(rows, max(min(fitting, rows * min(TOKENS_A_ROW, max_length)), max_length))
