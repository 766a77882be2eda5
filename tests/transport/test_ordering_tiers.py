"""The order of events where layers are resident, files mapped, devices several."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_safetensors
from fake_device import FakeDevice
from hypothesis import strategies as st
from ordering import (
    HANG_SECONDS,
    MUTANT_SECONDS,
    POOLS,
    TENSORS,
    find_errors,
    open_on,
    seen_errors,
    time_without_errors,
)
from routes import budgets
from tried import tried

from layer_streamer import ClosedError
from layer_streamer.passes.caller import Caller
from layer_streamer.transport.copier import Copier
from layer_streamer.transport.memory import Bounces
from layer_streamer.transport.pipeline import Pipeline
from layer_streamer.transport.reader import Feeder
from layer_streamer.transport.schedule import Orders
from layer_streamer.transport.stage import LaneRun, Run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(
        tmp_path_factory.mktemp("ordering") / "model.safetensors", TENSORS
    ).parent


def with_budgets(
    checkpoint: Path, options: Mapping[str, Any], resident: Mapping[str, int]
) -> dict[str, Any]:
    """The options with room for so many resident layers, on each device and in host memory."""
    plain = {name: value for name, value in options.items() if name != "devices"}
    devices = FakeDevice.several(options.get("devices", 1), seed=0)
    return {**options, **budgets(checkpoint, devices, plain, resident)}


@tried(
    40,
    80,
    seed=st.integers(0, 2**32),
    pools=st.sampled_from(sorted(POOLS)),
    read_mode=st.sampled_from(["buffered", "direct", "mapped"]),
    devices=st.integers(1, 3),
    resident=st.fixed_dictionaries({}, optional={n: st.integers(0, 5) for n in ("device", "host")}),
    batch=st.sampled_from([None, 2]),
    dtype=st.sampled_from([None, torch.bfloat16]),
)
def test_whatever_the_budgets_modes_and_devices_work_only_ever_sees_its_layers_bytes(  # noqa: PLR0917
    checkpoint: Path, seed: int, pools: str, read_mode: str, devices: int,
    resident: dict[str, int], batch: int | None, dtype: Any,
) -> None:  # fmt: skip
    if read_mode == "mapped":
        resident.pop("host", None)  # mapped files are host memory for every layer
    options = {**POOLS[pools], "read_mode": read_mode, "devices": devices, "dtype": dtype}
    options |= {"batch_gpu": batch, "batch_cpu": batch, "batch_cpu_pinned": batch}
    assert find_errors(checkpoint, seed, with_budgets(checkpoint, options, resident)) == []


def leave_out(*args: Any) -> None:
    """A wait that does not wait."""


def one_more(count: Callable[[Orders, LaneRun], int]) -> Any:
    """A count that is one ahead of what has happened."""
    return lambda orders, lane_run: count(orders, lane_run) + 1


def one_slot_early(feeder: Feeder, lane_run: LaneRun, n: int) -> bool:
    count = feeder._pool.count
    return feeder.await_true(lane_run.run, lambda: feeder.num_emptied(lane_run) >= n - count)


def one_read_early(copier: Copier, lane_run: LaneRun, n: int) -> bool:
    k = lane_run.orders.read.find(lane_run.orders.copied.number(n))
    if k is None:
        return copier.await_true(lane_run.run, lambda: True)
    return copier.await_true(lane_run.run, lambda: lane_run.staged.out >= k)


def reads_of_the_other_lane(copier: Copier, lane_run: LaneRun, n: int) -> bool:
    other = lane_run.run.lanes[1 - copier._lane_idx]
    k = lane_run.orders.read.before(lane_run.orders.copied.number(n))
    return copier.await_true(lane_run.run, lambda: other.staged.out > k)


def copies_of_the_first_lane(
    caller: Caller, run: Run, lane_run: LaneRun, n: int, number: int
) -> None:
    await_step(caller, run, run.lanes[0], n, number)


def slots_of_all_lanes(copier: Copier, lane_run: LaneRun, n: int) -> bool:
    """Counts the releases of whatever lane as this lane's."""
    run, count = lane_run.run, len(copier._slots)
    return copier.await_true(run, lambda: run.released > n - count)


def wait_for_the_first_device(pipeline: Pipeline) -> None:
    pipeline.lanes[0].wait_device()


await_step = Caller._await
ONE = {"n_gpu": 0, "n_cpu_pinned": 1}
SOME = {"device": 1, "host": 1}
TWO = {**ONE, "devices": 2}
MAPPED = {"n_gpu": 1, "read_mode": "mapped"}
ARENA = {"n_gpu": 1, "read_mode": "buffered", "host_budget": "1GiB"}
MUTATIONS: dict[str, tuple[type, str, Any, dict[str, Any], dict[str, int]]] = {
    "a resident layer is copied before its memory is its own": (
        Bounces, "order_after_allocation", leave_out, ONE, {"device": 2}),
    "a bounce is filled again before the device has read it": (
        Bounces, "wait_copied", leave_out, ONE, {"device": 2}),
    "a copy takes a layer from disk before it is read, between resident ones": (
        Copier, "await_source", one_read_early, ONE, SOME),
    "a read takes a slot one copy too early, between resident layers": (
        Feeder, "await_slot", one_slot_early, ONE, SOME),
    "close gives back the page locks of an arena while copies run": (
        Pipeline, "_wait_device", leave_out, ARENA, {}),
    "close gives back the page locks of mapped files while copies run": (
        Pipeline, "_wait_device", leave_out, MAPPED, {}),
    "close waits for the first of several devices": (
        Pipeline, "_wait_device", wait_for_the_first_device, {**MAPPED, "devices": 2}, {}),
    "a lane copies what the other lane has read": (
        Copier, "await_source", reads_of_the_other_lane, TWO, {}),
    "a layer is handed out when another lane has copied": (
        Caller, "_await", copies_of_the_first_lane, TWO, {}),
    "a lane takes a slot when a step of any lane is given back": (
        Copier, "await_slot", slots_of_all_lanes, TWO, {}),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_taking_out_one_wait_is_seen(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    owner, name, replacement, options, resident = MUTATIONS[mutation]
    options = with_budgets(checkpoint, options, resident) if resident else options
    seconds = time_without_errors(checkpoint, options)
    monkeypatch.setattr(owner, name, replacement)
    assert any(seen_errors(checkpoint, options, seconds)), f"no schedule noticed: {mutation}"


def find_errors_on_the_cpu(
    checkpoint: Path, options: Mapping[str, Any], seconds: float = HANG_SECONDS
) -> list[str]:
    """Look at each layer only when reads have come as far as they go while it is in hand."""
    errors: list[str] = []
    with open_on(None, checkpoint, options) as streamer:
        pipeline = streamer._parts.pipeline
        lane = pipeline.lanes[0]
        assert set(streamer.plan.tiers) == {"device", "disk"}

        def look(x: Any, weights: Mapping[str, torch.Tensor], layer_idx: int) -> None:
            run = pipeline.control.run
            n = run.lanes[0].orders.copied.before(run.released)
            ahead = n + len(lane.memory.slots) if layer_idx in lane.memory.passes else 0
            while run.lanes[0].read.done < ahead and not streamer.closed:
                os.sched_yield()
            for _ in range(50):  # one read more is one too many: give it the time
                os.sched_yield()
            for key, tensor in weights.items():
                if not torch.equal(tensor, TENSORS[f"model.layers.{layer_idx}.{key}"]):
                    errors.append(f"layer {layer_idx} {key}: not its own bytes")

        # Reads that overtake each other may not be counted: such a pass hangs.
        guard = threading.Timer(seconds, streamer.close)
        guard.start()
        try:
            for _ in range(4):
                streamer.run_pass(None, look)
        except ClosedError:
            errors.append("a pass hung")
        finally:
            guard.cancel()
    return errors


def test_on_the_cpu_a_read_that_takes_a_slot_one_release_early_is_seen(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"n_gpu": 0, "n_cpu_pinned": 0, "read_mode": "buffered"}
    options |= budgets(checkpoint, None, options, {"device": 1})
    began = time.monotonic()
    assert find_errors_on_the_cpu(checkpoint, options) == []
    seconds = max(MUTANT_SECONDS, 20 * (time.monotonic() - began))
    monkeypatch.setattr(Orders, "released", one_more(Orders.released))
    assert find_errors_on_the_cpu(checkpoint, options, seconds)
