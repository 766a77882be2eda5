"""How many layers of a pass a tune has the processor compute. Pure."""

from __future__ import annotations

from dataclasses import replace

from ...planning.host_layers import balance
from ...planning.plan import Plan
from .predict import COPY_RATES, PRODUCT_RATE

AROUND = (1 / 2, 3 / 4, 1, 5 / 4)
"""Of the number that measured rates suggest. Most are below: rates are of products alone, and a
layer has more to compute, on cores that threads of the streamer want, too."""


def counts_around(plan: Plan, num_layers: int) -> tuple[int, ...]:
    """Numbers of host layers to try where a pass would go by ``plan``, which has none; 0 first.

    Just 0 where they could spare nothing: a device that is the CPU, layers that are read from disk
    in each pass, none that streams. Rates that no probe has measured are guesses.
    """
    machine, rates = plan.machine, plan.machine.rates
    if rates.products is None or None in rates.beside or not rates.beside:
        links = (COPY_RATES["pinned"],) * len(machine.devices)
        guessed = replace(rates, products=PRODUCT_RATE, beside=links)
        plan = replace(plan, machine=replace(machine, rates=guessed))
    best = balance(plan, plan.layers, num_layers)
    steps = zip(plan.layers, plan.tiers, strict=True)
    return around(best, sum(layer < num_layers and tier == "host" for layer, tier in steps))


def around(count: int, most: int) -> tuple[int, ...]:
    """Numbers to try around one, none above ``most``; 0 first."""
    return tuple(sorted({0, *(min(round(count * part), most) for part in AROUND)}))
