"""The search: trials one after the other, in the race's order, on record as they end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from ...errors import ConfigError
from ..progress import Progress, first_line
from ..results import Result, ResultsFile
from ..trials.record import TrialLimits, TrialRecord, TrialSpec
from .race import Race
from .screen import Bounds
from .space import Candidate, make_key

OnEvent = Callable[[str, float], object]


class RunTrial(Protocol):
    """Runs one candidate and says what became of it. Raises KeyboardInterrupt, with all ended."""

    def __call__(
        self, spec: TrialSpec, limits: TrialLimits, *, on_event: OnEvent | None = None
    ) -> TrialRecord: ...


@dataclass(frozen=True, slots=True)
class Task:
    """What a search is given."""

    candidates: Sequence[Candidate]
    """As the race counts them."""
    spec: TrialSpec
    """Of any candidate: only its settings are replaced."""
    limits: TrialLimits
    """Without a best candidate."""
    bounds: Bounds
    unified: bool
    """Whether the device is the CPU."""
    ends_slower: bool = True
    """Whether runs that cannot beat the best are ended."""
    max_seconds: float | None = None


@dataclass(slots=True)
class Search:
    """One search. Ownership: the race, the results file and the progress are the search's while
    :meth:`run` goes on. Thread rules: one thread."""

    race: Race
    task: Task
    run_trial: RunTrial
    progress: Progress
    file: ResultsFile | None = None
    now: Callable[[], float] = time.monotonic
    records: dict[int, TrialRecord] = field(default_factory=dict)
    """By candidate, what became of it; one that is not there was not tried."""
    num_reused: int = 0
    """Of these, taken from the file."""
    out_of_time: bool = False

    def reuse(self, results: Sequence[Result]) -> None:
        """Take what earlier tunes have found out, as far as it still holds.

        Failures are tried again if nothing has ended well: perhaps the cause is gone.
        """
        indices = {candidate.key: i for i, candidate in enumerate(self.task.candidates)}
        known: dict[int, Result] = {}
        for result in results:
            index = indices.get(self._key(result.record))
            if index is not None and not self._is_better_known(known.get(index), result):
                known[index] = result
        if not any(result.record.ending == "ok" for result in known.values()):
            return
        for index, result in known.items():
            if result.record.ending == "slower" or result.holds_under(self.task.limits):
                self._settle(index, result, is_new=False)
                self.num_reused += 1

    def run(self) -> None:
        """Try candidates until the race ends or the time is up."""
        begun = self.now()
        while (index := self.race.next()) is not None:
            limits = self._limits(begun)
            if limits is None:
                self.out_of_time = True
                return
            num_open = len(self.race.open())
            self.progress.begin(len(self.task.candidates) - num_open, num_open)
            settings = self.task.candidates[index].settings
            record = self.run_trial(
                replace(self.task.spec, settings=settings), limits, on_event=self.progress.event
            )
            if (
                record.ending == "timed out"
                and limits.trial_seconds < self.task.limits.trial_seconds
            ):
                # Cut short by the tune's own end: nothing is known of it.
                self.out_of_time = True
                return
            if self.file is not None:
                self.file.append(record, limits)
            self.progress.end(record.trial_seconds)
            self._settle(index, Result(record, limits), is_new=True)

    def _limits(self, begun: float) -> TrialLimits | None:
        """How far the next trial may go; None if no time is left for it."""
        limits, best = self.task.limits, self.race.best
        if self.task.max_seconds is not None:
            left = begun + self.task.max_seconds - self.now()
            if left <= 0:
                return None
            limits = replace(limits, trial_seconds=min(limits.trial_seconds, left))
        if best is not None and self.task.ends_slower:
            first = self.race.records[best].warm_up_seconds
            limits = replace(
                limits, best_seconds=self.race.best_seconds, warm_up_seconds=first or None
            )
        return limits

    def _settle(self, index: int, result: Result, *, is_new: bool) -> None:
        record, before = result.record, self.race.best_seconds
        self.records[index] = record
        if record.ending == "ok":
            excess = self.task.bounds.excess(record)
            if excess:
                self.records[index] = replace(record, detail=excess)
            self.race.tell(index, record, admissible=not excess)
        elif record.ending == "slower" and result.exceeded_seconds > 0:
            self.race.tell_slower(index, result.exceeded_seconds)
        else:
            self.race.tell_failed(index)
        best = self.race.best_seconds
        if is_new and best is not None and self.race.best == index:
            self.progress.new_best(record, before)

    def _key(self, record: TrialRecord) -> str:
        """The key of a record's settings; "" for some that no version of this one has written."""
        try:
            return make_key(record.settings, unified=self.task.unified)
        except (ConfigError, TypeError):
            return ""

    @staticmethod
    def _is_better_known(known: Result | None, result: Result) -> bool:
        """True if ``known`` says more than ``result``, which is younger."""
        if known is None:
            return False
        return known.record.ending == "ok" and result.record.ending != "ok"


def endings(records: Mapping[int, TrialRecord] | Sequence[TrialRecord]) -> str:
    """How trials that gave no result ended, equal ones together; of bounded length."""
    all_records = records.values() if isinstance(records, Mapping) else records
    groups: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in all_records:
        first = first_line(record.detail)
        groups.setdefault((record.ending, first[:200]), []).append(record)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    lines = [
        f"{len(members)} {ending}{': ' if first else ''}{first}"
        for (ending, first), members in ordered[:8]
    ]
    if len(ordered) > 8:
        lines.append(f"and {sum(len(m) for _, m in ordered[8:])} in {len(ordered) - 8} other ways")
    return "; ".join(lines)
