"""One budget for several sequences: what each may hold on the devices. Reads headers only."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint.manifest import Manifest
from ..errors import ConfigError
from ..planning.budget import format_bytes, parse_bytes
from ..planning.options import Bytes, Options
from ..planning.plan import Plan
from ..planning.planner import usable
from ..preview import plan_checkpoint
from ..streamer import LayerStreamer

DEFAULT_RESERVE = 2 << 30
"""Bytes of device memory that activations and caches get beside an "auto" budget, where nobody
says more: what somebody else's model takes cannot be known."""


def open_all(
    manifests: Sequence[Manifest], options: Options, outside_nbytes: int, reserve: int
) -> list[LayerStreamer]:
    """A streamer for each manifest, all within one ``device_budget``, which the first fill first.

    ``reserve`` of it is the caller's, ``outside_nbytes`` are taken by what is in no block. A budget
    of "auto", or none on a device with memory of its own, is what is free less a margin. Errors:
    ConfigError if the slots of all do not fit; those of ``from_checkpoint``. None is left open.
    """
    asked = options.get("device_budget")
    bare = Options(**{**options, "device_budget": None})
    plans = [plan_checkpoint(manifest, **bare) for manifest in manifests]
    budget = _budget(asked, plans[0], reserve)
    slots = [slots_of(plan) for plan in plans]
    left = None if budget is None else budget - outside_nbytes
    if left is not None and left < sum(slots):
        raise ConfigError(
            f"device_budget={format_bytes(budget or 0)}: needs at least "
            f"{format_bytes(outside_nbytes + sum(slots))}: {format_bytes(sum(slots))} of slots, "
            f"{format_bytes(outside_nbytes)} outside the blocks"
        )
    opened: list[LayerStreamer] = []
    try:
        for i, manifest in enumerate(manifests):
            share = None if left is None else left - sum(slots[i + 1 :])
            streamer = LayerStreamer.from_checkpoint(
                manifest, **Options(**{**options, "device_budget": share})
            )
            opened.append(streamer)
            if left is not None:
                left -= slots_of(streamer.plan)
    except BaseException:
        for streamer in opened:
            streamer.close()
        raise
    return opened


def reserve_of(asked: Bytes | None, budget: Bytes | None) -> int:
    """Bytes of the budget that are left to activations and caches: as asked, else the default
    where nobody says how much weights may take."""
    if asked is not None:
        return parse_bytes("reserve_bytes", asked)
    return DEFAULT_RESERVE if budget in (None, "auto") else 0


def slots_of(plan: Plan) -> int:
    """Bytes that slots and resident layers take on the device that has the most of them."""
    taken = plan.placement.device_bytes
    return sum(taken) if plan.machine.unified else max(taken)


def _budget(asked: Bytes | None, plan: Plan, reserve: int) -> int | None:
    machine = plan.machine
    if asked not in (None, "auto"):
        return max(parse_bytes("device_budget", asked) - reserve, 0)
    if asked is None and machine.unified:
        return None
    free = machine.host_available if machine.unified else min(machine.device_free)
    return max(usable(free) - reserve, 0)
