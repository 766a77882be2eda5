"""The order of events where some layers are computed in host memory, in some of the passes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_safetensors
from fake_device import FakeDevice
from hypothesis import strategies as st
from ordering import NUM_LAYERS, POOLS, TENSORS, find_errors, seen_errors, time_without_errors
from routes import budgets
from tried import tried

from layer_streamer.passes.caller import Caller
from layer_streamer.transport.copier import Copier
from layer_streamer.transport.pool import DeviceSlot
from layer_streamer.transport.schedule import Orders
from layer_streamer.transport.stage import Heading, LaneRun, Run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(
        tmp_path_factory.mktemp("ordering") / "model.safetensors", TENSORS
    ).parent


@tried(
    25,
    200,
    seed=st.integers(0, 2**32),
    pools=st.sampled_from(sorted(POOLS)),
    read_mode=st.sampled_from(["buffered", "direct", "mapped"]),
    devices=st.integers(1, 2),
    computed=st.sets(st.integers(0, NUM_LAYERS - 1), min_size=1),
    resident=st.integers(0, 2),
    turns=st.booleans(),
    dtype=st.sampled_from([None, torch.bfloat16]),
)
def test_whichever_layers_the_host_computes_work_only_ever_sees_its_layers_bytes(  # noqa: PLR0917
    checkpoint: Path, seed: int, pools: str, read_mode: str, devices: int, computed: set[int],
    resident: int, turns: bool, dtype: Any,
) -> None:  # fmt: skip
    options = {**POOLS[pools], "read_mode": read_mode, "dtype": dtype}
    if resident:
        several = FakeDevice.several(devices, seed=0)
        options |= budgets(checkpoint, several, options, {"device": resident})
    options |= {"devices": devices, "host_layers": computed, "turns": turns}
    assert find_errors(checkpoint, seed, options) == []


def leave_out(*args: Any) -> None:
    """A wait that does not wait."""


def slots_of_all_layers(orders: Orders, lane_run: LaneRun) -> int:
    """Counts what the host computes as given back to the device's slots."""
    return lane_run.run.released


def whatever_the_host_does(caller: Caller, run: Run, heading: Heading) -> bool:
    """Goes on with a run that brings other layers than the pass needs."""
    return leads_on(caller, run, heading._replace(on_host=run.heading.on_host))


leads_on = Caller._leads_on
HALF: Mapping[str, Any] = {"host_layers": [1, 3]}
MUTATIONS: dict[str, tuple[type, str, Any, dict[str, Any]]] = {
    "the caller's stream does not wait for a copy between layers of the host": (
        Caller, "order_after_copy", leave_out, {"n_gpu": 1, "read_mode": "mapped"}),
    "a copy does not wait for the work on its slot, a layer of the host ago": (
        DeviceSlot, "order_after_uses", leave_out, {"n_gpu": 0, "read_mode": "mapped"}),
    "a copy takes a slot when the host gives a layer back": (
        Orders, "released", slots_of_all_layers, {"n_gpu": 1, "read_mode": "mapped"}),
    "a run goes on although the next pass needs other layers": (
        Caller, "_leads_on", whatever_the_host_does, {"n_gpu": 1, "n_cpu_pinned": 2}),
    "a copy waits for no slot while the host computes": (
        Copier, "await_slot", lambda copier, lane_run, n: True, {"n_gpu": 0}),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_taking_out_one_wait_between_host_layers_is_seen(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    owner, name, replacement, options = MUTATIONS[mutation]
    options = {**options, **HALF}
    seconds = time_without_errors(checkpoint, options)
    monkeypatch.setattr(owner, name, replacement)
    assert any(seen_errors(checkpoint, options, seconds)), f"no schedule noticed: {mutation}"
