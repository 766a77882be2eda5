"""The search: trials one after the other, in the race's order, on record as they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ...errors import ConfigError
from ..options import TuneOptions
from ..progress import TuneProgress, first_line
from ..results import Result, ResultsFile
from ..trials.record import Choice, TrialLimits, TrialRecord, TrialSpec
from .race import Race
from .space import Bounds, make_key

RunTrial = Callable[..., TrialRecord]
"""``run_trial(spec, limits, on_event=)``: runs one candidate, and says what became of it. Raises
KeyboardInterrupt, with all ended."""


@dataclass(slots=True)
class Search:
    """One search. Thread rules: one thread, whose is the race, and the file and the progress that
    :meth:`run` is given while it goes on."""

    race: Race
    candidates: Sequence[Choice]
    """As the race counts them."""
    spec: TrialSpec
    """Of any candidate: only its settings are replaced."""
    options: TuneOptions
    bounds: Bounds
    unified: bool
    """Whether the device is the CPU."""
    run_trial: RunTrial
    now: Callable[[], float]
    records: dict[int, TrialRecord] = field(default_factory=dict)
    """By candidate, what became of it; one that is not there was not tried."""
    num_reused: int = 0
    """Of these, taken from the file."""
    out_of_time: bool = False

    def reuse(self, results: Sequence[Result]) -> None:
        """Take what earlier tunes have found out, as far as it still holds.

        Failures are tried again if nothing has ended well: perhaps the cause is gone.
        """
        indices = {self._key(settings): i for i, settings in enumerate(self.candidates)}
        known: dict[int, Result] = {}
        for result in results:
            index = indices.get(self._key(result.record.settings))
            if index is None:
                continue
            # The youngest counts, but for one that did not end well where an older one has.
            if result.record.ending == "ok" or known.get(index, result).record.ending != "ok":
                known[index] = result
        if not any(result.record.ending == "ok" for result in known.values()):
            return
        for index, result in known.items():
            if result.record.ending == "slower" or result.holds_under(self.options.limits):
                self._settle(index, result)
                self.num_reused += 1

    def run(self, file: ResultsFile, progress: TuneProgress) -> None:
        """Try candidates until the race ends or the time is up."""
        begun = self.now()
        while (index := self.race.next()) is not None:
            limits = self._limits(begun)
            if limits is None:
                self.out_of_time = True
                return
            num_open = len(self.race.open())
            progress.begin(len(self.candidates) - num_open, num_open)
            spec = replace(self.spec, settings=self.candidates[index])
            record = self.run_trial(spec, limits, on_event=progress.event)
            if record.ending == "timed out" and limits.trial_seconds < self.options.trial_seconds:
                # Cut short by the tune's own end: nothing is known of it.
                self.out_of_time = True
                return
            file.append(record, limits)
            progress.end(record.trial_seconds)
            before = self.race.best_seconds
            self._settle(index, Result(record, limits))
            if self.race.best == index:
                progress.new_best(record, before)

    def _limits(self, begun: float) -> TrialLimits | None:
        """How far the next trial may go; None if no time is left for it."""
        options, limits, best = self.options, self.options.limits, self.race.best
        if options.max_seconds is not None:
            left = begun + options.max_seconds - self.now()
            if left <= 0:
                return None
            limits = replace(limits, trial_seconds=min(limits.trial_seconds, left))
        if best is not None and options.margin is not None:
            first = self.race.records[best].warm_up_seconds
            limits = replace(
                limits, best_seconds=self.race.best_seconds, warm_up_seconds=first or None
            )
        return limits

    def _settle(self, index: int, result: Result) -> None:
        record = self.records[index] = result.record
        if record.ending == "ok":
            excess = self.bounds.excess(record.peak_device_bytes, record.peak_host_bytes, "it took")
            if excess:
                self.records[index] = replace(record, detail=excess)
            self.race.tell(index, record, admissible=not excess)
        elif record.ending == "slower" and result.exceeded_seconds > 0:
            self.race.tell_slower(index, result.exceeded_seconds)
        else:
            self.race.tell_failed(index)

    def _key(self, settings: Choice) -> str:
        """Their key; "" for some of a record that no version of this one has written."""
        try:
            return make_key(settings, unified=self.unified)
        except (ConfigError, TypeError):
            return ""


def endings(records: Sequence[TrialRecord]) -> str:
    """How trials that gave no result ended, equal ones together; of bounded length."""
    groups: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in records:
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
