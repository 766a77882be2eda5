"""How many steps each stage of a lane hands on at a time. Pure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from .settings import Settings

logger = logging.getLogger(__name__)


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
        largest = max((batch for batch in all_batches if batch), default=None)
        return Batches(_cap("batch", largest, "", counts["device"]), 1, 1)
    pinned = _cap("batch_cpu_pinned", asked["batch_cpu_pinned"], "pinned", counts.get("pinned"))
    pageable = _cap("batch_cpu", asked["batch_cpu"], "pageable", counts.get("host"))
    copied = _cap("batch_gpu", asked["batch_gpu"], "device", counts["device"])
    read, staged = (pageable, pinned) if "host" in counts else (pinned, 1)
    return Batches(read, staged, copied)


def _cap(option: str, batch: int | None, pool: str, slots: int | None) -> int:
    """Steps to hand on at a time: no more than the pool holds, or it would wait for ever.

    ``slots``: None where there is no such pool.
    """
    if batch is None:
        return 1
    if slots is None:
        logger.info("%s=%d has no effect: there is no %s pool", option, batch, pool)
        return 1
    if batch > slots:
        logger.info("%s=%d is more than its pool's %d slots: capped", option, batch, slots)
    return min(batch, slots)
