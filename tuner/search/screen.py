"""Which candidates can work within the bounds, from the plan: the others are never started."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ...checkpoint.manifest import Manifest
from ...errors import ConfigError
from ...planning import planner
from ...planning.batches import Batches, plan_batches
from ...planning.budget import format_bytes
from ...planning.host_layers import plan_with
from ...planning.layout import plan_steps
from ...planning.plan import Machine, Plan
from ...planning.planner import make_plan, measure_steps
from ...planning.settings import Settings
from ...transport.schedule import lay_out_all
from ..trials.record import Choice, TrialRecord
from .space import Bounds

Engines = Sequence[Mapping[str, Any] | str]
"""By candidate, the streamer's options in an engine with these settings, or why there is none."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A candidate that can work, with the plan that it would be opened with."""

    settings: Choice
    plan: Plan
    batches: Batches
    slots: Mapping[str, int]
    """By pool ("device", "pinned", "host", "ring"), the slots of the first device."""
    engine: tuple[Any, ...] = ()
    """What else an engine may do differently: it shares its budgets out with what is its own."""

    @property
    def has_reads(self) -> bool:
        """True if anything is read during a pass."""
        return "disk" in self.plan.tiers

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for candidates that are opened in the same way on this machine."""
        place, plan = self.plan.placement, self.plan
        readers = (plan.read_threads, plan.read_chunk) if self.has_reads else None
        host = {name: count for name, count in self.slots.items() if name != "device"}
        mode = plan.read_mode if self.has_reads or plan.read_mode == "mapped" else ""
        return (
            place.tiers, place.on_host, place.device_slots, tuple(sorted(host.items())),
            self.batches, mode, readers, self.engine,
        )  # fmt: skip


@dataclass(slots=True)
class Screened:
    """What has become of all candidates."""

    kept: list[Planned] = field(default_factory=list)
    pruned: list[TrialRecord] = field(default_factory=list)
    """One record each, with the reason in ``detail``."""
    num_equal: int = 0
    """Candidates that would be opened in the same way as one that was kept."""


class Screener:
    """Plans candidates for one checkpoint on one machine; no file and no device is opened.

    ``fixed``: settings that are no candidate's own ("device", "dtype", "tail" and such).
    """

    def __init__(
        self, manifest: Manifest, machine: Machine, fixed: Mapping[str, Any], bounds: Bounds
    ) -> None:
        self._machine, self._fixed, self._bounds = machine, dict(fixed), bounds
        dtype = fixed.get("dtype")
        chosen = {name: fixed[name] for name in ("tail", "layers") if name in fixed}
        steps = plan_steps(manifest, **chosen)
        self._layers, self._num_layers = tuple(s.layer_idx for s in steps), manifest.num_layers
        layouts = lay_out_all(steps, unified=machine.unified, dtype=dtype)
        self._sizes = measure_steps(steps, layouts, dtype)
        self._scratch = max(layout.scratch_nbytes for layout in layouts)

    def screen(self, candidates: Sequence[Choice], engines: Engines | None = None) -> Screened:
        """Sort out what cannot work, exceeds the bounds, or is the same as one before.

        ``engines``: by candidate, what it makes of the streamer's settings, where an engine is what
        is tuned, or a line that refuses it. Of memory only the streamer's part is looked at then:
        what the engine itself takes at most is known, not what it takes at least.
        """
        screened, seen = Screened(), set[tuple[Any, ...]]()
        with _quiet():
            for number, settings in enumerate(candidates):
                try:
                    planned = self._plan(settings, None if engines is None else engines[number])
                    why = self._excess(planned.plan)
                except ConfigError as error:
                    why = str(error)
                if why:
                    record = TrialRecord(settings=settings, ending="pruned", detail=why)
                    screened.pruned.append(record)
                elif planned.signature in seen:
                    screened.num_equal += 1
                else:
                    seen.add(planned.signature)
                    screened.kept.append(planned)
        return screened

    def _plan(self, candidate: Choice, engine: Mapping[str, Any] | str | None) -> Planned:
        if isinstance(engine, str):
            raise ConfigError(engine)
        chosen = candidate if engine is None else engine
        settings = Settings(**{**self._fixed, **chosen})
        make = partial(make_plan, self._sizes, self._scratch, self._machine, settings, lambda: 1.0)
        plan = plan_with(make, settings.asked["host_layers"], self._layers, self._num_layers)
        plan = replace(plan, layers=self._layers)
        maps = plan.read_mode == "mapped" or set(plan.tiers) == {"device"}  # or has nothing to map
        if settings.read_mode == "mapped" and not (self._machine.unified or maps):
            raise ConfigError("read_mode='mapped': the device cannot copy from mapped files")
        slots = {"device": plan.placement.device_slots[0].count}
        if "disk" in plan.tiers and not self._machine.unified:
            if settings.through_ring:
                slots["ring"] = plan.placement.host_slots[0].count
            elif settings.num_pinned:
                slots["pinned"] = settings.num_pinned + 1
            if settings.num_pageable:
                slots["host"] = settings.num_pageable + 1
        counts = slots if slots["device"] else {}
        batches = plan_batches(settings, counts, unified=self._machine.unified)
        own = ("device_budget", "host_budget") if engine is not None else ()
        budgets = tuple(candidate.get(name) for name in own)
        return Planned(candidate, plan, batches, slots, budgets)

    def _excess(self, plan: Plan) -> str:
        """Why the plan takes more than is granted, or more than there is; "" if it does not.

        Only what is certain counts: a process takes more than its plan, never less.
        """
        place = plan.placement
        host = self._machine.host_nbytes(place)
        why = self._bounds.excess(max(place.device_bytes), host, "the plan takes")
        if why or self._machine.unified:
            return why
        for used, free in zip(place.device_bytes, self._machine.device_free, strict=True):
            if used > free:
                return f"the plan takes {format_bytes(used)} of a device with {format_bytes(free)}"
        return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the planner's warnings about hundreds of plans that nobody has asked for."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    loggers = (planner.logger, logging.getLogger("layer_streamer.planning.batches"))
    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)
