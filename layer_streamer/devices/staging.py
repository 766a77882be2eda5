"""Numbers on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .device import Device

ROWS, WIDTH = 64, 1024


class Staging:
    """Page-locked rows by which the host sends numbers, in the order of the current stream. It
    waits only once all rows are on their way, and no memory is taken for it: to page-lock some, as
    torch does when it has none to spare, may hold up all that a device does.

    Thread rules: one thread.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        staged = device.torch_device.type == "cuda"
        with torch.inference_mode(False):
            self._rows = torch.empty(
                ROWS if staged else 0, WIDTH, dtype=torch.int64, device="cpu", pin_memory=staged
            )
        self._numbers = self._rows.numpy()
        """The same memory, which is quicker to write to."""
        self._sent = [device.new_event() for _ in self._rows]
        self._turn, self._unmarked = 0, False

    def send(self, numbers: Sequence[int]) -> torch.Tensor:
        """(n,) of int64 on the device. More than ``WIDTH`` are waited for."""
        where = self._device
        if not self._sent or len(numbers) > WIDTH:
            return torch.tensor(numbers, dtype=torch.int64, device=where.torch_device)
        stream = where.current_stream()
        if self._unmarked:  # an interrupt came between a copy and its event
            stream.synchronize()
        self._turn = (self._turn + 1) % ROWS
        row, sent = self._rows[self._turn, : len(numbers)], self._sent[self._turn]
        sent.synchronize()
        self._numbers[self._turn, : len(numbers)] = numbers
        self._unmarked = True
        there = row.to(where.torch_device, non_blocking=True)
        sent.record(stream)
        self._unmarked = False
        return there
