"""The fixed order of all work: which step of which pass, through which clock and layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch

from ..planning.layout import Copy, Layout, Step, View, lay_out
from .clock import PassClock, Routes
from .stage import Heading, LaneRun, Run


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
    """Which steps of a run one stage has work with, and how it numbers them across passes. Pure.

    The stage's own number n counts only its steps; a step's number counts all steps of a run. A
    step that comes in several parts is named once for each, in a row: then n counts parts.
    """

    def __init__(self, passes: Sequence[Sequence[int]], length: int, lead: int = 0) -> None:
        """``passes``: of the first passes of a run, places in the pass, ascending. All but
        ``lead`` of them (at most as many as the others) repeat. ``length``: steps of a pass."""
        self._numbers = [p * length + place for p, some in enumerate(passes) for place in some]
        steps = Counter(self._numbers)
        self._before = list(accumulate((steps[i] for i in range(len(passes) * length)), initial=0))
        self._lead = lead * length
        self._period = (len(passes) - lead) * length
        self._head = self._before[self._lead]
        self.count = len(self._numbers) - self._head
        """Steps (parts) until the run repeats; if there are none, the stage has work in the lead
        alone."""
        self._ends = {self._before[p * length] for p in range(len(passes) + 1)}

    def has(self, n: int) -> bool:
        """Whether there is an ``n``-th: there always is, if the passes that repeat have one."""
        return self.count > 0 or n < self._head

    def number(self, n: int) -> int:
        """The step that is the stage's ``n``-th."""
        laps, at = self._reduce(n, self._head, self.count)
        return self._numbers[at] + laps * self._period

    def before(self, number: int) -> int:
        """How many of the stage's steps (parts) come before step ``number``.

        If it is one of them: its own n, or that of its first part.
        """
        laps, at = self._reduce(number, self._lead, self._period)
        return self._before[at] + laps * self.count

    def find(self, number: int) -> int | None:
        """The stage's own n of step ``number`` (of its first part); None: it has none with it."""
        laps = (number - self._lead) // self._period if number >= self._lead else 0
        at = number - laps * self._period
        n = self._before[at]
        return n + laps * self.count if self._before[at + 1] > n else None

    def ends(self, done: int) -> bool:
        """Whether a pass has ended when so many are done."""
        return self._reduce(done, self._head, self.count)[1] in self._ends

    @staticmethod
    def _reduce(at: int, lead: int, period: int) -> tuple[int, int]:
        """How often the run has repeated, and where it would be if it had not."""
        laps = (at - lead) // period if at >= lead and period else 0
        return laps, at - laps * period


class SlotUse(NamedTuple):
    """What of a lane's steps goes through its device's slots."""

    indices: Sequence[int]
    """Of these steps in a pass that goes ahead, ascending."""
    num_slots: int
    in_place: bool
    """A step is read into the device's slot itself."""


class Orders:
    """The steps of one lane in a run: what goes through the device's slots, and what is read.

    Where passes turn, the layers that lie in slots when a pass begins are its first ones. They are
    neither read nor copied, but are steps of the slots like any other: a layer has the same slot
    whichever way a pass goes, so that slots come free, and are filled, in one order. Immutable.
    """

    def __init__(
        self, layouts: Sequence[Layout], heading: Heading, used: SlotUse, parts: Mapping[int, int]
    ) -> None:
        """``layouts``: of every step of a pass, by its index. ``parts``: how many parts each of
        those has that are read."""
        self.layouts = layouts
        self.length = len(layouts)
        self._heading = heading
        self._used = used
        lead = int(heading.turns)
        passes = [self._places(heading.goes_back(p)) for p in range(1 + 2 * lead)]
        kept = [[], *(some[: used.num_slots] for some in passes[1:])]
        self.num_slots = used.num_slots
        """Of the device's, in turn."""
        self.copied = Order(passes, self.length, lead)
        """Of the device's slots."""
        self._kept = Order(kept, self.length, lead)
        self.read = self.copied
        """Of the readers, who count parts of steps if they pass through a ring."""
        if not used.in_place:
            read = list[list[int]]()
            for p, (some, lying) in enumerate(zip(passes, kept, strict=True)):
                brought = [place for place in some if place not in lying]
                counts = [parts.get(self.index(p * self.length + place), 0) for place in brought]
                read.append([x for x, n in zip(brought, counts, strict=True) for _ in range(n)])
            self.read = Order(read, self.length, lead)

    def index(self, number: int) -> int:
        """Which layer step ``number`` is: its index in a pass that goes ahead."""
        passes, place = divmod(number, self.length)
        return self.length - 1 - place if self._heading.goes_back(passes) else place

    def kept(self, number: int) -> bool:
        """Whether the layer of step ``number`` lies in its slot since the pass before."""
        return self._kept.find(number) is not None

    def slot(self, n: int) -> int:
        """The device's slot of the lane's ``n``-th step that goes through one."""
        if self._heading.turns:
            passes, at = divmod(n, self.copied.count // 2)
            n = len(self._used.indices) - 1 - at if self._heading.goes_back(passes) else at
        return n % self.num_slots

    def released(self, lane_run: LaneRun) -> int:
        """Steps that the caller has given back to the device's slots."""
        return self.copied.before(lane_run.run.released)

    def _places(self, back: bool) -> list[int]:
        """Of the lane's steps in a pass."""
        if back:
            return [self.length - 1 - i for i in reversed(self._used.indices)]
        return list(self._used.indices)


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

    def index(self, run: Run, number: int) -> int:
        """Which layer step ``number`` of ``run`` is: its index in a pass that goes ahead."""
        if not run.heading.back and not run.heading.turns:
            return number % self.length
        passes, place = divmod(number, self.length)
        return self.length - 1 - place if run.heading.goes_back(passes) else place

    def note_peak(self, run: Run, number: int, order: Order, pool: str, in_use: int) -> None:
        """``in_use`` slots of ``pool`` are taken once step ``number`` is in one of them.

        ``order``: of the steps that go through the pool.
        """
        peaks = self.clock(run, number).peak_slots
        first = order.ends(order.before(number))
        peaks[pool] = in_use if first else max(peaks[pool], in_use)
