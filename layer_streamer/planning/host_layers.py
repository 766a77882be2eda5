"""Which layers of a pass are computed in host memory. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ..errors import ConfigError
from .layout import PAGE, align_up
from .placement import StepSize
from .plan import Plan
from .residency import spread_evenly


def plan_with(
    make: Callable[[frozenset[int]], Plan],
    asked: int | Collection[int] | str | None,
    layers: Sequence[int],
    num_layers: int,
) -> Plan:
    """The plan with the layers that ``host_layers`` asks for, of whichever of them ``make`` makes.

    The other arguments are those of :func:`choose_host_layers`. ConfigError.
    """
    chosen = balance(make(frozenset()), layers, num_layers) if isinstance(asked, str) else asked
    return make(choose_host_layers(chosen, layers, num_layers))


def choose_host_layers(
    asked: int | Collection[int] | None, layers: Sequence[int], num_layers: int
) -> frozenset[int]:
    """Places in the pass of the layers that ``host_layers`` asks for.

    ``layers``: by step of the pass, its layer's index in the checkpoint, which has ``num_layers``;
    what comes behind these are tail steps, which no number counts. A number is spread evenly, so
    that link and processor take turns. Errors: ConfigError for a layer that is not in the pass.
    """
    places = {layer: place for place, layer in enumerate(layers) if layer < num_layers}
    if asked is None:
        return frozenset()
    if isinstance(asked, int):
        if asked > len(places):
            raise ConfigError(f"host_layers={asked}: a pass has {len(places)} layers")
        return spread_evenly(asked, len(places))
    missing = sorted(set(asked) - set(places))
    if missing:
        raise ConfigError(f"host_layers: layer {missing[0]} is not in the pass")
    return frozenset(places[layer] for layer in asked)


def balance(plan: Plan, layers: Sequence[int], num_layers: int) -> int:
    """How many layers a pass of one token should compute in host memory, so that processor and
    links end together: of those that ``plan``, without any, streams from host memory.

    ConfigError where it is not known how fast the processor multiplies beside copies.
    """
    if plan.machine.unified:
        return 0
    rates = plan.machine.rates
    links = [rate for rate in rates.beside if rate is not None]
    if rates.products is None or not links:
        raise ConfigError(
            "host_layers='auto': how fast the processor multiplies beside copies has not been "
            "measured here (layer-streamer probe does)"
        )
    return replace(plan, layers=tuple(layers)).balanced(rates.products, links, num_layers)


def sized_on_host(sizes: Sequence[StepSize], on_host: Collection[int]) -> tuple[StepSize, ...]:
    """The sizes where some steps lie in host memory as they lie in a device's slot."""
    return tuple(
        replace(size, host_nbytes=align_up(size.slot_nbytes, PAGE)) if i in on_host else size
        for i, size in enumerate(sizes)
    )
