"""Cores for torch's threads and for the streamer's: on a CPU both want them."""

from __future__ import annotations

import logging

import torch

from .identity import num_cores

logger = logging.getLogger(__name__)

_said: list[int] = []
"""What has been said in this process; once is enough."""


def most_torch_threads() -> int:
    """With so many threads torch leaves a core to the threads that stream, if there are two."""
    return max(1, num_cores() - 1)


def note_too_many_threads() -> None:
    """Log a warning, once a process, if torch computes with a thread on every core.

    At the end of every operation its threads wait for each other, spinning. When a reader takes the
    core of one of them, all stand still for a time slice.
    """
    threads, most = torch.get_num_threads(), most_torch_threads()
    if threads <= most or _said:
        return
    _said.append(threads)
    logger.warning(
        "torch computes with %d threads on %d cores and leaves none to the threads that stream, "
        "which can make a pass many times slower: torch.set_num_threads(%d) leaves one",
        threads, num_cores(), most,
    )  # fmt: skip
