"""A process's part of the device's memory, of peers that compute with torch."""

from __future__ import annotations

import torch

from .session import Asked

SPARE = 96 << 20
"""Bytes that libraries take beside torch's allocator once they compute."""
RESERVE = 768 << 20
"""Of a budget for weights: what activations, keys and values of a short row take."""


def hold_to_limit(asked: Asked) -> int | None:
    """Hold torch's allocator to what the limit leaves beside the context, and give these bytes;
    None without a limit. The GPU must be ours alone."""
    torch.set_num_threads(asked.threads)
    if not asked.cuda:
        return None
    before = torch.cuda.mem_get_info(asked.device)[0]  # which makes the context
    work = torch.ones(64, 64, device=asked.device, dtype=torch.bfloat16)
    (work @ work).sum().item()
    free, total = torch.cuda.mem_get_info(asked.device)
    if asked.device_nbytes is None:
        return None
    taken = total - min(before, free) - torch.cuda.memory_reserved(asked.device)
    budget = asked.device_nbytes - taken - SPARE
    torch.cuda.set_per_process_memory_fraction(budget / total, asked.device)
    return budget


def weights_budget(asked: Asked, budget: int | None) -> int | None:
    """What of a budget may hold weights."""
    return None if budget is None else int((budget - RESERVE) * asked.share)


def total_memory(asked: Asked) -> int:
    return int(torch.cuda.get_device_properties(asked.device).total_memory)
