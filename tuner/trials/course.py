"""How a trial is going: what its child has said, and when it is to be ended. No process here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from .record import Ending, TrialLimits

Timed: TypeAlias = Literal["", "warm-up", "untimed", "measured"]
"""What kind of run a stage is, if it is one."""

PATIENCE = 2.0
"""A run that is not measured may take so many times as long as a measured one ..."""
GRACE_SECONDS = 1.0
"""... and so much longer."""
DELIVERY_SECONDS = 0.1
"""For the word that a run has ended to arrive: until then its own clock decides."""
START_SECONDS = 60.0
"""A process may take so long to start and to import torch, even where hang_seconds is less."""


@dataclass(frozen=True, slots=True)
class Due:
    """When a trial is to be ended if nothing more is heard, and what it is told as."""

    when: float
    ending: Ending
    detail: str


@dataclass(slots=True)
class Course:
    """A trial's way through its stages, by the parent's clock (seconds, any origin).

    The rule on slow runs: a *measured* run is ended, and the trial with it, once its elapsed time
    passes ``best_seconds * (1 + margin)`` (by this clock, when it has passed that by
    DELIVERY_SECONDS; by the child's own once the run has ended). One such run is enough, although
    the median of several decides between trials that end well: a run that is slower than the margin
    allows for noise is one that the user would meet as well. Runs that are not measured are given
    more: an untimed one twice that and a second (it may follow a pause, with clocks gone down), the
    first one twice the first run of the best candidate and a second. They never count for the
    result.

    Thread rules: one thread.
    """

    limits: TrialLimits
    began: float
    sleep_seconds: float = 0.0
    """The pause between runs, in which no word is expected."""
    stage: str = "start"
    timed: Timed = ""
    warm_up_seconds: float = 0.0
    run_seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    device_peak: int = 0
    result: Mapping[str, Any] | None = None
    """What the child said at the end of a trial that went well: fields of its record."""
    verdict: tuple[Ending, str] | None = None
    """How the trial ended, as far as words and clock tell."""
    _since: float = field(init=False)
    _last_word: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self._last_word = self.began

    @property
    def over(self) -> bool:
        return self.result is not None or self.verdict is not None

    def elapsed(self, now: float) -> float:
        """Seconds since the stage began."""
        return now - self._since

    def hear(self, message: Mapping[str, Any], now: float) -> str | None:
        """Take note of a message; the name of the stage that it begins, if it does."""
        self._last_word = now
        if "stage" in message:
            self.stage, self.timed, self._since = message["stage"], message["timed"], now
            return self.stage
        if "seconds" in message:
            self._ran(message)
        if "failed" in message:
            self.verdict = (message["failed"], message["detail"])
        if "result" in message:
            self.result = message["result"]
        return None

    def due(self) -> Due:
        """What comes first of all that may end the trial."""
        limits = self.limits
        patience = limits.hang_seconds
        if self.stage == "sleep":
            patience += self.sleep_seconds
        if self.stage == "start":
            patience = max(patience, START_SECONDS)
        stage = f"in stage {self.stage!r}"
        late = f"no result within trial_seconds={limits.trial_seconds:g}, {stage}"
        silent = f"no word for {patience:g} s, hang_seconds={limits.hang_seconds:g}, {stage}"
        dues = [
            Due(self.began + limits.trial_seconds, "timed out", late),
            Due(self._last_word + patience, "hung", silent),
        ]
        allowed = self.allowed()
        if allowed is not None:
            when = self._since + allowed + DELIVERY_SECONDS
            dues.append(Due(when, "slower", self._slower(allowed)))
        return min(dues, key=lambda due: due.when)

    def allowed(self) -> float | None:
        """Seconds that the run under way may take; None: no run, or nothing to compare with."""
        limits = self.limits
        if limits.best_seconds is None:
            return None
        most = limits.best_seconds * (1 + limits.margin)
        if self.timed == "measured":
            return most
        if self.timed == "untimed":
            return PATIENCE * most + GRACE_SECONDS
        if self.timed == "warm-up" and limits.warm_up_seconds is not None:
            return PATIENCE * max(limits.warm_up_seconds, most) + GRACE_SECONDS
        return None

    def _ran(self, message: Mapping[str, Any]) -> None:
        """A run has ended by itself."""
        seconds = message["seconds"]
        allowed = self.allowed() if self.timed == "measured" else None
        if self.timed == "warm-up":
            self.warm_up_seconds = seconds
        if self.timed == "measured":
            self.run_seconds.append(seconds)
            for name, part in message.get("parts", {}).items():
                self.parts.setdefault(name, []).append(part)
        if allowed is not None and seconds > allowed:
            self.verdict = ("slower", f"{self._slower(allowed)}; it took {seconds:.4g} s")
        self.device_peak = max(self.device_peak, message["device_peak"])
        self.timed = ""

    def _slower(self, allowed: float) -> str:
        limits = self.limits
        kind = f"{self.stage} ({self.timed})" if self.timed != "measured" else self.stage
        return (
            f"{kind} passed {allowed:.4g} s, "
            f"where the best takes {limits.best_seconds:.4g} s and margin={limits.margin:g}"
        )
