"""What the hardware alone needs for what a pass does, to be measured beside passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TypeAlias

from ..streamer import LayerStreamer, pipeline_of
from .probe_copy import RawCopies
from .rawspeed import BareCompute, Load, RawReads

SPREAD_READS = "read into memory as large as the slots"
"""A comparison beside the limits where whole layers are read into pools: raw reads that do not fall
into the same small memory each time, as those through a ring do. What a hypervisor copies into the
CPU's cache arrives faster than what goes on to memory."""
READS = frozenset(("read", SPREAD_READS))
"""The measures that read from disk."""
Measures: TypeAlias = dict[str, Callable[[], float]]
"""By name, what measures once and returns seconds."""


def open_limits(
    streamer: LayerStreamer, load: Load, stack: ExitStack, *, cold: bool
) -> tuple[Measures, Measures]:
    """Measures of what a pass needs at least, and of what is compared with it besides.

    Unless they are ``cold``, passes are timed right after another: then raw reads are, too. What
    is opened is closed with the stack.
    """
    pipeline, limits, comparisons = pipeline_of(streamer), Measures(), Measures()
    layouts, devices = pipeline.schedule.layouts, pipeline.devices
    if load.tokens:
        limits["compute"] = BareCompute(streamer, load).seconds
    # Passes of a bench compute in host memory what may be.
    moved = [0 if i in pipeline.residents.host else x.copy_nbytes for i, x in enumerate(layouts)]
    copied = [sum(moved[i :: len(devices)]) for i in range(len(devices))]
    if any(copied) and not devices[0].unified:
        limits["copy"] = stack.enter_context(closing(RawCopies(devices, copied))).seconds
    # Pages of mapped files that a CPU takes in are not read: nothing is known of how fast it can.
    mapped = pipeline.residents.mapped
    reads = [read for i, layout in enumerate(layouts) if i not in mapped for read in layout.reads]
    if reads:
        memories = [lane.memory for lane in pipeline.lanes if not lane.memory.through_ring]
        pools = [pool for memory in memories for pool in memory.host_pools]
        slots = sum(pool.arena.nbytes for pool in pools)
        direct = pipeline.files.reads_direct
        opened = RawReads(streamer.manifest, reads, direct=direct, spread_nbytes=slots)
        raw = stack.enter_context(closing(opened))
        limits["read"] = raw.seconds if cold else _second(raw.seconds)
        if slots:
            spread = raw.spread_seconds
            comparisons[SPREAD_READS] = spread if cold else _second(spread)
    return limits, comparisons


def _second(measure: Callable[[], float]) -> Callable[[], float]:
    """Measures twice in a row, and returns the second."""

    def seconds() -> float:
        measure()
        return measure()

    return seconds
