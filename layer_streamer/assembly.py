"""From a manifest and settings to a pipeline: look at the machine, plan, build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .checkpoint.formats import as_manifest
from .checkpoint.manifest import Manifest
from .devices.device import Device
from .machine.hostmem import available_host_bytes
from .machine.limits import MachineLimits, load_limits
from .machine.threads import note_too_many_threads
from .passes.expert_opening import Layers, open_store, slots_of, take_out
from .passes.expert_store import ExpertStore
from .passes.expert_tiers import choose_tiers
from .passes.statics import Statics
from .planning.host_layers import plan_with
from .planning.layout import Layout, Step, plan_steps
from .planning.placement import Rates
from .planning.plan import Machine, Plan
from .planning.planner import make_plan, measure_steps
from .planning.settings import Settings
from .transport.copier import Listener
from .transport.files import OpenFiles
from .transport.pipeline import Pipeline
from .transport.schedule import lay_out_all
from .transport.tasks import run_all


def read_headers(path: str | Path | Manifest, layer_pattern: str | None) -> Manifest:
    """As :func:`as_manifest`, on a thread of its own.

    There no interrupt can come between the opening of a file and what closes it.
    """
    (manifest,) = run_all([partial(as_manifest, path, layer_pattern)], 1)
    return manifest


class Assembled(NamedTuple):
    """What a streamer is made of; the pipeline's threads are not yet started."""

    pipeline: Pipeline
    statics: Statics
    experts: ExpertStore | None
    listener: Listener | None
    """Held by the streamer: the pipeline, which its threads hold, does not."""


def assemble(manifest: Manifest, devices: Sequence[Device], settings: Settings) -> Assembled:
    """Look at the machine, plan, and build."""
    listener = None
    if (on_copy := settings.asked["on_copy"]) is not None:
        listener = Listener(on_copy)
        settings = settings.but(on_copy=listener.weakly())
    dense, experts, settings = take_out(manifest, settings, devices[0])
    files = OpenFiles(manifest.files)
    try:
        steps, layouts, plan = _plan(dense, devices, settings, files, {})
        plan = _with_slots(plan, experts, settings)
        if plan.machine.unified and "disk" in plan.tiers:
            note_too_many_threads()
        pipeline = Pipeline(steps, layouts, files, devices, settings, plan)
        try:
            store = open_store(experts, pipeline, settings)
        except BaseException:
            pipeline.close()
            raise
        statics = Statics(manifest, pipeline.loader, settings.asked["dtype"])
    except BaseException:
        files.close()
        raise
    return Assembled(pipeline, statics, store, listener)


def draw_plan(
    manifest: Manifest,
    devices: Sequence[Device],
    settings: Settings,
    given: Mapping[str, float],
) -> Plan:
    """The plan that a streamer would be opened with; nothing is allocated.

    ``given``: rates in bytes a second to go by instead of measured ones: "read", "copy".
    """
    dense, experts, settings = take_out(manifest, settings, devices[0])
    files = OpenFiles(manifest.files)
    try:
        plan = _plan(dense, devices, settings, files, given)[-1]
        return _with_slots(plan, experts, settings)
    finally:
        files.close()


def _with_slots(plan: Plan, experts: Layers, settings: Settings) -> Plan:
    count, nbytes = slots_of(experts, settings)
    tiers = choose_tiers(experts, plan, settings)
    return replace(plan, expert_slots=count, expert_bytes=nbytes, expert_tiers=tiers)


def _plan(
    manifest: Manifest,
    devices: Sequence[Device],
    settings: Settings,
    files: OpenFiles,
    given: Mapping[str, float],
) -> tuple[tuple[Step, ...], tuple[Layout, ...], Plan]:
    unified, dtype = devices[0].unified, settings.asked["dtype"]
    steps = plan_steps(manifest, settings.asked["tail"], settings.asked["layers"])
    layouts = lay_out_all(steps, unified=unified, dtype=dtype)
    limits = load_limits(next(iter(manifest.files)), gpus=not unified)
    rates = rates_on_record(limits, devices)
    if "read" in given:
        rates = replace(rates, read=given["read"], cold=given["read"], cached=given["read"])
    if "copy" in given:
        copy = (given["copy"],) * len(devices)
        rates = replace(rates, copy=copy, copy_together=None, pageable=copy)
    layers = tuple(step.layer_idx for step in steps)
    extents = [(r.path, r.offset, r.nbytes) for layout in layouts for r in layout.reads]
    make = partial(
        make_plan,
        measure_steps(steps, layouts, dtype),
        max(layout.scratch_nbytes for layout in layouts),
        look_at_machine(devices, rates, limits),
        settings,
        lambda: files.cached_share(extents),
    )
    plan = plan_with(make, settings.asked["host_layers"], layers, manifest.num_layers)
    return steps, layouts, replace(plan, layers=layers)


def rates_on_record(limits: MachineLimits | None, devices: Sequence[Device]) -> Rates:
    """What has been measured of this machine and this file system, if anything."""
    names = [str(device.torch_device) for device in devices]
    if limits is None:
        return Rates(None, (None,) * len(names))
    products = [limits.product_rate(name) for name in names]
    return Rates(
        read=limits.best_read_rate("direct"),
        copy=tuple(limits.copy_rate(name) for name in names),
        copy_together=limits.copy_together_rate if len(names) > 1 else None,
        cold=limits.best_read_rate("cold"),
        cached=limits.cached_read_rate,
        pageable=tuple(limits.pageable_rate(name) for name in names),
        products=min((one.bytes_per_s for one in products if one is not None), default=None),
        beside=tuple(None if one is None else one.copies for one in products),
    )


def look_at_machine(
    devices: Sequence[Device], rates: Rates, limits: MachineLimits | None
) -> Machine:
    """What this machine has free now, and how it reads the fastest, where that was measured."""
    best = limits.best_read if limits is not None else None
    readers = dict[str, tuple[int, int]]()
    if best is not None and best.mode == "direct":
        readers["direct"] = (best.threads, best.chunk_nbytes)
    return Machine(
        devices=tuple(str(device.torch_device) for device in devices),
        unified=devices[0].unified,
        maps_files=all(device.maps_files for device in devices),
        device_free=tuple(device.free_bytes() for device in devices),
        host_available=available_host_bytes(),
        rates=rates,
        readers=readers,
    )
