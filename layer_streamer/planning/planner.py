"""Makes a plan: tiers from budgets and sizes, and how files are read. Pure.

The machine's side comes in as numbers, so that a plan can be made for a machine that is elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..errors import ConfigError
from .budget import MAX_BYTES, format_bytes, parse_bytes
from .host_layers import sized_on_host
from .layout import PAGE, Layout, Step, lay_out_resident
from .options import Bytes
from .placement import Budget, Placement, StepSize, place, predict
from .plan import CACHED, Machine, Plan
from .rates import rates_of
from .settings import RING_CHUNKS, RING_SLOTS_PER_READER, Settings

logger = logging.getLogger(__name__)


def measure_steps(
    steps: Sequence[Step], layouts: Sequence[Layout], dtype: torch.dtype | None
) -> tuple[StepSize, ...]:
    """What each step takes in each place."""
    return tuple(
        StepSize(
            device_nbytes=lay_out_resident(step, dtype)[1],
            host_nbytes=layout.host_nbytes,
            read_nbytes=layout.read_nbytes,
            copy_nbytes=layout.copy_nbytes,
            slot_nbytes=layout.device_nbytes,
        )
        for step, layout in zip(steps, layouts, strict=True)
    )


def make_plan(
    sizes: Sequence[StepSize],
    scratch_nbytes: int,
    machine: Machine,
    settings: Settings,
    cached_share: Callable[[], float],
    on_host: frozenset[int] = frozenset(),
) -> Plan:
    """Tiers from the budgets, and how files are read. The plan's ``layers`` are the sizes' places.

    ``on_host``: the steps that are to be computed in host memory; on a CPU, all are.
    ``cached_share()`` tells which part of the files is in the page cache; it is asked only if that
    matters. Errors: ConfigError for a budget below its slots, for mapped files that do not fit.
    """
    on_host = frozenset() if machine.unified else on_host
    sizes = sized_on_host(sizes, on_host)
    budget = _budget_of(sizes, scratch_nbytes, machine, settings)
    budget = replace(budget, on_host=on_host)
    placement, mode, reason = _choose(sizes, budget, machine, settings, cached_share)
    cached, known = None, machine.rates.cold or machine.rates.cached
    if "disk" in placement.tiers and mode == "buffered" and known:
        cached = cached_share()
    rates = rates_of(placement, mode, cached, machine, settings)
    ring = settings.through_ring and any(slots.count for slots in placement.host_slots)
    threads, chunk = _choose_readers(mode, machine, settings, ring=ring)
    return Plan(
        machine=machine,
        sizes=tuple(sizes),
        placement=placement,
        read_mode=mode,  # type: ignore[arg-type]
        reason=reason,
        predicted=predict(placement, rates),
        read_threads=threads,
        read_chunk=chunk,
        layers=tuple(range(len(sizes))),
        rates=rates,
        cached=cached,
    )


def _choose_readers(
    mode: str, machine: Machine, settings: Settings, *, ring: bool
) -> tuple[int, int]:
    """Threads and bytes a read: as asked, else as measured here, else the defaults."""
    asked, chunk = settings.asked, settings.chunk_nbytes
    if asked["read_threads"] is None and asked["read_chunk"] is None and mode in machine.readers:
        return machine.readers[mode]
    if asked["read_chunk"] is None and ring:
        chunk = RING_CHUNKS[mode]
    return settings.num_readers, chunk


def _with_ring(
    budget: Budget, mode: str, sizes: Sequence[StepSize], machine: Machine, settings: Settings
) -> Budget:
    """Host slots are those of a ring: whole pages, no more than hold all steps."""
    threads, chunk = _choose_readers(mode, machine, settings, ring=True)
    largest = max(size.host_nbytes for size in sizes)
    nbytes = max(min(chunk // PAGE * PAGE, largest), PAGE)
    parts = sum(-(-size.host_nbytes // nbytes) for size in sizes)
    num_slots = min(threads * RING_SLOTS_PER_READER, parts)
    return replace(budget, host_slots=num_slots, host_slot_nbytes=nbytes)


def usable(nbytes: int) -> int:
    """What "auto" takes of so much free memory: all but a tenth, and but 512 MiB at the least."""
    return max(nbytes - max(nbytes // 10, 512 << 20), 0)


def _resolve(name: str, budget: Bytes | None, free: int) -> int | None:
    if budget is None:
        return None
    return usable(free) if budget == "auto" else parse_bytes(name, budget)


def device_budget_of(settings: Settings, free: int) -> int | None:
    """What ``device_budget`` says of a device with so many free bytes; None: nothing."""
    return _resolve("device_budget", settings.asked["device_budget"], free)


def host_budget_of(settings: Settings, available: int) -> int | None:
    """What ``host_budget`` says where so many bytes of host memory can be had; None: nothing."""
    return _resolve("host_budget", settings.asked["host_budget"], available)


def _budget_of(
    sizes: Sequence[StepSize], scratch_nbytes: int, machine: Machine, settings: Settings
) -> Budget:
    """What may be used: here a machine that computes in host memory takes the form of all others.

    Its devices share one pool, which has as many slots as all pools together would have.
    """
    asked = settings.asked
    host = host_budget_of(settings, machine.host_available)
    if machine.unified:
        # Both names mean the one memory there is; the smaller amount holds.
        device = _resolve("device_budget", asked["device_budget"], machine.host_available)
        return Budget(
            device=(None,) * len(machine.devices),
            host=min((limit for limit in (device, host) if limit is not None), default=None),
            device_slots=settings.num_device + settings.num_pinned + settings.num_pageable + 1,
            host_slots=0,
            scratch_nbytes=scratch_nbytes,
            shared=True,
        )
    budget = Budget(
        device=tuple(
            _resolve("device_budget", asked["device_budget"], free) for free in machine.device_free
        ),
        host=host,
        device_slots=settings.num_device + 1,
        host_slots=sum(settings.host_slots.values()),
        reserve=settings.reserves(len(machine.devices)),
        scratch_nbytes=scratch_nbytes,
    )
    if not settings.through_ring:
        return budget
    # Which mode it will be follows from the placement, but of that only where it is not asked.
    likely = "direct" if host is not None else "buffered"
    mode = settings.read_mode if settings.read_mode in RING_CHUNKS else likely
    return _with_ring(budget, mode, sizes, machine, settings)


def _choose(
    sizes: Sequence[StepSize],
    budget: Budget,
    machine: Machine,
    settings: Settings,
    cached_share: Callable[[], float],
) -> tuple[Placement, str, str]:
    """The placement, the read mode and its reason."""
    held, budget = _shrink_slots(sizes, budget, settings)
    given, needed = budget.host, held.host_bytes
    allowed = usable(machine.host_available) if given is None else given
    if needed and _wants_map(machine, settings):
        if needed <= allowed:
            return held, "mapped", f"host memory holds it ({format_bytes(allowed)} may be used)"
        if settings.read_mode == "mapped":
            raise ConfigError(
                f"read_mode='mapped': needs {format_bytes(needed)} of host memory, "
                f"{format_bytes(allowed)} may be used (host_budget says otherwise)"
            )
    placement = place(sizes, budget)
    used = machine.host_nbytes(placement)
    _check_host(used, given is not None, machine, settings, len(budget.on_host))
    as_asked = ("direct", "buffered", "mapped") if budget.shared else ("direct", "buffered")
    if settings.read_mode in as_asked:
        return placement, settings.read_mode, "as asked"
    if not placement.read_bytes:
        if cached_share() >= CACHED:
            return placement, "buffered", "read once, from the page cache"
        return placement, "direct", "read once, past the page cache"
    mode, reason = stream_mode(placement.read_bytes, used, machine, settings)
    if budget.host_slot_nbytes is not None and mode == "direct" and given is None:
        placement = place(sizes, _with_ring(budget, mode, sizes, machine, settings))
    return placement, mode, reason


def _shrink_slots(
    sizes: Sequence[StepSize], budget: Budget, settings: Settings
) -> tuple[Placement, Budget]:
    """The placement if host memory held all that is streamed, and the budget with fewer device
    slots if there is no room for more and nobody asked for them."""
    least = budget.device_slots
    if settings.asked["n_gpu"] is None:
        pools = sum(settings.asked[name] or 0 for name in ("n_cpu_pinned", "n_cpu"))
        least = min(2 + pools * budget.shared, least)
    while True:
        try:
            return place(
                sizes, budget if budget.shared else replace(budget, host=MAX_BYTES)
            ), budget
        except ConfigError:
            if budget.device_slots == least:
                raise
            budget = replace(budget, device_slots=budget.device_slots - 1)


def _wants_map(machine: Machine, settings: Settings) -> bool:
    asked = settings.read_mode == "mapped"
    if asked and not machine.maps_files:
        logger.warning("read_mode='mapped': the device cannot copy from mapped files")
    suits = settings.read_mode == "auto" and not settings.names_host_pools
    return machine.maps_files and (asked or suits)


def _check_host(
    nbytes: int, budgeted: bool, machine: Machine, settings: Settings, num_on_host: int
) -> None:
    """Too much memory is not refused by the kernel: something gets killed."""
    if nbytes <= machine.host_available:
        return
    needed, free = format_bytes(nbytes), format_bytes(machine.host_available)
    if not budgeted:
        counts = f"n_cpu_pinned={settings.num_pinned}, n_cpu={settings.num_pageable}"
        if machine.unified:
            counts = f"n_gpu={settings.num_device}, {counts}"
        what = f"{num_on_host} host_layers and the slots" if num_on_host else "the slots"
        raise ConfigError(
            f"{counts}: {what} need {needed}, {free} of host memory is free "
            "(a host_budget overrides this check)"
        )
    logger.warning("the budget lets %s of host memory be used, %s is free", needed, free)


def stream_mode(on_disk: int, used: int, machine: Machine, settings: Settings) -> tuple[str, str]:
    """How so many bytes are read in each pass under "auto", and why."""
    if settings.asked["host_budget"] is not None:
        return "direct", "the page cache is not part of host_budget"
    if on_disk <= usable(machine.host_available - used):
        return "buffered", f"the page cache can hold {format_bytes(on_disk)}"
    return "direct", f"{format_bytes(on_disk)} a pass, the page cache has room for less"
