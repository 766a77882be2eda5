"""How many threads torch computes with while passes are measured on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..machine.threads import most_torch_threads


@contextmanager
def leave_a_core() -> Iterator[None]:
    """Context in which torch leaves a core to the streamer's threads.

    Unless OMP_NUM_THREADS says how many threads there are to be. They are as before afterwards.
    """
    before, most = torch.get_num_threads(), most_torch_threads()
    if before <= most or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)
