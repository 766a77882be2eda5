"""Streams and events of a device for the engine's own transfers; a CPU has none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from layer_streamer import copy_pieces

from .tokens import Numbers

Pair = tuple[torch.Tensor, torch.Tensor]
"""Where to, where from."""


class Transfers(Protocol):
    """What keys, values and embeddings need of a device.

    Events: waiting on an unrecorded one does nothing.
    """

    back: Any
    """The stream on which new keys and values travel to the host, beside the weights' one."""

    def event(self) -> Any:
        """A new event."""

    def current(self) -> Any:
        """The calling thread's current stream."""

    def record(self, event: Any, stream: Any) -> None:
        """Mark this point of ``stream``."""

    def wait(self, event: Any, stream: Any) -> None:
        """Let ``stream`` wait for the latest record of ``event``."""

    def block(self, event: Any) -> None:
        """Let the calling thread wait for the latest record of ``event``."""

    def copy(self, pairs: Iterable[Pair], stream: Any) -> None:
        """Enqueue copies on ``stream``."""

    def copy_pieces(
        self, to: torch.Tensor, source: torch.Tensor, pieces: Numbers, stream: Any
    ) -> None:
        """Enqueue copies of bytes between page-locked memory and the device, to where they are in
        the source: (first, count) each, (n, 2)."""

    def finish(self) -> None:
        """Block until all transfers have been done."""


class CudaTransfers:
    """An NVIDIA GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.back: Any = torch.cuda.Stream(device)

    def event(self) -> Any:
        return torch.cuda.Event()

    def current(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def wait(self, event: Any, stream: Any) -> None:
        event.wait(stream)

    def block(self, event: Any) -> None:
        event.synchronize()

    def copy(self, pairs: Iterable[Pair], stream: Any) -> None:
        with torch.cuda.stream(stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)

    def copy_pieces(
        self, to: torch.Tensor, source: torch.Tensor, pieces: Numbers, stream: Any
    ) -> None:
        copy_pieces(to, pieces[:, 0], source, pieces[:, 0], pieces[:, 1], stream)

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)


class HostTransfers:
    """A CPU: a copy is done when the call returns."""

    back: Any = None

    def event(self) -> Any:
        return None

    def current(self) -> Any:
        return None

    def record(self, event: Any, stream: Any) -> None:
        return

    def wait(self, event: Any, stream: Any) -> None:
        return

    def block(self, event: Any) -> None:
        return

    def copy(self, pairs: Iterable[Pair], stream: Any) -> None:
        for to, source in pairs:
            to.copy_(source)

    def copy_pieces(
        self, to: torch.Tensor, source: torch.Tensor, pieces: Numbers, stream: Any
    ) -> None:
        copy_pieces(to, pieces[:, 0], source, pieces[:, 0], pieces[:, 1])

    def finish(self) -> None:
        return


def open_transfers(device: torch.device) -> Transfers:
    """Those of a device; ValueError for one that has neither CUDA nor is the CPU."""
    if device.type == "cpu":
        return HostTransfers()
    if device.type == "cuda":
        return CudaTransfers(device)
    raise ValueError(f"kv='host': not available on {device.type}; pass kv='device'")
