"""Keys and values in host memory of layers that several devices compute: a tier for each device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from .host import HostTier
from .moves import Move
from .rows import Row, Span


class HostTiers:
    """As one ``HostTier``, whose layers go to their devices over links of their own.

    Each device's layers pass through slots there, by its own copier's thread and on its own
    streams; no tier knows of another. Thread rules: :meth:`prefetch` of the layers of one device on
    its copier's thread; all else on the thread that runs passes.
    """

    def __init__(
        self, spans: Mapping[int, Span], count: int, make: Callable[[int, Any], HostTier]
    ) -> None:
        """``spans``: the layers that live here; layer i is of device i modulo ``count``.
        ``make(number, spans)``: the tier of one device."""
        self.by_device: dict[int, HostTier] = {}
        """None of those of whose layers none lives here."""
        for number in range(count):
            own = {i: span for i, span in spans.items() if i % count == number}
            if own:
                self.by_device[number] = make(number, own)
        self._count = count

    @property
    def host_nbytes(self) -> int:
        """Host memory that has been taken."""
        return sum(tier.host_nbytes for tier in self.by_device.values())

    @property
    def late_nbytes(self) -> int:
        """Bytes that had not been prefetched, of all passes."""
        return sum(tier.late_nbytes for tier in self.by_device.values())

    def prefetch(self, layer_idx: int, stream: Any) -> None:
        """The streamer's ``on_copy``: of layers in device memory, and of steps that are no layers,
        there is nothing to bring."""
        tier = self.by_device.get(layer_idx % self._count)
        if tier is not None:
            tier.prefetch(layer_idx, stream)

    def begin(self, rows: Sequence[Row]) -> None:
        """Before a pass over these rows begins."""
        for tier in self.by_device.values():
            tier.begin(rows)

    def open(self, layer_idx: int, rows: Sequence[Row]) -> torch.Tensor:
        """The layer's keys and values on its device."""
        return self._of(layer_idx).open(layer_idx, rows)

    def close_layer(self, layer_idx: int, batch: Sequence[tuple[Row, int]]) -> None:
        """The pass has appended so many tokens to each row: send them home."""
        self._of(layer_idx).close_layer(layer_idx, batch)

    def open_home(self, layer_idx: int, batch: Sequence[tuple[Row, int]]) -> torch.Tensor:
        """The layer's keys and values at home."""
        return self._of(layer_idx).open_home(layer_idx, batch)

    def close_home(self, layer_idx: int, batch: Sequence[tuple[Row, int]]) -> None:
        """The host has appended so many tokens to each row."""
        self._of(layer_idx).close_home(layer_idx, batch)

    def move(self, moves: Sequence[Move]) -> None:
        """Move tokens at home."""
        for tier in self.by_device.values():
            tier.move(moves)

    def close(self) -> None:
        """Give page locks and slots back, of each tier, whatever another one's device says."""
        with ExitStack() as closing:
            for tier in self.by_device.values():
                closing.callback(tier.close)

    def _of(self, layer_idx: int) -> HostTier:
        return self.by_device[layer_idx % self._count]
