"""At what rates a plan's reads and copies go, of all that were measured. Pure."""

from __future__ import annotations

from .placement import Placement, Rates
from .plan import CACHED, Machine
from .settings import Settings


def rates_of(
    placement: Placement, mode: str, cached: float | None, machine: Machine, settings: Settings
) -> Rates:
    """The rates of reads in this mode, and of copies from the memory that the settings ask for.

    ``cached``: the share of the files that the page cache has, from which buffered reads take it.
    What was not measured in the way that it is done here is None.
    """
    return Rates(_read_rate(mode, cached, machine), *_copy_rates(placement, machine, settings))


def _read_rate(mode: str, cached: float | None, machine: Machine) -> float | None:
    rates = machine.rates
    if mode == "direct":
        # Where direct reads were refused when they were measured, they will be again.
        return rates.read if rates.read is not None else rates.cold
    if cached is None:
        return None
    # A few pages that are missing may be those between tensors.
    cached = 1.0 if cached >= CACHED else cached
    shares = ((cached, rates.cached), (1 - cached, rates.cold))
    if any(share and rate is None for share, rate in shares):
        return None
    return 1 / sum(share / rate for share, rate in shares if rate is not None)


def _copy_rates(
    placement: Placement, machine: Machine, settings: Settings
) -> tuple[tuple[float | None, ...], float | None]:
    count, rates = len(machine.devices), machine.rates
    if machine.unified:
        # Nothing is copied to the CPU: what counts is the disk.
        return (float("inf"),) * count, None
    if "disk" not in placement.tiers or settings.num_pinned or not settings.num_pageable:
        return rates.copy, rates.copy_together
    if count == 1 and "host" not in placement.tiers:
        return rates.pageable or (None,), None
    # From pageable and from pinned memory in one pass, or over several links: not measured.
    return (None,) * count, None
