"""Many small copies between two pieces of memory, enqueued by one call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .cudart import load_runtime
from .device import Numbers


def copy_pieces(
    to: torch.Tensor,
    to_at: Numbers,
    source: torch.Tensor,
    source_at: Numbers,
    nbytes: Numbers,
    stream: Any = None,
) -> None:
    """Enqueue copies of ``nbytes[i]`` bytes from ``source_at[i]`` to ``to_at[i]`` on ``stream``.

    ``to`` and ``source``: contiguous uint8 tensors, one dimension; between host memory, which has
    to be page-locked where the pieces lie, and an NVIDIA GPU, or both on the CPU, where the copies
    are done at return. The numbers: int64, (n,), bytes. No piece of ``to`` may meet another, and
    none may cross from one page-locked registration to the next. In which order they are made is
    open; whatever follows on ``stream`` (a torch.cuda.Stream; None: the current one) comes after
    all of them. For an engine's own transfers (``on_copy``, say): torch takes about 15 us a copy
    and gives the interpreter's lock back in each, this takes about 1 us and keeps it.

    Raises ValueError for pieces outside of the tensors, RuntimeError if CUDA refuses. Thread rules:
    any thread; memory and numbers of copies that are under way must stay as they are.
    """
    to_at, source_at, nbytes = (np.asarray(n, dtype=np.int64) for n in (to_at, source_at, nbytes))
    if not len(nbytes):
        return
    for name, memory, at in (("to", to, to_at), ("source", source, source_at)):
        if not memory.is_contiguous() or memory.dtype != torch.uint8:
            raise ValueError(f"{name}: must be contiguous uint8, is {memory.dtype}")
        first, end = int(at.min()), int((at + nbytes).max())
        if first < 0 or end > memory.nbytes or int(nbytes.min()) < 0:
            raise ValueError(f"{name}: pieces from {first} to {end} of {memory.nbytes} bytes")
    device = to.device if to.is_cuda else source.device
    if device.type != "cuda":
        _copy_one_by_one(to, to_at, source, source_at, nbytes)
        return
    with torch.cuda.device(device):
        current = torch.cuda.current_stream() if stream is None else stream
        runtime = load_runtime()
        if runtime is None:
            with torch.cuda.stream(current):
                _copy_one_by_one(to, to_at, source, source_at, nbytes)
            return
        goals, origins = to.data_ptr() + to_at, source.data_ptr() + source_at
        runtime.copy_all(goals, origins, nbytes, current)


def _copy_one_by_one(
    to: torch.Tensor, to_at: Numbers, source: torch.Tensor, source_at: Numbers, nbytes: Numbers
) -> None:
    for i, j, n in zip(to_at.tolist(), source_at.tolist(), nbytes.tolist(), strict=True):
        to[i : i + n].copy_(source[j : j + n], non_blocking=True)
