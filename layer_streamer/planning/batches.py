"""How many steps each stage of a lane hands on at a time. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .settings import Settings, cap_batch, note_unused_batch


@dataclass(frozen=True, slots=True)
class Batches:
    """Steps that each stage hands on at a time."""

    read: int
    staged: int
    copied: int


def plan_batches(settings: Settings, counts: Mapping[str, int], *, unified: bool) -> Batches:
    """How many steps each stage hands on at a time; what has no effect is logged."""
    asked = settings.asked
    if not counts:
        return Batches(1, 1, 1)
    if unified:
        # One pool, one hand-over: the readers'. A second batch could wait for slots that the
        # first one holds back.
        all_batches = (asked["batch_cpu"], asked["batch_cpu_pinned"], asked["batch_gpu"])
        given = [batch for batch in all_batches if batch]
        return Batches(cap_batch("batch", max(given, default=None), counts["device"]), 1, 1)
    read = staged = 1
    if "pinned" in counts:
        pinned = cap_batch("batch_cpu_pinned", asked["batch_cpu_pinned"], counts["pinned"])
        if "host" in counts:
            staged = pinned
        else:
            read = pinned
    else:
        note_unused_batch("batch_cpu_pinned", asked["batch_cpu_pinned"], "pinned pool")
    if "host" in counts:
        read = cap_batch("batch_cpu", asked["batch_cpu"], counts["host"])
    else:
        note_unused_batch("batch_cpu", asked["batch_cpu"], "pageable pool")
    return Batches(read, staged, cap_batch("batch_gpu", asked["batch_gpu"], counts["device"]))
