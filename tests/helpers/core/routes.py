"""The routes that a layer can take to the device: for promises that hold on each of them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from support import Witness, footprint, make_device, open_checkpoint

from layer_streamer import LayerStreamer
from layer_streamer.devices.device import CpuDevice

NUM_LAYERS = 6
END_SECONDS = 10.0
POOLS = {"n_gpu": 1, "n_cpu_pinned": 1, "n_cpu": 1}
"""Named, because where no host pool is named "auto" may map the files instead of reading them."""
FEW_SLOTS = {"n_gpu": 0, "n_cpu_pinned": 1}
PARTS = {"read_chunk": 4096, "read_threads": 2}
RING = {"n_cpu_pinned": 0, "n_cpu": 0, **PARTS}
"""What slots take must be less than all layers, or all would be resident instead."""


@dataclass(frozen=True)
class Route:
    """Devices and options, and what the plan must say for layers to take it."""

    kind: str
    options: Mapping[str, Any]
    tiers: frozenset[str] = frozenset({"disk"})
    read_mode: str = "buffered"
    num_devices: int = 1
    resident: Mapping[str, int] = field(default_factory=dict)
    """Layers for which ``device_budget`` and ``host_budget`` have room beside the slots."""


def _routes(kind: str) -> dict[str, Route]:
    arena = {"n_gpu": 1, "host_budget": "1GiB", "read_mode": "buffered"}
    return {
        "pools": Route(kind, POOLS),
        "direct": Route(kind, {**POOLS, "read_mode": "direct"}, read_mode="direct"),
        # No pool is named, which is the default; below, none is asked for.
        "ring": Route(kind, {**PARTS, "n_gpu": 1, "read_mode": "direct"}, read_mode="direct"),
        "mapped": Route(
            kind, {"n_gpu": 1, "read_mode": "mapped"}, frozenset({"host"}), read_mode="mapped"
        ),
        "arena": Route(kind, arena, frozenset({"host"})),
        "host views": Route(
            kind,
            {"n_gpu": 1, "read_mode": "mapped", "host_layers": 2},
            frozenset({"host"}),
            read_mode="mapped",
        ),
        "host images": Route(
            kind,
            {"n_gpu": 1, "n_cpu_pinned": 1, "host_layers": 2},
            frozenset({"host", "disk"}),
        ),
        "resident": Route(
            kind, {"device_budget": "1GiB", "read_mode": "direct"}, frozenset({"device"}), "direct"
        ),
        "partial": Route(
            kind,
            {**FEW_SLOTS, "read_mode": "direct"},
            frozenset({"device", "host", "disk"}),
            read_mode="direct",
            resident={"device": 1, "host": 2},
        ),
        "partial ring": Route(
            kind,
            {**RING, "n_gpu": 0, "read_mode": "buffered"},
            frozenset({"device", "host", "disk"}),
            resident={"device": 1, "host": 1},
        ),
    }


ROUTES = {
    "cpu pools": Route("cpu", POOLS),
    "cpu direct": Route("cpu", {**POOLS, "read_mode": "direct"}, read_mode="direct"),
    "cpu mapped": Route("cpu", {"read_mode": "mapped"}, read_mode="mapped"),
    "cpu partial": Route("cpu", FEW_SLOTS, frozenset({"device", "disk"}), resident={"device": 2}),
    "cpu resident": Route("cpu", {"device_budget": "1GiB"}, frozenset({"device"})),
    "cpu two": Route("cpu", POOLS, num_devices=2),
    **_routes("fake"),
    "two": Route("fake", POOLS, num_devices=2),
    "two mapped": Route("fake", {"n_gpu": 1}, frozenset({"host"}), "mapped", num_devices=2),
    "two partial": Route(
        "fake",
        {**RING, "n_gpu": 0, "read_mode": "buffered"},
        frozenset({"device", "host", "disk"}),
        num_devices=2,
        resident={"device": 1, "host": 1},
    ),
    **{f"cuda {name}": route for name, route in _routes("cuda").items()},
}


STOOD_FOR = (
    "cpu direct", "cpu partial", "cpu resident", "cpu two", "resident", "two", "two mapped",
    "partial ring", "host views", "host images",
)  # fmt: skip
"""Routes whose parts are all parts of other routes."""


def route_params(*names: str, slow: Sequence[str] = ()) -> list[Any]:
    """Routes as parameters: the named ones (none: all), marked for the GPU where they need it."""
    chosen = names or tuple(ROUTES)
    marks = {
        name: [
            *([pytest.mark.gpu] if ROUTES[name].kind == "cuda" else []),
            *([pytest.mark.slow] if name in slow else []),
        ]
        for name in (*chosen, *slow)
    }
    return [pytest.param(name, marks=marked) for name, marked in marks.items()]


def default_params(*names: str) -> list[Any]:
    """Routes as parameters (none named: all); those that others stand for are marked slow."""
    chosen = [name for name in names or ROUTES if name not in STOOD_FOR]
    return route_params(*chosen, slow=[name for name in names or ROUTES if name in STOOD_FOR])


def make_devices(name: str) -> Any:
    """The route's device, or devices."""
    route = ROUTES[name]
    if route.num_devices == 1:
        return make_device(route.kind)
    if route.kind == "cpu":
        return [CpuDevice() for _ in range(route.num_devices)]
    return FakeDevice.several(route.num_devices, seed=7)


_budgets: dict[Any, dict[str, int]] = {}


def open_route(name: str, path: Path, device: Any, **options: Any) -> LayerStreamer:
    """A streamer of ``path`` whose layers take the route ``name``; ``options`` go before its."""
    route = ROUTES[name]
    options = {**route.options, **options}
    if route.resident:
        key = (
            name,
            str(path),
            *(repr(options.get(option)) for option in ("dtype", "tail", "layers")),
        )
        if key not in _budgets:
            _budgets[key] = budgets(path, make_devices(name), options, route.resident)
        options |= _budgets[key]
    streamer = open_checkpoint(device, path, **options)
    plan = streamer.plan
    assert (set(plan.tiers), plan.read_mode) == (set(route.tiers), route.read_mode)
    return streamer


def budgets(
    path: Path, device: Any, options: Mapping[str, Any], resident: Mapping[str, int]
) -> dict[str, int]:
    """Budgets with room for all slots and so many layers: on each device, in host memory."""
    quiet = {name: options[name] for name in options if name not in ("on_copy", "track_progress")}
    with open_checkpoint(device, path, **{**quiet, "read_mode": "buffered"}) as streamer:
        plan = streamer.plan
    placement, found = plan.placement, dict[str, int]()
    if "device" in resident:
        slots = sum if plan.machine.unified else max
        room = resident["device"] * max(size.device_nbytes for size in plan.sizes)
        found["device_budget"] = slots(placement.device_bytes) + room
    if "host" in resident:
        room = resident["host"] * max(size.host_nbytes for size in plan.sizes)
        found["host_budget"] = placement.host_bytes + room
    return found


def of_tier(streamer: LayerStreamer, tier: str) -> list[int]:
    """The layers that live in a tier."""
    return [i for i, placed in enumerate(streamer.plan.tiers) if placed == tier]


def assert_nothing_is_left(device: Any) -> None:
    """No page lock and no pending copy of what is closed is left on a fake device."""
    for one in device if isinstance(device, list) else [device]:
        if isinstance(one, FakeDevice):
            one.drain()
            assert not one._pinned
            assert not one.errors
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def nothing_left(device: Any) -> Iterator[None]:
    """What runs within leaves no thread, descriptor or page lock."""
    gc.collect()
    before = footprint()
    yield
    gc.collect()
    for thread in threading.enumerate():
        # One whose start was interrupted ends by itself.
        if thread.name.startswith("layer-streamer"):
            thread.join(END_SECONDS)
    assert footprint() == before
    assert_nothing_is_left(device)


class Boom(Exception):
    """What the tests' own layer_fn raises."""


def nothing(x: Any, weights: Any, layer_idx: int) -> Any:
    """A layer_fn that leaves x as it is."""
    return x


def raises_at(number: int) -> Callable[[Any, Any, int], Any]:
    """A layer_fn that raises Boom at one layer."""

    def layer_fn(x: Any, weights: Any, layer_idx: int) -> Any:
        if layer_idx == number:
            raise Boom
        return x

    return layer_fn


def assert_next_pass_is_exact(streamer: LayerStreamer, device: Any, tensors: Any) -> None:
    """One more pass hands out every layer's own bytes."""
    witness = Witness(device, tensors)
    streamer.run_pass(None, witness)
    assert witness.layers == list(range(NUM_LAYERS))
    witness.check()
