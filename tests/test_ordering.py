"""The order of reads, copies and compute, over a device that does its work late."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tensors, write_safetensors
from fake_device import FakeDevice, FakeStream
from hypothesis import given, settings
from hypothesis import strategies as st
from support import open_checkpoint

from layer_streamer import LayerStreamer, StreamerError
from layer_streamer.caller import Caller
from layer_streamer.copier import Copier, DeviceTarget, Memcpy
from layer_streamer.pipeline import Pipeline
from layer_streamer.pool import DeviceSlot, Scratch
from layer_streamer.reader import Feeder
from layer_streamer.worker import LaneRun, Stage

NUM_LAYERS = 5
HANG_SECONDS = 5.0
# Larger than a page: smaller layers lie at their own phase in a slot and would not collide.
TENSORS = tiny_tensors(NUM_LAYERS, hidden=48)
POOLS = {
    "pinned": {"n_gpu": 1, "n_cpu_pinned": 2},
    "both": {"n_gpu": 0, "n_cpu_pinned": 1, "n_cpu": 1},
    "pageable": {"n_gpu": 2, "n_cpu_pinned": None, "n_cpu": 1},
    "none": {"n_gpu": 1, "n_cpu_pinned": None, "n_cpu": None},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(
        tmp_path_factory.mktemp("ordering") / "model.safetensors", TENSORS
    ).parent


class LaunchFailed(Exception):
    """What the test's layer_fn raises after it launched work."""


class Engine:
    """A caller that launches work which checks, when it runs, what the slot holds."""

    def __init__(self, device: FakeDevice, seed: int, dtype: torch.dtype | None) -> None:
        self._device = device
        self._random = random.Random(seed)
        self._dtype = dtype
        self._streams = [device.default_stream, device.new_stream(), device.new_stream()]

    def run(self, streamer: LayerStreamer, passes: int) -> None:
        copier = streamer._parts.pipeline.lanes[0].copier
        for number in range(passes):
            if number % 3 == 1:
                # torch deals streams out in turn: the caller may be given the copier's.
                self._streams.append(copier.stream)
            fails_at = self._random.choice([None, None, 0, 2, NUM_LAYERS - 1])
            with self._device.on(self._random.choice(self._streams)), ExitStack() as stack:
                try:
                    streamer.run_pass(0, lambda x, w, i, f=fails_at: self._layer(w, i, f, stack))
                except LaunchFailed:
                    continue

    def _layer(self, weights: Any, layer_idx: int, fails_at: int | None, stack: ExitStack) -> int:
        # More than one piece of work a layer, and sometimes a change of stream in between.
        for key, tensor in weights.items():
            self._device.launch(self._check(tensor, layer_idx, key))
            if self._random.random() < 0.3:
                before = self._device.current_stream()
                stream = self._random.choice(self._streams)
                self._order(before, stream)
                stack.enter_context(self._device.on(stream))
        if layer_idx == fails_at:
            raise LaunchFailed
        return 0

    def launch(self, weights: Any, layer_idx: int, fails_at: int | None = None) -> int:
        """A layer_fn that launches its checks on the current stream."""
        for key, tensor in weights.items():
            self._device.launch(self._check(tensor, layer_idx, key))
        if layer_idx == fails_at:
            raise LaunchFailed
        return 0

    def _order(self, before: FakeStream, after: FakeStream) -> None:
        """A change of stream within a layer is ordered by the user: new work waits for old."""
        event = self._device.new_event()
        event.record(before)
        after.wait_event(event)

    def _check(self, tensor: torch.Tensor, layer_idx: int, key: str) -> Callable[[], None]:
        expected = TENSORS[f"model.layers.{layer_idx}.{key}"]
        expected = expected if self._dtype is None else expected.to(self._dtype)

        def look() -> None:
            if not torch.equal(tensor, expected):
                self._device.errors.append(f"layer {layer_idx} {key}: not its own bytes")

        return look


def find_errors(checkpoint: Path, seed: int, options: dict[str, Any], passes: int = 4) -> list[str]:
    """Run passes over a fake device with this schedule; what its work saw wrong."""
    device = FakeDevice(seed)
    streamer = open_on(device, checkpoint, options)
    # A pass that hangs (as a mutation may make it) is ended by closing the streamer.
    guard = threading.Timer(HANG_SECONDS, streamer.close)
    guard.start()
    try:
        with streamer:
            Engine(device, seed, options.get("dtype")).run(streamer, passes)
    finally:
        guard.cancel()
    device.drain()
    return device.errors


@settings(deadline=None, max_examples=150)
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
        return stage.await_true(lane_run.run, lambda: stage.freed(lane_run) >= n - count(stage))

    return await_slot


def one_step_early(handed_on: Callable[[LaneRun], int]) -> Any:
    """A wait for a step that goes on one step before it is handed on."""

    def await_source(stage: Stage, lane_run: LaneRun, n: int) -> bool:
        return stage.await_true(lane_run.run, lambda: handed_on(lane_run) >= n)

    return await_source


def device_slot_early(target: DeviceTarget, stage: Stage, lane_run: LaneRun, n: int) -> bool:
    freed = target._orders.released
    return stage.await_true(lane_run.run, lambda: freed(lane_run) >= n - target._pool.count)


def record_hand_out_only(slot: DeviceSlot, current: FakeStream) -> None:
    slot._uses[0].record(slot.handed_on)
    slot._num_uses = 1


def record_current_only(slot: DeviceSlot, current: FakeStream) -> None:
    slot._uses[0].record(current)
    slot._num_uses = 1


def abort_without_record(caller: Caller) -> None:
    run = caller._control.run
    if run is not None:
        run.aborted = True
    caller._pipeline.publish(0 if run is None else run.base_pass)


def change_stream_at_once(copier: Copier, fresh: FakeStream) -> None:
    copier.stream, copier._next_stream = fresh, None
    copier._device.enter_thread(fresh)


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
    "a copy takes a slot too early": (
        DeviceTarget, "await_slot", device_slot_early, "pinned", None),
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
    assert all(not find_errors(checkpoint, seed, options) for seed in range(5))
    monkeypatch.setattr(owner, name, replacement)
    assert any(seen_errors(checkpoint, options)), f"no schedule noticed: {mutation}"


def seen_errors(checkpoint: Path, options: dict[str, Any]) -> Iterator[bool]:
    for seed in range(200):
        try:
            yield bool(find_errors(checkpoint, seed, options))
        except (StreamerError, RuntimeError, IndexError):
            yield True


def errors_after_a_change_of_stream(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave a pass with a copy that has not run, begin the next one on the copier's own stream, and
    let the new copy stream run ahead of the old one as far as it may."""
    device = FakeDevice(seed=0, eager=0.0)
    engine = Engine(device, 0, None)
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


def open_on(device: FakeDevice, checkpoint: Path, options: dict[str, Any]) -> LayerStreamer:
    return open_checkpoint(device, checkpoint, read_threads=2, **options)
