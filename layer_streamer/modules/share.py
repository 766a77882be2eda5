"""One budget for several streamers: what each may hold on the devices. Reads headers only.

What is counted is counted by memory: that of each device, or the one that several CPUs share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import add, sub
from typing import Any, TypeAlias

from ..checkpoint.manifest import Manifest
from ..errors import ConfigError
from ..planning.budget import format_bytes, parse_bytes
from ..planning.options import MAX_EXPERT_SLOTS, Bytes, Options
from ..planning.plan import Plan
from ..planning.planner import usable
from ..preview import plan_checkpoint
from ..streamer import LayerStreamer

DEFAULT_RESERVE = 2 << 30
"""Bytes of device memory that activations and caches get beside an "auto" budget, where nobody
says more: what somebody else's model takes cannot be known."""

Amount: TypeAlias = tuple[int, ...]
"""Bytes, by memory."""


@dataclass(frozen=True, slots=True)
class Part:
    """What gets a streamer of its own, and what it needs."""

    manifest: Manifest
    options: Options
    """How it is opened; budgets are those of all parts."""
    plan: Plan
    """Without any budget."""
    whole: Amount
    """With all of it resident."""
    slots: Amount
    """With as many slots as asked for."""
    least: Amount
    """With as few as it can have."""
    host_nbytes: int
    """Host memory that its slots there take; it counts where that has a budget."""


def part_of(manifest: Manifest, options: Options) -> Part:
    """The part that streams ``manifest``. Errors: those of ``from_checkpoint``."""
    bare = Options(**{**options, "device_budget": None, "host_budget": None})
    every = 0  # bytes of slots for as many experts as may be on the device
    if options.get("experts") == "demand":
        count = options.get("expert_slots")
        most = Options(**{**bare, "expert_slots": count or MAX_EXPERT_SLOTS})
        every = plan_checkpoint(manifest, **most).expert_bytes
        # Where nobody says how many, what the budget leaves: one will do.
        bare = Options(**{**bare, "expert_slots": count or 1})
    plan = plan_checkpoint(manifest, **bare)
    least = plan
    if options.get("n_gpu") is None:  # else it has what was asked for, or is refused
        pools = {name: options.get(name) or 0 for name in ("n_cpu_pinned", "n_cpu")}
        least = plan_checkpoint(manifest, **Options(**{**bare, "n_gpu": 1, **pools}))  # type: ignore[typeddict-item]
    memories = len(amount_of(plan))
    dense = tuple(sum(s.device_nbytes for s in plan.sizes[d::memories]) for d in range(memories))
    read = plan
    if options.get("host_budget") is not None and not plan.machine.unified:
        read = plan_checkpoint(manifest, **Options(**{**bare, "read_mode": "buffered"}))
    return Part(
        manifest=manifest,
        options=options,
        plan=plan,
        whole=(dense[0] + every, *dense[1:]),
        slots=_beside_experts(plan, dense),
        least=_beside_experts(least, dense),
        host_nbytes=sum(slots.total_nbytes for slots in read.placement.host_slots),
    )


def amount_of(plan: Plan) -> Amount:
    """What slots, also those of experts, and resident layers take of each memory."""
    first, *others = plan.placement.device_bytes
    taken = (first + plan.expert_bytes, *others)
    return (sum(taken),) if plan.machine.unified else taken


def _beside_experts(plan: Plan, dense: Amount) -> Amount:
    """What a plan takes: of layers no more than all of them, ``dense``."""
    experts = (plan.expert_bytes, *[0] * (len(dense) - 1))
    return total([tuple(map(min, map(sub, amount_of(plan), experts), dense))], experts)


def total(amounts: Iterable[Amount], zero: Amount) -> Amount:
    """All of them together."""
    for amount in amounts:
        zero = tuple(map(add, zero, amount))
    return zero


def budget_of(part: Part, reserve: int) -> Amount | None:
    """What weights may take: the ``device_budget``, less the ``reserve`` that is the caller's.

    One of "auto", or none on a device with memory of its own, is what is free less a margin. Where
    CPUs compute, ``host_budget`` is one of the same memory. None: there is no limit, and nothing is
    resident.
    """
    machine, options = part.plan.machine, part.options
    free = (machine.host_available,) if machine.unified else machine.device_free
    limits = []
    for name in ("device_budget", "host_budget") if machine.unified else ("device_budget",):
        asked: Any = options.get(name)
        if asked is None and machine.unified:
            continue
        own = reserve if name == "device_budget" else 0
        for_all = None if asked in (None, "auto") else parse_bytes(name, asked)
        limit = map(usable, free) if for_all is None else [for_all] * len(free)
        limits.append(tuple(max(some - own, 0) for some in limit))
    return min(limits, default=None)


def fits(
    parts: Sequence[Part], budget: Amount | None, kept: Amount, *, fewest: bool = False
) -> bool:
    """True if the parts' slots, or the ``fewest`` that they can have, are within the budget beside
    what is ``kept``."""
    if budget is None:
        return True
    needs = total([part.least if fewest else part.slots for part in parts], kept)
    return all(map(int.__le__, needs, budget))


def open_all(parts: Sequence[Part], budget: Amount | None, kept: Amount) -> list[LayerStreamer]:
    """A streamer for each part, all within the budgets, which the first fill first.

    ``kept`` is taken by what is in none of them. Errors: ConfigError if the slots of all do not
    fit; those of ``from_checkpoint``. None is left open.
    """
    needs = [part.slots for part in parts]
    if not fits(parts, budget, kept):
        needs = [part.least for part in parts]
        if not fits(parts, budget, kept, fewest=True):
            raise refusal(parts, budget or (), kept)
    host = _host_budget(parts)
    opened: list[LayerStreamer] = []
    try:
        for i, part in enumerate(parts):
            share = _share(budget, total(needs[i + 1 :], kept))
            if host is not None:
                later = sum(other.host_nbytes for other in parts[i + 1 :])
                share["host_budget"] = max(host - later, 0)
            streamer = LayerStreamer.from_checkpoint(
                part.manifest, **Options(**{**part.options, **share})
            )
            opened.append(streamer)
            kept = total([amount_of(streamer.plan)], kept)
            if host is not None:
                host -= streamer.plan.placement.host_bytes
    except BaseException:
        for streamer in opened:
            streamer.close()
        raise
    return opened


def reserve_of(asked: Any, budget: Bytes | None) -> int:
    """Bytes of the budget that are left to activations and caches: as asked (one number, for each
    device), else the default where nobody says how much weights may take."""
    if asked is not None:
        return parse_bytes("reserve_bytes", asked)
    return DEFAULT_RESERVE if budget in (None, "auto") else 0


def _share(budget: Amount | None, taken: Amount) -> Options:
    """The options of a streamer that may have what is not taken, of each memory."""
    if budget is None:
        return Options(device_budget=None)
    left = tuple(map(sub, budget, taken))
    most = max(left)
    if min(left) == most:
        return Options(device_budget=most)
    return Options(device_budget=most, reserve_bytes=[most - some for some in left])


def _host_budget(parts: Sequence[Part]) -> int | None:
    """Bytes of host memory that all have together; None: as much as they need. ConfigError if it
    does not hold their slots."""
    asked, machine = parts[0].options.get("host_budget"), parts[0].plan.machine
    if asked is None or machine.unified:
        return None
    auto = asked == "auto"
    limit = usable(machine.host_available) if auto else parse_bytes("host_budget", asked)
    needed = sum(part.host_nbytes for part in parts)
    if limit < needed:
        raise ConfigError(
            f"host_budget={format_bytes(limit)}: needs at least {format_bytes(needed)} of slots"
        )
    return limit


def refusal(
    parts: Sequence[Part], budget: Amount, kept: Amount, largest: tuple[int, str] = (0, "")
) -> ConfigError:
    """Says what does not fit, of the memory that lacks the most. ``largest``: bytes and name of
    the largest tensor of what is ``kept``."""
    slots = total([part.least for part in parts], (0,) * len(budget))
    needed = total([slots], kept)
    short = max(range(len(budget)), key=lambda at: needed[at] - budget[at])
    first = parts[0]
    for_host = first.plan.machine.unified and first.options.get("device_budget") is None
    name = "host_budget" if for_host else "device_budget"
    nbytes, tensor = largest
    named = f" ({tensor!r} of {format_bytes(nbytes)} is the largest)" if tensor else ""
    where = f" of {first.plan.machine.devices[short]}" if len(budget) > 1 else ""
    return ConfigError(
        f"{name}={format_bytes(budget[short])}{where}: needs at least "
        f"{format_bytes(needed[short])}: {format_bytes(slots[short])} of slots, "
        f"{format_bytes(kept[short])} outside the blocks{named}"
    )
