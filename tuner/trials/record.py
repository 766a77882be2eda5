"""What a trial is asked to do, how far it may go, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

Choice = Mapping[str, int | str | None]
"""What a candidate is: keyword arguments of the streamer. JSON values alone."""

CacheState = Literal["warm", "cold"]
"""The page cache before every measured run: holding the checkpoint's files, or nothing of them."""

Ending = Literal[
    "ok",
    "out of memory",
    "exception",
    "signal",
    "exit",
    "hung",
    "timed out",
    "slower",
    "pruned",
]
"""How a candidate ended. "exit": the process ended by itself without a result. "hung": it made no
progress at all. "slower": ended in the middle of a run that could not beat the best any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionName:
    """A function that a fresh process can import."""

    module: str
    """A module's dotted name; "__main__" for the script that calls tune()."""
    qualname: str
    file: str
    """The module's source file, absolute; what a child runs where module is "__main__"."""
    option: str = "setup_fn"
    """The option that it was given as, for errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """One candidate's trial: everything that a fresh process needs to know, as JSON values."""

    model: Mapping[str, object]
    """Either {"path": checkpoint} or the published constructor's model arguments."""
    settings: Choice
    setup_fn: FunctionName | None
    """None: a synthetic load of ``tokens`` vectors a layer."""
    on_copy: FunctionName | None = None
    """The streamer's ``on_copy``."""
    engine: str | None = None
    """Dotted name of a module that opens what is measured, in place of LayerStreamer and setup_fn.

    A name is no import: the tuner knows nothing of engines, and its own process, which opens no
    device, never loads one. The processes that need it import the module, which has

    * ``plan_engines(path, candidates, **options)``: by candidate, the options of
      ``LayerStreamer.from_checkpoint`` that an engine with these settings would stream with, or a
      line that says why there can be none; nothing is opened;
    * ``open_workload(path, alive=, **options)``: an engine, opened. It has its ``streamer``, and
      ``run()``, which does a piece of work and returns the seconds of its parts by their names.
      ``alive()`` is to be called now and then, so that a long run is not taken for one that hangs.
      A ``setup_fn``, if there is one, is handed to it.
    """
    tokens: int = 1
    n_runs: int = 4
    """Runs of which the first is discarded."""
    sleep_seconds: float = 0.0
    cache: CacheState = "warm"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialLimits:
    """How far a trial may go before it is ended."""

    best_seconds: float | None = None
    """The best candidate's seconds a run so far."""
    margin: float = 0.1
    """A run is hopeless once its elapsed time passes best_seconds * (1 + margin)."""
    warm_up_seconds: float | None = None
    """The discarded first run of the best candidate so far (its record has it). One that takes far
    longer is hopeless, too. None: only hang_seconds ends a first run."""
    trial_seconds: float = 600.0
    """For the whole trial, from start to result."""
    hang_seconds: float = 120.0
    """For any stage (opening, setup, one run) without a word from the child."""
    max_host_bytes: int | None = None
    """Resident memory of the child and its descendants, the page cache that it maps not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """What became of one candidate."""

    settings: Choice
    ending: Ending
    detail: str = ""
    """First a line that says it all: an error, a signal's name, the limit that was passed, why it
    was pruned. Then a traceback and the end of what the candidate printed, if there is any."""
    run_seconds: tuple[float, ...] = ()
    """Of each measured run; the runs that ended before a trial was ended early are here too."""
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Of each measured run of an engine, the seconds of its parts: "prompt", until the first new
    token is there, and "decode", of the others."""
    warm_up_seconds: float = 0.0
    """Of the first run, which is discarded: what a process does only once is in it."""
    step_bytes: Mapping[str, int] = field(default_factory=dict)
    """By step, of the last pass of the last measured run (``streamer.last_pass``)."""
    stalled_seconds: Mapping[str, float] = field(default_factory=dict)
    """The same."""
    pass_seconds: float = 0.0
    """Of that pass."""
    peak_device_bytes: int = 0
    """Most memory that torch had reserved on one device."""
    peak_host_bytes: int = 0
    """Most resident memory of the trial's processes."""
    trial_seconds: float = 0.0
    """From the start of the process until it was reaped."""

    @property
    def seconds(self) -> float | None:
        """The trial's result: the median of the measured runs; None unless it ended well."""
        if self.ending != "ok":
            return None
        return median(self.run_seconds)
