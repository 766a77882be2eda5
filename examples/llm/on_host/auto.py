"""How many layers are computed in host memory, where that was left to the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from layer_streamer import Plan

from ..memory.footprint import Footprint
from ..memory.memory_plan import HostChoice, MemoryPlan
from ..memory.placing import devices_of
from ..memory.plan import Planner
from ..memory.wishes import Wishes
from .products import measure_rates

if TYPE_CHECKING:
    from ..opening import Model

AUTO = "auto"


def plan_with_host_layers(model: Model, footprint: Footprint, wishes: Wishes) -> MemoryPlan:
    """The plan, with as many host layers as ``wishes`` have; for "auto" as many as end together
    with those that stream, by how fast the processor multiplies the model's own formats. Errors
    are those of ``Planner.make``, and of the measurement: StreamerError."""
    options = wishes.options
    if options.get("host_layers") != AUTO or options.get("experts") == "demand":
        return Planner(model.manifest, footprint, wishes).make()

    def make(count: int) -> MemoryPlan:
        # A number, whose layers are the same whatever else is planned with it.
        asked = replace(wishes, options={**options, "host_layers": count})
        return Planner(model.manifest, footprint, asked).make()

    plan = make(0)
    if plan.streamer.machine.unified:
        return plan
    idle = _idle(plan.streamer, footprint)
    if idle:
        return replace(plan, host_choice=HostChoice(idle))
    devices, cast = devices_of(options), options["dtype"]
    rates = measure_rates(model.names, model.manifest, model.config, devices, cast)
    count = plan.streamer.balanced(rates.products, rates.links, model.config.num_layers)
    plan = make(count) if count else plan
    machine = plan.streamer.machine
    known = replace(machine.rates, products=rates.products, beside=rates.links)
    streamer = replace(plan.streamer, machine=replace(machine, rates=known))
    choice = HostChoice("", rates.kinds, sum(rates.links))
    return replace(plan, streamer=streamer, host_choice=choice)


def _idle(streamer: Plan, footprint: Footprint) -> str:
    """Why the processor is to take nothing off a link; "": it may."""
    for name, asked in (
        ("reproducible", footprint.needs.reproducible),
        ("kv_int8", footprint.needs.int8),
    ):
        if asked:
            return f"they do not go with {name}=True"
    if "disk" in streamer.tiers:
        return "what holds passes up is the disk"
    return "" if "host" in streamer.tiers[: footprint.config.num_layers] else "no layer streams"
