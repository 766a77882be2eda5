"""Which experts host memory keeps, and how the others are read. Nothing is opened here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.manifest import TensorSpec
from ..errors import ConfigError
from ..planning.budget import format_bytes
from ..planning.layout import PAGE, Read, align_up
from ..planning.plan import ExpertTiers, Plan
from ..planning.planner import host_budget_of, stream_mode, usable
from ..planning.settings import Settings
from ..transport.fetcher import staging_nbytes
from ..transport.mapped import merge_ranges

READ_CHUNK = 1 << 20
"""Bytes that one thread reads of an expert at a stretch at most, so that several read one."""


def expert_reads(layers: Iterable[ExpertLayer]) -> list[Read]:
    """What files have to be mapped."""
    return [
        Read(extent.path, extent.offset, 0, extent.nbytes)
        for layer in layers
        for bank in layer.banks.values()
        for spec in bank
        for extent in filter(holds, spec.extents)
    ]


def holds(extent: TensorSpec) -> bool:
    """It has bytes."""
    return extent.nbytes > 0


def read_chunk(experts: Mapping[int, ExpertLayer], plan: Plan) -> int:
    """Bytes that one thread reads at a stretch: whole pages."""
    largest = max(layer.expert_nbytes for layer in experts.values())
    return align_up(max(1, min(plan.read_chunk, READ_CHUNK, largest)), PAGE)


def choose_tiers(
    experts: Mapping[int, ExpertLayer], plan: Plan, settings: Settings
) -> ExpertTiers | None:
    """Page-locked pages for as many layers' experts as host memory has room for beside the plan's
    layers, all of them or some that are spread evenly; the others are read. None for no experts.

    ConfigError for a ``host_budget`` that reads alone are more than.
    """
    if not experts:
        return None
    machine, placed = plan.machine, plan.machine.host_nbytes(plan.placement)
    sizes = {i: _page_nbytes(layer) for i, layer in experts.items()}
    given = host_budget_of(settings, machine.host_available)
    room = (usable(machine.host_available) if given is None else given) - placed
    mapped: tuple[int, ...] = ()
    if machine.maps_files and not machine.unified and settings.read_mode in ("auto", "mapped"):
        mapped = tuple(experts) if sum(sizes.values()) <= room else ()
        if not mapped:
            staging = staging_nbytes(plan.read_threads, read_chunk(experts, plan))
            if given is not None and staging > room:
                raise ConfigError(
                    f"host_budget={format_bytes(given)}: layers take {format_bytes(placed)} of it, "
                    f"and to read experts takes {format_bytes(staging)} more"
                )
            mapped = _spread(experts, sizes, room - staging)
    nbytes = _page_nbytes(*(experts[i] for i in mapped))
    tiers = ExpertTiers(mapped, nbytes, 0, "", "")
    return tiers if len(mapped) == len(experts) else _with_reads(tiers, sizes, plan, settings)


def all_read(experts: Mapping[int, ExpertLayer], plan: Plan, settings: Settings) -> ExpertTiers:
    """The tiers where no page can be locked."""
    sizes = {i: _page_nbytes(layer) for i, layer in experts.items()}
    return _with_reads(ExpertTiers((), 0, 0, "", ""), sizes, plan, settings)


def _with_reads(
    tiers: ExpertTiers, sizes: Mapping[int, int], plan: Plan, settings: Settings
) -> ExpertTiers:
    """How what is in no page is read: as layers are, unless that is ours to choose."""
    on_disk = sum(nbytes for i, nbytes in sizes.items() if i not in tiers.layers)
    used = plan.machine.host_nbytes(plan.placement) + tiers.page_bytes
    mode, reason = stream_mode(on_disk, used, plan.machine, settings)
    if settings.read_mode in ("direct", "buffered"):
        mode, reason = settings.read_mode, "as asked"
    elif plan.read_mode == "direct":
        mode, reason = "direct", "as layers are"
    return replace(tiers, disk_bytes=on_disk, read_mode=mode, reason=reason)


def _spread(
    experts: Mapping[int, ExpertLayer], sizes: Mapping[int, int], room: int
) -> tuple[int, ...]:
    """Layers, as many as fit, at even distances."""
    layers = list(sizes)
    for count in range(len(layers) - 1, 0, -1):
        chosen = tuple(layers[i * len(layers) // count] for i in range(count))
        fits = sum(sizes[i] for i in chosen) <= room
        # What lies between two of them may be mapped along.
        if fits and _page_nbytes(*(experts[i] for i in chosen)) <= room:
            return chosen
    return ()


def _page_nbytes(*layers: ExpertLayer) -> int:
    """Of the pages that have their experts, and what lies between them."""
    ranges = merge_ranges(expert_reads(layers))
    return sum(end - start for _, start, end in ranges)
