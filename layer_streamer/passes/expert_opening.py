"""Opens a store of experts: what is theirs is taken out of the layers, slots are shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from ..checkpoint.experts import ExpertLayer, split_experts
from ..checkpoint.manifest import Manifest
from ..devices.device import Device
from ..errors import ConfigError
from ..experts.policies import make_policy
from ..planning.layout import CASTABLE, View, cast_dtype, lay_out_resident
from ..planning.settings import Settings
from ..transport.pipeline import Pipeline
from .expert_home import Home, MappedExperts, ReadExperts, expert_reads
from .expert_pool import ExpertPool
from .expert_store import ExpertStore

Layers: TypeAlias = Mapping[int, ExpertLayer]
_Alike: TypeAlias = tuple[tuple[View, ...], int]
"""How an expert lies in its slot, and the slot's bytes: layers that agree in it share a pool."""


def take_out(manifest: Manifest, settings: Settings) -> tuple[Manifest, Layers]:
    """The checkpoint without experts that are brought on demand, and these, by layer.

    ConfigError where there are none, for several devices, and where experts would have to be cast.
    """
    if settings.asked["experts"] != "demand":
        if settings.asked["expert_slots"] is not None:
            raise ConfigError("expert_slots: goes with experts='demand'")
        return manifest, {}
    split = [split_experts(layer) for layer in manifest.layers]
    experts = {i: found for i, (_, found) in enumerate(split) if found is not None}
    chosen = settings.asked["layers"]
    if chosen is not None:
        experts = {i: found for i, found in experts.items() if i in chosen}
    if not experts:
        raise ConfigError(
            f"experts='demand': {manifest.path} has no experts that are known as such"
        )
    if settings.asked["expert_slots"] is None:
        raise ConfigError("experts='demand': expert_slots= has to say how many the device holds")
    device, dtype = settings.asked["device"], settings.asked["dtype"]
    if isinstance(device, list | tuple) and len(device) > 1:
        raise ConfigError("experts='demand': of several devices, each needs a streamer of its own")
    for layer in experts.values():
        for bank in layer.banks.values():
            if cast_dtype(bank[0].dtype, dtype) != bank[0].dtype:
                kinds = ", ".join(str(kind).removeprefix("torch.") for kind in CASTABLE)
                raise ConfigError(
                    f"dtype={dtype}: tensor {bank[0].name!r} is {bank[0].dtype}, and experts that "
                    f"are brought on demand are not cast ({kinds} would be)"
                )
    return replace(manifest, layers=tuple(layer for layer, _ in split)), experts


def slots_nbytes(experts: Layers, settings: Settings) -> int:
    """Device memory that their slots take."""
    return sum(count * alike[1] for alike, count in _counts(experts, settings).items())


def open_store(experts: Layers, pipeline: Pipeline, settings: Settings) -> ExpertStore | None:
    """A store whose memory the pipeline counts, and gives back; None for no experts."""
    if not experts:
        return None
    (device,) = pipeline.devices
    with device.guard():
        pools = dict[_Alike, ExpertPool]()
        for alike, count in _counts(experts, settings).items():
            views, nbytes = alike
            pools[alike] = ExpertPool(
                views, nbytes, count, make_policy("segmented", count, 1), device
            )
        by_layer = {i: pools[_alike(layer)] for i, layer in experts.items()}
        home = _open_home(experts, pipeline, device)
        store = ExpertStore(experts, by_layer, home, device)
    pipeline.residents.owners.append(store)
    pipeline.residents.device_nbytes += store.device_nbytes
    return store


def _open_home(experts: Layers, pipeline: Pipeline, device: Device) -> Home:
    views: dict[int, Sequence[View]] = {i: _alike(layer)[0] for i, layer in experts.items()}
    if device.maps_files:
        mapped = pipeline.loader.map_pages(expert_reads(experts.values()), device)
        if mapped is not None:
            return MappedExperts(mapped, experts, views, device)
    return ReadExperts(pipeline.loader, experts, views, device)


def _counts(experts: Layers, settings: Settings) -> dict[_Alike, int]:
    """Slots of each kind of experts: as many as were asked for, by how many layers have it; none
    has more than there are experts of it."""
    asked = settings.asked["expert_slots"] or 0
    there, layers = dict[_Alike, int](), dict[_Alike, int]()
    for layer in experts.values():
        alike = _alike(layer)
        there[alike] = there.get(alike, 0) + layer.num_experts
        layers[alike] = layers.get(alike, 0) + 1
    return {
        alike: min(there[alike], max(1, asked * layers[alike] // len(experts))) for alike in there
    }


def _alike(layer: ExpertLayer) -> _Alike:
    return lay_out_resident(layer.expert(0), None)
