"""One tune from its model and options: look at the machine, screen, race, keep the results."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.manifest import Manifest
from ..errors import TuneError
from ..measuring.rawspeed import packed_share
from ..modules.tuning import Streamed
from ..planning.budget import parse_bytes
from ..planning.plan import Machine
from ..planning.settings import Settings
from .fingerprint import describe_tune, digest
from .model import Model
from .options import TuneOptions
from .progress import TuneProgress, first_line, format_seconds
from .results import ResultsFile, cache_folder, lock
from .search import space
from .search.host_layers import around, counts_around
from .search.predict import Costs
from .search.race import Race, enter
from .search.screen import Engines, Screened, Screener
from .search.search import RunTrial, Search, endings
from .search.space import Bounds, Values
from .survey import Survey, ask_engine, ask_streamed, take_survey
from .trials.record import Choice, TrialRecord, TrialSpec
from .trials.trial import run_trial

logger = logging.getLogger(__name__)

AskEngine = Callable[[TrialSpec, Sequence[Choice]], Engines]
HOST_MARGIN = 256 << 20
"""What of a grant of host memory is left to a process beside the streamer and the libraries."""


class Session:
    """What LayerStreamerTuner does. Thread rules: one thread."""

    def __init__(
        self, model: Model, values: Mapping[str, Values | None], options: TuneOptions
    ) -> None:
        self.axes = self._given = space.check_axes(values)
        self._model, self._options = model, options
        self._screened = Screened()
        self._search: Search | None = None
        self._look: Callable[[Any, Path], Survey] = take_survey
        self._ask_engine: AskEngine = ask_engine
        self._ask_streamed: Callable[[TrialSpec], Streamed] = ask_streamed
        self._run_trial: RunTrial = run_trial
        self._now = time.monotonic

    @property
    def title(self) -> str:
        """What the report is called."""
        arguments = self._model.arguments
        name = Path(arguments.get("path", arguments.get("model_dir", ""))).name
        setup_fn = self._model.setup_fn
        return f"Tune of {name or getattr(setup_fn, '__name__', '')}"

    @property
    def best(self) -> TrialRecord | None:
        search = self._search
        return (
            None if search is None or search.race.best is None else search.records[search.race.best]
        )

    @property
    def num_untried(self) -> int:
        search = self._search
        return len(search.candidates) - len(search.records) if search is not None else 0

    def records(self) -> list[TrialRecord]:
        """Of all that is known of, in the order in which it was settled, the pruned ones last."""
        found = list(self._search.records.values()) if self._search is not None else []
        return [*found, *self._screened.pruned]

    def tune(self) -> dict[str, int | str | None]:
        """Search, and return the best candidate's settings. TuneError, ConfigError."""
        self._search, self._screened = None, Screened()
        spec = self._model.spec(self._options)
        manifest = None if self._model.streamed else self._model.read_manifest()
        with _only_tune():
            if manifest is None:
                found = self._ask_streamed(spec)
                manifest, self._ask_engine = found.manifest, partial(plan_streamed, found)
            if self._model.engine is None and self._model.setup_fn is None and spec.tokens:
                _warn_of_packed(manifest)
            survey = self._look(spec.model.get("device"), next(iter(manifest.files)))
            search = self._search = self._prepare(manifest, survey, spec)
            self._run(search, describe_tune(spec, manifest, survey.identity))
        best = self._conclude()
        if self._model.engine is not None:
            return dict(best.settings)  # what is not named there is the engine's to choose
        return space.complete(best.settings, self.axes)

    def _prepare(self, manifest: Manifest, survey: Survey, spec: TrialSpec) -> Search:
        """A search among the candidates that can work. TuneError if there is none."""
        options, machine = self._options, survey.machine
        unified = machine.unified
        bounds = Bounds(options.granted("max_device_bytes"), options.granted("max_host_bytes"))
        host = bounds.max_host_bytes
        if host is not None:
            host = max(host - survey.baseline_bytes - HOST_MARGIN, 0) or None
        defaults: dict[str, Values] = {}
        if "path" in self._model.arguments or self._model.engine is not None:
            grants = replace(bounds, max_host_bytes=host)
            defaults = space.default_axes(grants, survey.identity.num_cores, unified=unified)
            screener = partial(Screener, manifest, machine, bounds=bounds)
            counts = () if unified else self._host_layers(defaults, spec, manifest, screener)
            if any(counts):
                defaults = space.with_host_layers(defaults, counts)
        self.axes = space.check_axes({**defaults, **self._given})
        num_first = self._screen(manifest, machine, spec, bounds)
        kept = self._screened.kept
        if not kept:
            raise TuneError(f"no candidate can work: {endings(self._screened.pruned)}")
        costs = Costs(options.cache, survey.limits, unified)
        entries = [enter(planned) for planned in kept]
        race = Race(entries, costs, options.strategy, options.tolerance, num_first)
        settings = [planned.settings for planned in kept]
        return Search(race, settings, spec, options, bounds, unified, self._run_trial, self._now)

    def _host_layers(
        self,
        axes: Mapping[str, Values],
        spec: TrialSpec,
        manifest: Manifest,
        screener: Callable[..., Screener],
    ) -> Sequence[int]:
        """Numbers of host layers to try, by what a pass streams with the budgets that are granted;
        none where nobody measures what a processor does with them: see docs/tuning.md."""
        model, count = self._model, manifest.num_layers
        measured = model.setup_fn is None and self._options.tokens and packed_share(manifest) <= 0.5
        demand = model.arguments.get("experts") == "demand"  # they come to the device alone
        named = "host_layers" in self._given
        if named or model.streamed or demand or (model.engine is None and not measured):
            return ()
        budgets = {name: axes[name][0] for name in ("device_budget", "host_budget")}
        # An engine has a tail of its own, whatever is named.
        own = model.fixed if model.engine is None else {}
        kept = screener(fixed=own).screen([budgets]).kept
        counts = counts_around(kept[0].plan, count) if kept else ()
        if model.engine is None or not any(counts):
            return counts
        # It knows what its own kernels multiply, and how fast.
        (plan,) = self._ask_engine(spec, [{**budgets, "host_layers": "auto"}])
        chosen = 0 if isinstance(plan, str) else plan.get("host_layers")
        return around(chosen, count) if isinstance(chosen, int) else counts

    def _screen(self, manifest: Manifest, machine: Machine, spec: TrialSpec, bounds: Bounds) -> int:
        """Find the candidates that can work; how many of them, the first ones, come first."""
        unified, engine = machine.unified, self._model.engine is not None
        first = space.engine_defaults(self.axes) if engine else ()
        found = space.candidates(self.axes, unified=unified, first=first)
        plans, fixed = None, self._model.fixed
        if engine:
            plans = self._ask_engine(spec, found)
            plan = next((plan for plan in plans if not isinstance(plan, str)), {})
            fixed = {name: plan[name] for name in ("device", "dtype", "tail") if name in plan}
        self._screened = Screener(manifest, machine, fixed, bounds).screen(found, plans)
        forms = [space.plain(settings, unified=unified) for settings in first]
        return sum(planned.settings in forms for planned in self._screened.kept)

    def _run(self, search: Search, description: dict[str, Any]) -> None:
        options, fingerprint = self._options, digest(description)
        given = options.results_path
        path = cache_folder() / f"{fingerprint}.jsonl" if given is None else Path(given)
        file = ResultsFile(path, fingerprint, description)
        progress = TuneProgress(options, self._now)
        try:
            progress.note(
                f"{len(search.candidates)} candidates; {self._screened.num_equal} more are the "
                f"same, {len(self._screened.pruned)} cannot work; results: {file.path}"
            )
            search.reuse(file.results)
            reused = search.num_reused
            if reused:
                progress.note(f"{reused} of them are on record already")
            search.run(file, progress)
            if reused and reused == len(search.records):
                logger.info("all %d results were on record in %s", reused, file.path)
                progress.note("nothing is left to try: all results were on record")
            elif self.best is not None and self.num_untried and not search.out_of_time:
                progress.note(
                    f"{len(search.records)} of {len(search.candidates)} tried: none of the "
                    f"others can be better by more than {options.tolerance:.0%}"
                )
            if self._model.engine is not None and self.best is not None:
                progress.note(self._compare(self.best))
        finally:
            progress.close()
            file.close()

    def _compare(self, best: TrialRecord) -> str:
        """The engine's default settings beside the best ones, as both were measured."""
        default = next((record for record in self.records() if not record.settings), None)
        took = "not tried"
        if default is not None:
            took = f"{default.seconds:.4f} s" if default.seconds is not None else default.ending
            # Why it cannot be the best, if that is so.
            took += f" ({first_line(default.detail)})" if default.detail else ""
        return f"default settings: {took}; best: {best.seconds:.4f} s"

    def _conclude(self) -> TrialRecord:
        search, best = self._search, self.best
        assert search is not None
        if best is None:
            well = [record for record in search.records.values() if record.ending == "ok"]
            found = endings([*search.records.values(), *self._screened.pruned])
            if search.out_of_time:
                limit = format_seconds(self._options.max_seconds or 0)
                raise TuneError(
                    f"max_seconds={self._options.max_seconds}: no candidate had a result within "
                    f"{limit}" + (f" ({found})" if found else "")
                )
            kind = "exceeded the memory granted or failed" if well else "failed"
            raise TuneError(f"every candidate {kind}: {found}")
        if search.out_of_time:
            logger.warning(
                "max_seconds=%s are over: the best so far is returned, %d of %d candidates were "
                "not tried", self._options.max_seconds, self.num_untried,
                len(search.candidates),
            )  # fmt: skip
        return best


def plan_streamed(found: Streamed, spec: TrialSpec, candidates: Sequence[Choice]) -> Engines:
    """By candidate, what a model's largest sequence of blocks is opened with: of a budget it has
    what is not taken beside it, but its slots at least, for a head or a table gives way where there
    is no room. A device with memory of its own has a budget where none is named."""
    device = {name: spec.model[name] for name in ("device",) if name in spec.model}
    plans = list[dict[str, Any] | str]()
    for candidate in candidates:
        if candidate.get("host_layers"):
            plans.append("host_layers=: not with a module, whose forward has its own order")
            continue
        plan: dict[str, Any] = {**device, **candidate}
        reserve: Any = spec.model.get("reserve_bytes")
        if plan.get("device_budget") is None and not found.unified:
            plan["device_budget"] = "auto"
        budget = plan.get("device_budget")
        if budget == "auto" and reserve is None:
            reserve = found.reserve_nbytes
        if budget is not None:
            taken = found.taken_nbytes + parse_bytes("reserve_bytes", reserve or 0)
            if budget != "auto":
                slots = (Settings(**plan).num_device + 1) * found.slot_nbytes
                taken = min(taken, max(parse_bytes("device_budget", budget) - slots, 0))
            plan["reserve_bytes"] = taken
        plans.append(plan)
    return plans


def _warn_of_packed(manifest: Manifest) -> None:
    """Say so where the stand-in has next to nothing to compute with."""
    share = packed_share(manifest)
    if share > 0.5:
        logger.warning(
            "%.0f %% of the layers' bytes are packed, and the stand-in for the compute does no "
            "matrix work on them: tune the engine (--engine, for_engine), or give a setup_fn",
            100 * share,
        )


@contextmanager
def _only_tune() -> Iterator[None]:
    """One tune at a time: two would measure each other. ConfigError if there is another."""
    try:
        path = cache_folder() / "lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        logger.warning("%s; another tune at the same time would not be seen", error)
        yield
        return
    try:
        lock(handle, "tune()")
        yield
    finally:
        os.close(handle)
