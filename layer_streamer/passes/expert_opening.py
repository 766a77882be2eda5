"""Opens a store of experts: what is theirs is taken out of the layers, slots are shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from ..checkpoint.experts import ExpertLayer, split_experts
from ..checkpoint.manifest import Manifest, TensorSpec
from ..devices.device import Device
from ..errors import ConfigError
from ..experts.policies import make_policy
from ..planning.budget import format_bytes
from ..planning.layout import (
    COPY_ALIGNMENT,
    TENSOR_ALIGNMENT,
    View,
    align_up,
    lay_out_resident,
    plan_steps,
)
from ..planning.planner import device_budget_of
from ..planning.settings import Settings
from ..transport.pipeline import Pipeline
from .expert_home import Home, MappedExperts, ReadExperts, SplitExperts
from .expert_pool import ExpertPool
from .expert_store import ExpertStore
from .expert_tiers import all_read, expert_reads, read_chunk

Layers: TypeAlias = Mapping[int, ExpertLayer]
_Alike: TypeAlias = tuple[tuple[View, ...], int]
"""How an expert lies in its slot, and the slot's bytes: layers that agree in it share a pool."""


def take_out(
    manifest: Manifest, settings: Settings, device: Device
) -> tuple[Manifest, Layers, Settings]:
    """The checkpoint without experts that are brought on demand, these by layer, and the settings
    with the number of their slots, and with a ``device_budget`` for all else.

    Experts are handed out as they are stored, whatever ``dtype`` says. ConfigError where there are
    none, or no room, and for several devices.
    """
    if settings.asked["experts"] != "demand":
        if settings.asked["expert_slots"] is not None:
            raise ConfigError("expert_slots: goes with experts='demand'")
        return manifest, {}, settings
    split = [split_experts(layer) for layer in manifest.layers]
    experts = {i: found for i, (_, found) in enumerate(split) if found is not None}
    chosen = settings.asked["layers"]
    if chosen is not None:
        experts = {i: found for i, found in experts.items() if i in chosen}
    if not experts:
        raise ConfigError(
            f"experts='demand': {manifest.path} has no experts that are known as such"
        )
    device_names = settings.asked["device"]
    if isinstance(device_names, list | tuple) and len(device_names) > 1:
        raise ConfigError("experts='demand': of several devices, each needs a streamer of its own")
    dense = replace(manifest, layers=tuple(layer for layer, _ in split))
    return dense, experts, _share_out(dense, experts, settings, device)


def _share_out(dense: Manifest, experts: Layers, settings: Settings, device: Device) -> Settings:
    """Slots are what was asked for, else what the budget leaves once all else is resident."""
    asked, count = settings.asked, settings.asked["expert_slots"]
    budget = device_budget_of(settings, device.free_bytes())
    if budget is None:
        if count is None:
            raise ConfigError(
                "experts='demand': expert_slots= or device_budget= has to say how many experts "
                "the device holds"
            )
        return settings
    if count is None:
        steps = plan_steps(dense, asked["tail"], asked["layers"])
        resident = sum(lay_out_resident(step, asked["dtype"])[1] for step in steps)
        room = budget - sum(settings.reserves(1)) - resident
        count = sum(layer.num_experts for layer in experts.values())
        count = min(count, max(1, room * count // _slots_nbytes(experts, count)))
        while count > 1 and _slots_nbytes(experts, count) > room:
            count -= 1
    nbytes = _slots_nbytes(experts, count)
    if nbytes >= budget:
        raise ConfigError(
            f"device_budget={format_bytes(budget)}: {count} slots of experts take "
            f"{format_bytes(nbytes)} of it, which leaves nothing for the layers"
        )
    return settings.but(expert_slots=count, device_budget=budget - nbytes)


def slots_of(experts: Layers, settings: Settings) -> tuple[int, int]:
    """How many slots there are, and their bytes, by settings that say so; none for no experts."""
    asked = settings.asked["expert_slots"] or 0
    return sum(_counts(experts, asked).values()), _slots_nbytes(experts, asked)


def _slots_nbytes(experts: Layers, count: int) -> int:
    """Device memory that so many slots take."""
    return sum(own * alike[1] for alike, own in _counts(experts, count).items())


def open_store(experts: Layers, pipeline: Pipeline, settings: Settings) -> ExpertStore | None:
    """A store whose memory the pipeline counts, and gives back; None for no experts."""
    if not experts:
        return None
    (device,) = pipeline.devices
    with device.guard():
        pools = dict[_Alike, ExpertPool]()
        for alike, count in _counts(experts, settings.asked["expert_slots"] or 0).items():
            views, nbytes = alike
            pools[alike] = ExpertPool(
                views, nbytes, count, make_policy("segmented", count, 1), device
            )
        by_layer = {i: pools[_alike(layer)] for i, layer in experts.items()}
        home = _open_home(experts, pipeline, device, settings)
        store = ExpertStore(experts, by_layer, home, device)
    pipeline.residents.owners.append(store)
    pipeline.residents.device_nbytes += store.device_nbytes
    return store


def _open_home(experts: Layers, pipeline: Pipeline, device: Device, settings: Settings) -> Home:
    """As the plan says; where page-locking is refused, all is read, and the plan says that."""
    views: dict[int, Sequence[View]] = {i: _alike(layer)[0] for i, layer in experts.items()}
    tiers = pipeline.plan.expert_tiers
    held = {i: experts[i] for i in tiers.layers} if tiers is not None else {}
    mapped = pipeline.loader.map_pages(expert_reads(held.values()), device) if held else None
    if held and mapped is None:
        tiers = all_read(experts, pipeline.plan, settings)
        pipeline.plan = replace(pipeline.plan, expert_tiers=tiers)
    if mapped is not None and len(held) == len(experts):
        return MappedExperts(mapped, experts, views, device)
    if tiers is not None and tiers.read_mode == "direct" and not pipeline.files.reads_direct:
        pipeline.files.use_direct()
    chunk = read_chunk(experts, pipeline.plan)
    read = ReadExperts(pipeline.open_fetcher(device, chunk), experts, views, chunk)
    if mapped is None:
        return read
    return SplitExperts(MappedExperts(mapped, held, views, device), read, held)


def _counts(experts: Layers, asked: int) -> dict[_Alike, int]:
    """Slots of each kind of experts: as many as were asked for, by how many layers have it; none
    has more than there are experts of it."""
    there, layers = dict[_Alike, int](), dict[_Alike, int]()
    for layer in experts.values():
        alike = _alike(layer)
        there[alike] = there.get(alike, 0) + layer.num_experts
        layers[alike] = layers.get(alike, 0) + 1
    return {
        alike: min(there[alike], max(1, asked * layers[alike] // len(experts))) for alike in there
    }


def _alike(layer: ExpertLayer) -> _Alike:
    """In a slot tensors lie as in their file, so that those that adjoin there are one copy."""
    first = sorted(layer.banks.items(), key=lambda bank: _place(bank[1][0]))
    views, end = list[View](), 0
    for key, (spec, *_) in first:
        views.append(View(key, spec.dtype, spec.shape, end, spec.nbytes))
        end = align_up(end + spec.nbytes, TENSOR_ALIGNMENT)
    return tuple(views), align_up(end, COPY_ALIGNMENT)


def _place(spec: TensorSpec) -> tuple[str, int]:
    extent = spec.extents[0]
    return str(extent.path), extent.offset
