"""Which candidate is tried next, and when the others are hopeless. Pure.

Thread rules: one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..trials.record import TrialRecord
from .bounds import LowerBounds, to_log
from .predict import Costs, Work, floor_seconds, learn, predict_seconds, work_of
from .screen import Planned

Strategy = Literal["grid", "race"]

LEAST_TRIALS = 3
"""Trials that end well before a race may stop: one may be lucky."""
ALIKE = 0.05
"""Candidates whose likely seconds differ by less than this share look equally good."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate as the race sees it."""

    features: Mapping[str, Any]
    work: Work


@dataclass(slots=True)
class Race:
    """The state of a search over ``entries``; candidates are known by their index.

    A candidate is *open* until it is told to have been measured, to have failed, or to be slower
    than the best; under "grid" all are tried in the order of their predictions.
    """

    entries: Sequence[Entry]
    costs: Costs
    strategy: Strategy = "race"
    tolerance: float = 0.02
    """A race stops once no open candidate can beat the best by more than this."""
    num_first: int = 0
    """So many candidates, the first ones, are tried before all others, whatever is predicted."""
    records: dict[int, TrialRecord] = field(default_factory=dict)
    """Of candidates measured well, within the bounds or not."""
    exceeded: dict[int, float] = field(default_factory=dict)
    """Seconds that a candidate's run was seen to take at least."""
    closed: set[int] = field(default_factory=set)
    best: int | None = None

    @property
    def best_seconds(self) -> float | None:
        """The best candidate's seconds a run so far."""
        return self.records[self.best].seconds if self.best is not None else None

    def tell(self, index: int, record: TrialRecord, *, admissible: bool = True) -> None:
        """A trial ended well. ``admissible``: within the memory granted, so it may be the best."""
        assert record.seconds is not None
        self.records[index] = record
        self.closed.add(index)
        best = self.best_seconds
        if admissible and (best is None or record.seconds < best):
            self.best = index

    def tell_slower(self, index: int, seconds: float) -> None:
        """A run took more than ``seconds`` and was ended. Closed as long as the best is below."""
        self.exceeded[index] = max(seconds, self.exceeded.get(index, 0.0))

    def tell_failed(self, index: int) -> None:
        """A trial gave no seconds, and would give none if it was tried again."""
        self.closed.add(index)

    def open(self) -> list[int]:
        """Candidates that may still be tried, whatever the strategy."""
        best = self.best_seconds
        return [
            index
            for index in range(len(self.entries))
            if index not in self.closed
            and not (best is not None and self.exceeded.get(index, 0.0) >= best)
        ]

    def next(self) -> int | None:
        """The candidate to try now; None if there is none, or all that are left are hopeless."""
        candidates = self.open()
        if not candidates:
            return None
        if candidates[0] < self.num_first:
            return candidates[0]
        if self.strategy == "grid" or not self.records:
            works = {index: self.entries[index].work for index in candidates}
            return min(works, key=lambda index: (predict_seconds(works[index], self.costs), index))
        likely, lower = self._bounds()
        best = self.best_seconds
        if best is not None and len(self.records) + len(self.exceeded) >= LEAST_TRIALS:
            hopeless = best / (1 + self.tolerance)
            candidates = [index for index in candidates if lower[index] < hopeless]
        if not candidates:
            return None
        # Of those that look equally good the one that is known least. Not the least known of all:
        # that would be ended as slower, and teach little.
        good = min(likely[index] for index in candidates) * (1 + ALIKE)
        candidates = [index for index in candidates if likely[index] <= good]
        return min(candidates, key=lambda index: (lower[index], index))

    def _bounds(self) -> tuple[Sequence[float], Sequence[float]]:
        """By candidate, the seconds that are most likely, and those that it cannot be below."""
        works = [(self.entries[i].work, record) for i, record in self.records.items()]
        costs = learn(self.costs, works)
        predicted = [predict_seconds(entry.work, costs) for entry in self.entries]
        measured = {i: to_log(r.seconds or 0.0, predicted[i]) for i, r in self.records.items()}
        exceeded = {
            i: to_log(seconds, predicted[i])
            for i, seconds in self.exceeded.items()
            if i not in measured
        }
        bounds = LowerBounds([entry.features for entry in self.entries], measured, exceeded)
        guesses = np.array(predicted)
        likely = guesses * np.exp(np.minimum(bounds.estimates(), 700.0))
        lower = guesses * np.exp(np.minimum(bounds.lower(), 700.0))
        floors = np.array([floor_seconds(entry.work, costs) for entry in self.entries])
        return likely.tolist(), np.maximum(lower, floors).tolist()


def enter(planned: Planned) -> Entry:
    """A candidate's entry."""
    return Entry(features_of(planned), work_of(planned))


def features_of(planned: Planned) -> dict[str, Any]:
    """The settings that matter to a candidate, as they take effect."""
    plan, slots, batches = planned.plan, planned.slots, planned.batches
    found: dict[str, Any] = {"n_gpu": slots["device"], "read_mode": plan.read_mode}
    if not plan.machine.unified:
        found["batch_gpu"] = batches.copied
        found["n_cpu_pinned"] = slots.get("pinned") if planned.has_reads else None
        found["n_cpu"] = slots.get("host") if planned.has_reads else None
        found["host_layers"] = len(plan.host_layers)
        found["batch_cpu_pinned"] = batches.staged if len(slots) == 3 else batches.read
    else:
        found["batch_cpu"] = batches.read
    if planned.has_reads:
        found["read_threads"], found["read_chunk"] = plan.read_threads, plan.read_chunk
    for name in ("device_budget", "host_budget"):
        found[name] = planned.settings.get(name, "none")
    return {name: value for name, value in found.items() if value is not None}
