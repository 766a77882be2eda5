"""The compute of a trial where the user has none of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...measuring.rawspeed import Load
from ...streamer import LayerStreamer


def synthetic_setup(tokens: int) -> Callable[[LayerStreamer], Callable[[], None]]:
    """A setup_fn whose run() is one pass: each matrix times ``tokens`` vectors, as bench does."""

    def setup(streamer: LayerStreamer) -> Callable[[], None]:
        load, x = Load(tokens), torch.zeros(1, dtype=torch.float32, device=streamer.device)

        def run() -> None:
            streamer.run_pass(x, load)

        return run

    return setup
