"""How many threads torch computes with on a CPU that also streams."""

from __future__ import annotations

import os

import torch


def leave_a_core() -> None:
    """Leave one core to the streamer's threads, unless OMP_NUM_THREADS says otherwise.

    torch's threads wait for each other at the end of every operation, spinning. When the streamer
    or another process takes the core of one of them, all stand still for a time slice, a thousand
    times a pass: on two busy cores one thread was measured 40 times faster than two.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - 1)))
