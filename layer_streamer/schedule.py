"""The fixed order of all work: which step of which pass, through which clock and layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from .clock import PassClock
from .device import Device
from .layout import Layout, Step, View, lay_out
from .worker import Run


def lay_out_all(
    steps: Sequence[Step], *, unified: bool, dtype: torch.dtype | None
) -> tuple[Layout, ...]:
    """One layout a step; steps whose views are equal share them, so that slots share tensors."""
    interned: dict[tuple[View, ...], tuple[View, ...]] = {}
    layouts = []
    for step in steps:
        layout = lay_out(step, unified=unified, dtype=dtype)
        views = interned.setdefault(layout.views, layout.views)
        layouts.append(replace(layout, views=views))
    return tuple(layouts)


class Schedule:
    """Steps, layouts and clocks of the passes; immutable but for the clocks' stamps."""

    def __init__(
        self,
        steps: Sequence[Step],
        layouts: Sequence[Layout],
        device: Device,
        pools: Mapping[str, int],
    ) -> None:
        self.steps = tuple(steps)
        self.layouts = tuple(layouts)
        self.length = len(self.steps)
        # The pass reported last, the one that runs, and all that prefetch may have reached.
        ahead = -(-sum(pools.values()) // self.length)
        self._clocks = [PassClock(self.steps, device, pools) for _ in range(2 + ahead)]

    def clock(self, run: Run, number: int) -> PassClock:
        """The clock of the pass that step ``number`` of ``run`` belongs to."""
        return self._clocks[(run.base_pass + number // self.length) % len(self._clocks)]

    def index(self, number: int) -> int:
        """Position of step ``number`` within its pass."""
        return number % self.length

    def note_peak(self, run: Run, number: int, pool: str, in_use: int) -> None:
        """``in_use`` slots of ``pool`` are taken once step ``number`` is in one of them."""
        peaks = self.clock(run, number).peak_slots
        peaks[pool] = in_use if self.index(number) == 0 else max(peaks[pool], in_use)
