"""Searches without processes: machines made up, trials simulated, costs without noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layer_streamer import LayerStreamerTuner
from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.machine.identity import MachineIdentity
from layer_streamer.planning.placement import Rates
from layer_streamer.planning.plan import Machine
from layer_streamer.tuner.search.predict import MEMCPY_RATE, Class, Costs, Work
from layer_streamer.tuner.search.race import Entry, Race
from layer_streamer.tuner.search.screen import Screener
from layer_streamer.tuner.search.space import Bounds, candidates
from layer_streamer.tuner.survey import Survey
from layer_streamer.tuner.trials.record import Choice, TrialLimits, TrialRecord, TrialSpec

GIB = 1 << 30
MODEL = Path("/nowhere/model")


def machine(*, unified: bool = True, host: int = 64 * GIB, device: int = 8 * GIB) -> Machine:
    return Machine(
        devices=("cpu",) if unified else ("cuda:0",),
        unified=unified,
        maps_files=not unified,
        device_free=(host if unified else device,),
        host_available=host,
        rates=Rates(None, (None,)),
    )


def survey_of(found: Machine) -> Callable[[Any, Path], Survey]:
    identity = MachineIdentity("made up", 8, (), None, "0")
    return lambda device, path: Survey(found, identity, None, 0)


class Simulation:
    """run_trial() for candidates whose runs take ``cost(settings)`` seconds, without noise.

    Runs that pass the limits are ended as the real one ends them.
    """

    def __init__(self, cost: Callable[[Mapping[str, Any]], float | str]) -> None:
        self.cost = cost
        self.started: list[Mapping[str, Any]] = []
        self.limits: list[TrialLimits] = []

    def __call__(
        self, spec: TrialSpec, limits: TrialLimits, *, on_event: Any = None
    ) -> TrialRecord:
        self.started.append(spec.settings)
        self.limits.append(limits)
        seconds = self.cost(spec.settings)
        if isinstance(seconds, str):
            return TrialRecord(settings=spec.settings, ending=seconds, detail="as it was told")  # type: ignore[arg-type]
        best = limits.best_seconds
        if best is not None and seconds > best * (1 + limits.margin):
            return TrialRecord(settings=spec.settings, ending="slower")
        if spec.n_runs * seconds > limits.trial_seconds:
            return TrialRecord(settings=spec.settings, ending="timed out")
        return TrialRecord(
            settings=spec.settings,
            ending="ok",
            run_seconds=(seconds,) * (spec.n_runs - 1),
            trial_seconds=spec.n_runs * seconds,
        )


def simulated(tuner: LayerStreamerTuner, cost: Any, found: Machine | None = None) -> Simulation:
    """Let ``tuner`` search a simulated machine; the simulation, to see what was started."""
    simulation = cost if isinstance(cost, Simulation) else Simulation(cost)
    session = tuner._session
    session._run_trial = simulation
    session._look = survey_of(found or machine())
    return simulation


def screener(path: Path, found: Machine, bounds: Bounds | None = None, **fixed: Any) -> Screener:
    fixed["device"] = "cpu" if found.unified else "cuda:0"
    return Screener(read_manifest(path), found, fixed, bounds or Bounds())


def all_candidates(axes: Mapping[str, Sequence[Any]], *, unified: bool) -> list[Choice]:
    return candidates(axes, unified=unified)


def run_race(race: Race, costs: Sequence[float], margin: float | None = 0.1) -> list[int]:
    """Run a race over candidates that take ``costs`` seconds; the order in which it tried them.

    ``margin``: slower ones are ended, so that nothing but that is known of them.
    """
    order = []
    while (index := race.next()) is not None:
        order.append(index)
        assert len(order) <= len(costs), "a candidate was tried twice"
        best = race.best_seconds
        if margin is not None and best is not None and costs[index] > best * (1 + margin):
            race.tell_slower(index, best * (1 + margin))
        else:
            race.tell(index, TrialRecord(settings={}, ending="ok", run_seconds=(costs[index],)))
    return order


def entry(features: Mapping[str, Any], predicted: float, floor: float = 0.0) -> Entry:
    """One whose run takes so many seconds by NO_COSTS, ``floor`` of them, at least, for copies."""
    memcpy = (predicted - floor) * MEMCPY_RATE
    return Entry(features, Work(0, memcpy, floor, 0, READS, COPIES, (0, 0, 0), jitter=0))


READS: Class = ("read", "direct", 1, 1, False)
COPIES: Class = ("copy", "pinned", 0, 0, False)
NO_COSTS = Costs("warm", None, False, {COPIES: 1.0}, compute_seconds=0.0)
"""A byte is copied in a second; nothing else is known."""
