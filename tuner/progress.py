"""What a tune shows while it goes on, on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from statistics import fmean, median

from ..progress import ProgressBar
from .options import TuneOptions
from .trials.record import Choice, TrialRecord


class TuneProgress:
    """A bar over the candidates, with the best so far and the time left; lines above it.

    Without ``track_progress`` nothing is shown at all. Thread rules: one thread.
    """

    def __init__(self, options: TuneOptions, now: Callable[[], float]) -> None:
        self._bar = ProgressBar(
            desc="tune",
            unit="trial",
            file=sys.stderr,
            disable=not options.track_progress,
            bar_format="{desc}: {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}",
            total=0,
        )
        self._options, self._now, self._begun = options, now, now()
        self._took: list[float] = []
        self._best = ""
        self._left = ""

    def begin(self, num_done: int, num_open: int) -> None:
        """A trial begins; ``num_open`` candidates, its own among them, have none yet."""
        self._bar.n, self._bar.total = num_done, num_done + num_open
        left = math.inf
        if self._took:
            left = num_open * fmean(self._took)
        if self._options.max_seconds is not None:
            left = min(left, max(self._begun + self._options.max_seconds - self._now(), 0.0))
        self._left = f", at most {format_seconds(left)} left" if left < math.inf else ""
        self._show("")

    def event(self, name: str, seconds: float) -> None:
        """Something happened in the trial that runs."""
        self._show(name)

    def end(self, trial_seconds: float) -> None:
        """The trial has ended, after so many seconds."""
        self._took.append(trial_seconds)
        self._bar.n += 1

    def new_best(self, record: TrialRecord, before: float | None) -> None:
        """A line for a new best candidate; ``before``: the best one's seconds until now."""
        seconds = record.seconds or 0.0
        gain = f" ({1 - seconds / before:.1%} less)" if before else ""
        parts = format_parts(record)
        took = f"{seconds:.4f} s a run{gain}" + (f", {parts}" if parts else "")
        self.note(f"best so far: {took}: {format_settings(record.settings)}")
        self._best = f", best {seconds:.4f} s"
        self._show("")

    def note(self, line: str) -> None:
        """A line above the bar."""
        if self._options.track_progress:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Take the bar away. Idempotent."""
        self._bar.leave = False
        self._bar.close()

    def _show(self, doing: str) -> None:
        now = f", {doing}" if doing else ""
        self._bar.set_postfix_str(f"{self._best}{self._left}{now}".removeprefix(", "))


def format_settings(settings: Choice) -> str:
    """As a call has them: n_gpu=2, read_mode='direct'."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "the defaults"


def first_line(detail: str) -> str:
    """Of a record's detail, the line that says it all; "" if there is none."""
    return next(iter(detail.strip().splitlines()), "")


def format_parts(record: TrialRecord) -> str:
    """The parts of an engine's runs, medians: "prompt 0.0400 s, decode 0.2000 s"; else ""."""
    return ", ".join(f"{name} {median(of_one):.4f} s" for name, of_one in record.parts.items())


def format_seconds(seconds: float) -> str:
    """For people: "45 s", "3:05 min", "1:02 h"."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60}:{whole % 60:02} min"
    minutes = whole // 60
    return f"{minutes // 60}:{minutes % 60:02} h"
