"""Facts for a report: what a model holds, which tier each layer would get and why, its seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.manifest import Manifest
from ..checkpoint.summary import kind
from ..planning.budget import format_bytes
from ..planning.placement import Slots, Tier
from ..planning.plan import Plan
from ..planning.settings import Settings
from .changes import Change, changes_of
from .facts import Group, Line

MOST_KINDS = 4
"""Ways of storing tensors that are named."""
MOST_RANGES = 3
"""Ranges of layers that are listed; more are shown layer by layer."""
MOST_MARKS = 200
"""Layers that are shown one by one."""
MARKS: Mapping[Tier, str] = {"device": "D", "host": "h", "disk": "."}


@dataclass(frozen=True, slots=True)
class TierFact:
    """The layers of one tier."""

    tier: Tier
    layers: tuple[int, ...]
    nbytes: int
    """As stored."""
    why: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model and its plan."""

    path: str
    format: str
    num_files: int
    nbytes: int
    layer_nbytes: tuple[int, int]
    """The smallest layer and the largest."""
    num_layers: int
    stored: dict[str, int]
    """How many of the layers' tensors are stored in each way."""
    tiers: tuple[TierFact, ...]
    unified: bool
    """True if the device computes in host memory (the CPU)."""
    slots: tuple[Slots, ...]
    """Of each device."""
    plan: dict[str, Any]
    """As ``plan`` prints it."""
    rates: dict[str, float]
    """Bytes a second that the prediction went by."""
    changes: tuple[Change, ...]
    """What would make a pass shorter, the best first."""


def look_at_model(manifest: Manifest, plan: Plan, settings: Settings, cached: float) -> ModelFacts:
    """What there is to be said of a plan. ``cached``: the model's share in the page cache."""
    kinds = Counter(kind(spec) for layer in manifest.layers for spec in layer.tensors.values())
    sizes = [layer.nbytes for layer in manifest.layers]
    return ModelFacts(
        path=str(manifest.path),
        format=manifest.format,
        num_files=len(manifest.files),
        nbytes=manifest.nbytes,
        layer_nbytes=(min(sizes), max(sizes)),
        num_layers=manifest.num_layers,
        stored=dict(kinds.most_common()),
        tiers=_tiers(plan, settings),
        unified=plan.machine.unified,
        slots=plan.placement.device_slots,
        plan=plan.document(),
        rates=dict(plan.limits),
        changes=changes_of(plan, settings, cached),
    )


def describe_model(facts: ModelFacts) -> tuple[Group, Group]:
    """For the screen: the model, and what would change its seconds."""
    low, high = (nbytes / 1e6 for nbytes in facts.layer_nbytes)
    each = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    files = f"{facts.num_files} file{'s' if facts.num_files > 1 else ''}"
    text = (
        f"{facts.num_layers} layers of {each} MB; {facts.nbytes / 1e9:.3f} GB in {files}, "
        f"{facts.format}"
    )
    lines = [Line("layers", text), Line("stored as", _kinds(facts))]
    for tier in facts.tiers:
        lines.append(Line(_place(facts, tier.tier), _tier_text(tier)))
    if any(len(spans(tier.layers)) > MOST_RANGES for tier in facts.tiers):
        lines.append(Line("by layer", _map(facts)))
    lines.append(Line("takes", _memory(facts)))
    lines.append(Line("a pass", _pass_text(facts)))
    title = f"model, on {', '.join(facts.plan['devices'])}"
    changes = tuple(Line("", change.text) for change in facts.changes)
    if not changes:
        changes = (Line("", "nothing that this machine has room for"),)
    return Group(title, tuple(lines)), Group("what would change that", changes)


_PLACES: Mapping[Tier, str] = {"device": "on the device", "host": "on the host", "disk": "on disk"}


def _place(facts: ModelFacts, tier: Tier) -> str:
    return "in memory" if facts.unified and tier == "device" else _PLACES[tier]


def _tiers(plan: Plan, settings: Settings) -> tuple[TierFact, ...]:
    found = []
    order: tuple[Tier, ...] = ("device", "host", "disk")
    for tier in order:
        layers = tuple(i for i, placed in enumerate(plan.tiers) if placed == tier)
        if layers:
            nbytes = sum(plan.sizes[i].read_nbytes for i in layers)
            found.append(TierFact(tier, layers, nbytes, _why(tier, plan, settings)))
    return tuple(found)


def _why(tier: Tier, plan: Plan, settings: Settings) -> str:
    everything = set(plan.tiers) == {tier}
    largest = max(plan.placement.device_slots, key=lambda slots: slots.total_nbytes)
    if tier == "device":
        name, budget = "--device-budget", settings.asked["device_budget"]
        if plan.machine.unified:
            name, budget = _unified_budget(settings)
        if everything:
            return f"{name} {_spelled(budget)} holds them all"
        return f"as many as {name} {_spelled(budget)} holds beside {_slots(largest)}"
    if tier == "host":
        if plan.read_mode == "mapped":
            return f"the files' own pages, page-locked, copied each pass: {plan.reason}"
        budget = _spelled(settings.asked["host_budget"])
        held = "holds them all" if everything else "holds"
        return f"copied each pass; as many as --host-budget {budget} {held}"
    reads = f"read each pass, {plan.read_mode}: {plan.reason}"
    if settings.asked["device_budget"] is None and settings.asked["host_budget"] is None:
        return f"{reads}; no budget is named, so nothing stays"
    return f"{reads}; the budgets hold no more beside {_slots(largest)}"


def _unified_budget(settings: Settings) -> tuple[str, int | str | None]:
    """On the CPU both budgets mean one memory."""
    device, host = settings.asked["device_budget"], settings.asked["host_budget"]
    if host is None:
        return "--device-budget", device
    if device is None:
        return "--host-budget", host
    return "the smaller of both budgets,", f"{device} or {host},"


def _slots(slots: Slots) -> str:
    return f"{slots.count} slot{'s' if slots.count != 1 else ''} of {format_bytes(slots.nbytes)}"


def _spelled(budget: int | str | None) -> str:
    return format_bytes(budget) if isinstance(budget, int) else str(budget)


def _kinds(facts: ModelFacts) -> str:
    listed = [f"{count} {name}" for name, count in list(facts.stored.items())[:MOST_KINDS]]
    more = len(facts.stored) - MOST_KINDS
    return ", ".join([*listed, *([f"and {more} more kinds"] if more > 0 else [])])


def _tier_text(tier: TierFact) -> str:
    count, ranges = len(tier.layers), spans(tier.layers)
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    which = f" ({listed})" if len(ranges) <= MOST_RANGES else ""
    plural = "s" if count > 1 else ""
    return f"{count} layer{plural}{which}, {tier.nbytes / 1e9:.3f} GB: {tier.why}"


def _memory(facts: ModelFacts) -> str:
    plan, parts = facts.plan, []
    for device, nbytes, slots in zip(
        plan["devices"], plan["device_bytes"], facts.slots, strict=True
    ):
        held = f" ({_slots(slots)})" if slots.count else ""
        parts.append(f"{format_bytes(nbytes)} of {device}{held}")
    if plan["host_bytes"]:
        kind = "page cache" if plan["read_mode"] == "mapped" else "host memory"
        parts.append(f"{format_bytes(plan['host_bytes'])} of {kind}")
    return ", ".join(parts)


def _pass_text(facts: ModelFacts) -> str:
    predicted = facts.plan["predicted"]
    if predicted is None:
        return "unknown: no limits on record here; `layer-streamer probe MODEL` measures them"
    if predicted["bound_by"] == "resident":
        return "no time for moving bytes: everything is where it is used"
    rates = [f"{name} {rate / 1e9:.2f} GB/s" for name, rate in facts.rates.items()]
    measured = f"; measured here: {', '.join(rates)}" if rates else ""
    moved = f"read {predicted['read_bytes'] / 1e9:.2f} GB"
    if not facts.unified:
        moved += f", copy {predicted['copy_bytes'] / 1e9:.2f} GB"
    seconds, bound_by = predicted["seconds"], predicted["bound_by"]
    return f"{seconds:.3g} s, bound by {bound_by} ({moved}{measured})"


def _map(facts: ModelFacts) -> str:
    """A mark for each layer, in tens."""
    marks = "".join(MARKS[tier] for tier in facts.plan["tiers"][:MOST_MARKS])
    tens = " ".join(marks[i : i + 10] for i in range(0, len(marks), 10))
    more = " ..." if facts.num_layers > MOST_MARKS else ""
    legend = ", ".join(f"{MARKS[tier.tier]} {_place(facts, tier.tier)}" for tier in facts.tiers)
    return f"{tens}{more} ({legend})"


def spans(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending indices as (first, last) of neighbours."""
    found = list[tuple[int, int]]()
    for index in indices:
        if found and index == found[-1][1] + 1:
            found[-1] = (found[-1][0], index)
        else:
            found.append((index, index))
    return found
