"""What an engine's user asked of memory, and how much that is on a machine that a plan has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layer_streamer import Plan, parse_bytes

KV_TIERS = ("auto", "device", "host")
MARGIN, LEAST_MARGIN = 10, 512 << 20
"""What is left of free memory where nobody named a budget: a tenth, and at least so much."""
WAYS = frozenset({"n_gpu", "n_cpu_pinned", "n_cpu", "read_mode"})
"""Options that say which way layers go."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What the user asked for; None: what suits."""

    kv: str = "auto"
    """Where keys and values live: "auto", "device" or "host"."""
    prefill_chunk: int | None = None
    device_budget: int | str | None = None
    host_budget: int | str | None = None
    reserve_bytes: int | str = 0
    """Of ``device_budget``, the caller's part."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The streamer's."""

    def __post_init__(self) -> None:
        if self.kv not in KV_TIERS:
            raise ValueError(f"kv={self.kv!r}: must be one of {', '.join(KV_TIERS)}")


def device_budget_of(wishes: Wishes, seen: Plan) -> int | None:
    """Bytes that streamer and engine may use together, of each device; None: no limit, on a CPU
    where it has been said which way layers go."""
    machine = seen.machine
    if not machine.unified:
        free, wish = min(machine.device_free), wishes.device_budget
        return usable(free) if wish in (None, "auto") else parse_bytes("device_budget", wish)
    named = ("device_budget", wishes.device_budget), ("host_budget", wishes.host_budget)
    given = [_bytes_of(name, wish, seen) for name, wish in named if wish is not None]
    if not given and not WAYS.intersection(wishes.options):
        return usable(machine.host_available)  # what fits stays, and is used where it lies
    return min(given, default=None)


def host_budget_of(wishes: Wishes, seen: Plan) -> int | None:
    """Bytes of host memory; None: as many as it takes."""
    wish = wishes.host_budget
    return None if wish is None else _bytes_of("host_budget", wish, seen)


def names_budget(wishes: Wishes, seen: Plan) -> bool:
    """True: somebody has said how much of the device's memory may be used."""
    host = seen.machine.unified and wishes.host_budget is not None
    return wishes.device_budget is not None or host


def usable(nbytes: int) -> int:
    """What is taken of so much free memory where nobody named a budget."""
    return max(nbytes - max(nbytes // MARGIN, LEAST_MARGIN), 0)


def _bytes_of(name: str, wish: int | str, seen: Plan) -> int:
    return usable(seen.machine.host_available) if wish == "auto" else parse_bytes(name, wish)
