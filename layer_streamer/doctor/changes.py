"""What would make a pass shorter: other settings, planned for the same machine. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..planning.budget import parse_bytes
from ..planning.layout import align_up
from ..planning.placement import Tier
from ..planning.plan import Plan
from ..planning.planner import make_plan, usable
from ..planning.settings import Settings
from .facts import notices

WORTH = 0.02
"""A change that spares less than this share is not named."""
MOST_CHANGES = 3
STEPS = 16
"""Budgets that are tried between nothing and all."""
UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


@dataclass(frozen=True, slots=True)
class Change:
    """Another setting, and what it gives."""

    option: str
    """As from_checkpoint names it."""
    value: int | str
    flag: str
    """As commands take it: "--device-budget 7GiB"."""
    more_layers: int
    """Layers more that stay where ``tier`` says."""
    tier: Tier
    unit: str
    """What ``now`` and ``then`` are: "s" a pass, or "GB" that are read or copied a pass."""
    now: float
    then: float
    text: str


@dataclass(frozen=True, slots=True)
class _Other:
    option: str
    value: int | str
    spelled: str
    plan: Plan


@dataclass(frozen=True, slots=True)
class _Replan:
    """A plan, and what it takes to make another for the same machine."""

    plan: Plan
    settings: Settings
    cached: float

    def candidates(self, option: str, value: int | str, spelled: str) -> Iterator[_Other]:
        """The plan with one option changed, if it can work."""
        changed: dict[str, Any] = {option: value}
        settings, machine = self.settings.but(**changed), self.plan.machine
        try:
            other = make_plan(
                self.plan.sizes,
                0,
                machine,
                settings,
                lambda: self.cached,
                self.plan.placement.on_host,
            )
        except ConfigError:
            return
        yield _Other(option, value, spelled, other)


def changes_of(plan: Plan, settings: Settings, cached: float) -> tuple[Change, ...]:
    """The best of the changes that are worth it, the shortest pass first.

    Of the budgets, the next step that counts, one half way and the last; nothing beyond what is
    free now.
    ``cached``: the share of the model in the page cache. Settings cast nothing (dtype is None).
    """
    replan = _Replan(plan, settings, cached)
    with notices():
        families = [
            list(_budgets(replan, "device_budget")),
            list(_budgets(replan, "host_budget")),
            list(_others(replan)),
        ]
    changes = dict[tuple[float, str], Change]()
    for family in families:
        useful = [change for change in (_change(plan, each) for each in family) if change]
        if not useful:
            continue
        best = min(useful, key=lambda change: change.then)
        middle = (best.now + best.then) / 2
        for change in (best, next(c for c in useful if c.then <= middle), useful[0]):
            changes.setdefault((change.then, change.option), change)
    ranked = sorted(changes.values(), key=lambda change: change.then)
    return tuple(ranked[:MOST_CHANGES])


def spell(nbytes: int) -> str:
    """ "7GiB", "6.25GiB", as options take it: nothing is rounded."""
    for unit, size in UNITS:
        if nbytes >= size and 4 * nbytes % size == 0:
            return f"{nbytes / size:g}{unit}"
    return str(nbytes)


def _budgets(replan: _Replan, option: str) -> Iterator[_Other]:
    """Larger budgets, the smallest first."""
    plan, settings = replan.plan, replan.settings
    asked: Mapping[str, Any] = settings.asked
    machine, whole, current = plan.machine, _whole(plan, option), asked[option]
    others = {"device_budget", "host_budget"} - {option}
    named = any(asked[name] is not None for name in others)
    # On the CPU both mean one memory: a budget that is named is the one to change.
    if machine.unified and current is None and (named or option == "device_budget"):
        return
    free = min(machine.device_free) if option == "device_budget" else machine.host_available
    room = usable(free)
    now = room if current == "auto" else parse_bytes(option, current or 0)
    step = 1 << max((min(whole, room) // STEPS).bit_length() - 1, 12)
    for budget in range(align_up(now + 1, step), min(align_up(whole, step), room) + 1, step):
        yield from replan.candidates(option, budget, spell(budget))


def _whole(plan: Plan, option: str) -> int:
    """Bytes of one memory that hold every layer."""
    count = len(plan.machine.devices)
    if plan.machine.unified:
        return sum(size.device_nbytes for size in plan.sizes)
    if option == "device_budget":
        return max(sum(size.device_nbytes for size in plan.sizes[i::count]) for i in range(count))
    slots = max((slots.total_nbytes for slots in plan.placement.host_slots), default=0)
    return sum(size.host_nbytes for size in plan.sizes) + slots * count


def _others(replan: _Replan) -> Iterator[_Other]:
    settings, plan = replan.settings, replan.plan
    if settings.asked["n_gpu"] is None and settings.num_device > 1:
        yield from replan.candidates("n_gpu", 1, "1")
    for mode in ("mapped", "direct", "buffered"):
        if mode != plan.read_mode and not (mode == "mapped" and plan.machine.unified):
            yield from replan.candidates("read_mode", mode, mode)


def _change(plan: Plan, candidate: _Other) -> Change | None:
    """None if it is not worth it."""
    other = candidate.plan
    now, then, unit = _compare(plan, other)
    if not 0 < now * (1 - WORTH) >= then:
        return None
    tier: Tier = "device" if _held(plan, other, "device") else "host"
    more = _held(plan, other, tier)
    flag = f"--{candidate.option.replace('_', '-')} {candidate.spelled}"
    verb = _verb(more, tier, len(plan.tiers), other)
    text = f"{flag} {verb}: {_numbers(then, now, unit)}"
    return Change(
        candidate.option, candidate.value, flag, more, tier, unit.split()[0], now, then, text
    )


def _held(plan: Plan, other: Plan, tier: Tier) -> int:
    """How many more layers ``other`` keeps in that tier."""
    return other.tiers.count(tier) - plan.tiers.count(tier)


def _verb(more: int, tier: Tier, total: int, other: Plan) -> str:
    place = "in memory" if other.machine.unified else f"in {tier} memory"
    if more <= 0:
        return "moves less"
    if other.tiers.count(tier) == total:
        return f"keeps all {total} layers {place}"
    return f"keeps {more} more layer{'s' if more > 1 else ''} {place}"


def _compare(plan: Plan, other: Plan) -> tuple[float, float, str]:
    """What both cost and in which unit: seconds if they are known, else the bytes that move."""
    if plan.predicted_seconds is not None and other.predicted_seconds is not None:
        return plan.predicted_seconds, other.predicted_seconds, "s"
    read = [_moved(each)[0] for each in (plan, other)]
    if any(read) or plan.machine.unified:
        return read[0], read[1], "GB read a pass"
    return _moved(plan)[1], _moved(other)[1], "GB copied a pass"


def _moved(plan: Plan) -> tuple[float, float]:
    """GB that a pass reads, and copies."""
    return plan.placement.read_bytes / 1e9, sum(plan.placement.copy_bytes) / 1e9


def _numbers(then: float, now: float, unit: str) -> str:
    """ "0.19 instead of 0.24 s", with as many digits as tell them apart."""
    # At least two digits that count; where they are the same, more.
    digits = max(2, 1 - math.floor(math.log10(now)))
    while f"{now:.{digits}f}" == f"{then:.{digits}f}":
        digits += 1
    said = f"{then:.{digits}f}" if then else "nothing"
    return f"{said} instead of {now:.{digits}f} {unit}"
