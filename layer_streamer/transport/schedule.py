"""The fixed order of all work: which step of which pass, through which clock and layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from ..planning.layout import Copy, Layout, Step, View, lay_out
from .clock import PassClock, Routes
from .stage import LaneRun, Run


def lay_out_all(
    steps: Sequence[Step], *, unified: bool, dtype: torch.dtype | None
) -> tuple[Layout, ...]:
    """One layout a step; steps whose views are equal share them, so that slots share tensors."""
    all_views: dict[tuple[View, ...], tuple[View, ...]] = {}
    all_casts: dict[tuple[View, ...], tuple[View, ...]] = {}
    all_copies: dict[tuple[Copy, ...], tuple[Copy, ...]] = {}
    layouts = []
    for step in steps:
        layout = lay_out(step, unified=unified, dtype=dtype)
        views = all_views.setdefault(layout.views, layout.views)
        copies = all_copies.setdefault(layout.copies, layout.copies)
        casts = all_casts.setdefault(layout.casts, layout.casts)
        layouts.append(replace(layout, views=views, copies=copies, casts=casts))
    return tuple(layouts)


class Order:
    """Which steps of a pass one stage has work with, and how it numbers them across passes. Pure.

    The stage's own number n counts only its steps; a step's number counts all steps of a run. A
    step that comes in several parts is named once for each, in a row: then n counts parts.
    """

    def __init__(self, indices: Sequence[int], length: int) -> None:
        self.indices = tuple(indices)
        self.count = len(self.indices)
        self._length = length
        parts = Counter(self.indices)
        self._before = list(accumulate((parts[index] for index in range(length)), initial=0))
        self._first = [self._before[i] if parts[i] else None for i in range(length)]

    def __contains__(self, index: int) -> bool:
        return self._first[index] is not None

    def number(self, n: int) -> int:
        """The step that is the stage's ``n``-th."""
        passes, position = divmod(n, self.count)
        return passes * self._length + self.indices[position]

    def before(self, number: int) -> int:
        """How many of the stage's steps (parts) come before step ``number``.

        If it is one of them: its own n, or that of its first part.
        """
        passes, index = divmod(number, self._length)
        return passes * self.count + self._before[index]

    def find(self, number: int) -> int | None:
        """The stage's own n of step ``number`` (of its first part); None: it has none with it."""
        passes, index = divmod(number, self._length)
        first = self._first[index]
        return None if first is None else passes * self.count + first


@dataclass(frozen=True, slots=True)
class Orders:
    """The steps of one lane: what goes through the device's slots, and what of it is read.

    ``read`` counts parts of steps if they pass through a ring.
    """

    layouts: Sequence[Layout]
    """Of every step of a pass."""
    copied: Order
    read: Order

    @property
    def length(self) -> int:
        return len(self.layouts)

    def released(self, lane_run: LaneRun) -> int:
        """Steps that the caller has given back to the device's slots."""
        return self.copied.before(lane_run.run.released)


class Schedule:
    """Steps, layouts and clocks of the passes; immutable but for the clocks' stamps."""

    def __init__(
        self,
        steps: Sequence[Step],
        layouts: Sequence[Layout],
        routes: Routes,
        pools: Mapping[str, int],
        passes_ahead: int,
    ) -> None:
        self.steps = tuple(steps)
        self.layouts = tuple(layouts)
        self.paths = [tuple({read.path for read in layout.reads}) for layout in self.layouts]
        """The files that each step is read from."""
        self.length = len(self.steps)
        # The pass reported last, the one that runs, and all that prefetch may have reached.
        count = 2 + passes_ahead
        self._clocks = [PassClock(self.steps, routes, pools) for _ in range(count)]

    def clock(self, run: Run, number: int) -> PassClock:
        """The clock of the pass that step ``number`` of ``run`` belongs to."""
        return self._clocks[(run.base_pass + number // self.length) % len(self._clocks)]

    def index(self, number: int) -> int:
        """Position of step ``number`` within its pass."""
        return number % self.length

    def note_peak(self, run: Run, number: int, order: Order, pool: str, in_use: int) -> None:
        """``in_use`` slots of ``pool`` are taken once step ``number`` is in one of them.

        ``order``: of the steps that go through the pool.
        """
        peaks = self.clock(run, number).peak_slots
        first = self.index(number) == order.indices[0]
        peaks[pool] = in_use if first else max(peaks[pool], in_use)
