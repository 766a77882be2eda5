"""The order of reads, copies and compute, over a device that does its work late."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_safetensors
from fake_device import FakeDevice, FakeStream
from hypothesis import given, settings
from hypothesis import strategies as st
from ordering import (
    HANG_SECONDS,
    NUM_LAYERS,
    POOLS,
    TENSORS,
    Engine,
    LaunchFailed,
    find_errors,
    open_on,
    seen_errors,
    time_without_errors,
)

from layer_streamer.passes.caller import Caller
from layer_streamer.transport.copier import Copier, Memcpy
from layer_streamer.transport.pipeline import Pipeline
from layer_streamer.transport.pool import DeviceSlot, Scratch
from layer_streamer.transport.reader import Feeder
from layer_streamer.transport.stage import Heading, LaneRun, Stage


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(
        tmp_path_factory.mktemp("ordering") / "model.safetensors", TENSORS
    ).parent


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32),
    pools=st.sampled_from(sorted(POOLS)),
    batches=st.fixed_dictionaries(
        {
            name: st.sampled_from([None, 1, 2, 9])
            for name in ("batch_gpu", "batch_cpu_pinned", "batch_cpu")
        }
    ),
    dtype=st.sampled_from([None, torch.bfloat16]),
)
def test_work_launched_on_a_layer_only_ever_sees_that_layers_bytes(
    checkpoint: Path, seed: int, pools: str, batches: dict[str, int | None], dtype: Any
) -> None:
    options = {**POOLS[pools], **batches, "dtype": dtype}
    assert find_errors(checkpoint, seed, options) == []


def leave_out(*args: Any) -> None:
    """A wait that does not wait."""


def one_slot_early(count: Callable[[Any], int]) -> Any:
    """A wait for a free slot that takes the slot one step before it is free."""

    def await_slot(stage: Any, lane_run: LaneRun, n: int) -> bool:
        return stage.await_true(
            lane_run.run, lambda: stage.num_emptied(lane_run) >= n - count(stage)
        )

    return await_slot


def one_step_early(handed_on: Callable[[LaneRun], int]) -> Any:
    """A wait for a step that goes on one step before it is handed on."""

    def await_source(stage: Stage, lane_run: LaneRun, n: int) -> bool:
        return stage.await_true(lane_run.run, lambda: handed_on(lane_run) >= n)

    return await_source


def device_slot_early(copier: Copier, lane_run: LaneRun, n: int) -> bool:
    freed = lane_run.orders.released
    return copier.await_true(lane_run.run, lambda: freed(lane_run) >= n - len(copier._slots))


def record_hand_out_only(slot: DeviceSlot, current: FakeStream) -> None:
    slot._uses[0].record(slot.handed_on)
    slot._num_uses = 1


def record_current_only(slot: DeviceSlot, current: FakeStream) -> None:
    slot._uses[0].record(current)
    slot._num_uses = 1


def abort_without_record(caller: Caller, heading: Heading | None = None) -> None:
    run = caller._control.run
    run.aborted = True
    caller._pipeline.publish(run.base_pass, heading or run.heading._replace(back=False))


def one_part_early(copier: Copier, lane_run: LaneRun, k: int) -> bool:
    return copier.await_true(lane_run.run, lambda: lane_run.staged.out >= k)


def all_parts_but_the_last_in_time(
    copier: Copier, lane_run: LaneRun, slot: DeviceSlot, number: int
) -> bool:
    """Says that the step is ready before its last part is copied."""
    copy_part, last = copier._copy_part, lane_run.orders.read.before(number + 1) - 1

    def copy_early(lane_run: LaneRun, slot: DeviceSlot, number: int, k: int) -> None:
        if k == last:
            slot.ready.record(copier.stream)
            lane_run.copied.advance()
            copier.target_bell.ring()
            time.sleep(0)  # lets those who wait have their turn, as a real copy would
            lane_run.copied.done -= 1
        copy_part(lane_run, slot, number, k)

    copier._copy_part = copy_early  # type: ignore[method-assign]
    try:
        return take_reads(copier, lane_run, slot, number)
    finally:
        copier._copy_part = copy_part  # type: ignore[method-assign]


def change_stream_at_once(copier: Copier, fresh: FakeStream) -> None:
    copier.stream, copier._next_stream = fresh, None
    copier._device.use_in_this_thread(fresh)


take_reads = Copier._take_reads
MUTATIONS: dict[str, tuple[type, str, Any, str, Any]] = {
    "the caller's stream does not wait for the copy": (
        Caller, "order_after_copy", leave_out, "pinned", None),
    "the copy does not wait for the caller's work": (
        DeviceSlot, "order_after_uses", leave_out, "pinned", None),
    "release is recorded on the hand-out's stream only": (
        DeviceSlot, "record_uses", record_hand_out_only, "pinned", None),
    "an aborted pass does not record its slot's use": (
        Caller, "abort", abort_without_record, "pinned", None),
    "a read does not wait for the copy out of its pinned slot": (
        Feeder, "wait_reusable", leave_out, "pinned", None),
    "a read does not wait for the copy out of its pageable slot": (
        Feeder, "wait_reusable", leave_out, "pageable", None),
    "a memcpy does not wait for the copy out of its slot": (
        Memcpy, "wait_reusable", leave_out, "both", None),
    "the copy does not wait for the slot's allocation": (
        Copier, "order_after_allocation", leave_out, "pinned", None),
    "a read takes a slot too early": (
        Feeder, "await_slot",
        one_slot_early(lambda s: s._pool.count), "pinned", None),
    "a memcpy takes its source too early": (
        Memcpy, "await_source", one_step_early(lambda run: run.read.out), "both", None),
    "a memcpy takes a slot too early": (
        Memcpy, "await_slot",
        one_slot_early(lambda s: s._target.count), "both", None),
    "a copy takes its source too early": (
        Copier, "await_source", one_step_early(lambda run: run.staged.out), "pinned", None),
    "a copy takes a part too early": (
        Copier, "await_part", one_part_early, "ring", None),
    "a read does not wait for the copy out of its slot of the ring": (
        Feeder, "wait_reusable", leave_out, "ring", None),
    "a read takes a slot of the ring too early": (
        Feeder, "await_slot", one_slot_early(lambda s: s._pool.count), "ring", None),
    "parts are copied before the caller's work on the device slot": (
        DeviceSlot, "order_after_uses", leave_out, "ring", None),
    "a layer is ready before its last part is copied": (
        Copier, "_take_reads", all_parts_but_the_last_in_time, "ring", None),
    "a copy takes a slot too early": (
        Copier, "await_slot", device_slot_early, "pinned", None),
    "a cast does not wait for the work on the last cast": (
        Scratch, "order_after_uses", leave_out, "pinned", torch.bfloat16),
    "a run starts before the earlier ones are left": (
        Feeder, "_earlier_runs_left", lambda stage, run: True, "pinned", None),
    "close does not wait for the device": (Pipeline, "_wait_device", leave_out, "pinned", None),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_taking_out_one_wait_is_seen(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    owner, name, replacement, pools, dtype = MUTATIONS[mutation]
    options = {**POOLS[pools], "dtype": dtype}
    seconds = time_without_errors(checkpoint, options)
    monkeypatch.setattr(owner, name, replacement)
    assert any(seen_errors(checkpoint, options, seconds)), f"no schedule noticed: {mutation}"


def errors_after_a_change_of_stream(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave a pass with a copy that has not run, begin the next one on the copier's own stream, and
    let the new copy stream run ahead of the old one as far as it may."""
    device = FakeDevice(seed=0, eager=0.0)
    engine = Engine([device], 0, None)
    last, runs = NUM_LAYERS - 1, []
    begun, gate = threading.Event(), threading.Event()
    wait_reusable, avoid = Feeder.wait_reusable, Copier.avoid

    def gated(feeder: Feeder, slot: int) -> None:
        # A read that waits for a copy makes it run: no such read in the first run, and in the
        # second none of the stale copy's slot before the new copies have run.
        if not runs or feeder.run is runs[0]:
            while feeder._pool._in_flight[slot] and not feeder.run.aborted:
                os.sched_yield()
            return
        begun.wait(HANG_SECONDS)
        if slot == NUM_LAYERS:
            gate.wait(HANG_SECONDS)
        wait_reusable(feeder, slot)

    def avoided(copier: Copier, stream: Any) -> None:
        avoid(copier, stream)
        begun.set()

    def fail_after_prefetch(x: int, weights: Any, layer_idx: int) -> int:
        runs.append(copier._control.run)
        while layer_idx == last and copier._control.run.lanes[0].copied.done < NUM_LAYERS + 1:
            os.sched_yield()
        return engine.launch(weights, layer_idx, fails_at=last)

    def run_ahead(x: int, weights: Any, layer_idx: int) -> int:
        while layer_idx == 0 and copier._control.run.lanes[0].copied.done < 2:
            os.sched_yield()
        copier.stream.synchronize()
        gate.set()
        return engine.launch(weights, layer_idx)

    with open_on(device, checkpoint, {"n_gpu": 1, "n_cpu_pinned": NUM_LAYERS}) as streamer:
        copier = streamer._parts.pipeline.lanes[0].copier
        first = copier.stream
        monkeypatch.setattr(Feeder, "wait_reusable", gated)
        with pytest.raises(LaunchFailed):
            streamer.run_pass(0, fail_after_prefetch)
        monkeypatch.setattr(Copier, "avoid", avoided)
        with device.on(first):
            streamer.run_pass(0, run_ahead)
        assert copier.stream is not first
    device.drain()
    return device.errors


def test_a_copy_stream_that_is_the_callers_own_is_left_for_another(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert errors_after_a_change_of_stream(checkpoint, monkeypatch) == []


def test_a_new_copy_stream_that_does_not_wait_for_the_old_one_is_seen(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Copier, "_change_stream", change_stream_at_once)
    assert errors_after_a_change_of_stream(checkpoint, monkeypatch)
