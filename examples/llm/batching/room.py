"""How many rows are to share the passes, and how many tokens they hold, where nobody says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from layer_streamer import parse_bytes, plan_checkpoint

from ..kv.host import TokenShape
from ..memory.placing import choose_devices, choose_dtype
from ..models.config import ModelConfig
from ..opening import Limits, Model

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
    config: ModelConfig,
    dtype: torch.dtype,
    free: int,
    max_length: int,
    rows: int | None = None,
    devices: int = 1,
) -> Room:
    """What ``free`` bytes of each device suffice for beside layers, one row of full length at
    least; ``rows``: if somebody says. Of several devices each has its layers' keys and values."""
    if rows is None:
        fitting = free // FOR_LOGITS // (LOGIT_NBYTES * config.vocab_size)
        rows = min(max(fitting, LEAST_ROWS), MOST_ROWS)
    layers = -(-config.num_layers // devices)
    token = TokenShape(config.num_kv_heads, config.head_dim, dtype).nbytes * layers
    fitting = free // FOR_TOKENS // (token + config.hidden_size * dtype.itemsize)
    return Room(rows, max(min(fitting, rows * min(TOKENS_A_ROW, max_length)), max_length))


def many_rows(model: Model, options: Mapping[str, Any]) -> dict[str, int]:
    """``max_batch`` and ``kv_tokens`` for an engine with these options: many rows, if the memory
    that is free or granted has room for them. ValueError for an option that makes no sense."""
    devices = choose_devices(options.get("device"))
    dtype = choose_dtype(devices, options.get("dtype"))
    machine = plan_checkpoint(model.manifest, device=list(devices)).machine
    free = machine.host_available if machine.unified else min(machine.device_free)
    for name in ("device_budget", *(["host_budget"] if machine.unified else [])):
        if (budget := options.get(name)) not in (None, "auto"):
            free = min(free, parse_bytes(name, budget))
    length = Limits(options.get("max_length")).length(model.config)
    rows = options.get("max_batch")
    found = room_for(model.config, dtype, free, length, rows, len(devices))
    return {"max_batch": found.max_batch, "kv_tokens": found.kv_tokens}
