"""Threads that read parts and send them on: what each may do while others are slow."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint, write_safetensors
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from ordering import HANG_SECONDS, NUM_LAYERS, TENSORS, Engine, LaunchFailed, open_on
from support import open_checkpoint

from layer_streamer import CheckpointChangedError, LayerStreamer
from layer_streamer.copier import RingCopier
from layer_streamer.device import CpuDevice
from layer_streamer.files import OpenFiles
from layer_streamer.layout import PAGE
from layer_streamer.memory import HostArena
from layer_streamer.ring import Ring, RingRun
from layer_streamer.schedule import Order, Orders
from layer_streamer.worker import Progress, Run

RING = {"n_gpu": 1, "n_cpu_pinned": None, "n_cpu": None, "read_chunk": PAGE}
YIELDS = 20_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_safetensors(tmp_path / "model.safetensors", TENSORS).parent


def give_time_until(condition: Callable[[], bool]) -> None:
    """Let other threads do what they should not; they do not have for ever."""
    for _ in range(YIELDS):
        if condition():
            return
        os.sched_yield()


class Held:
    """The sending of the last part of one step, which waits for ``until``."""

    def __init__(self, streamer: LayerStreamer, number: int, until: Callable[[], None]) -> None:
        (self.lane,) = streamer._parts.pipeline.lanes
        crossing = self.lane.carriers[0]._crossing
        self.there, self.sent = threading.Event(), threading.Event()
        self._enqueue, self._until = crossing.enqueue, until
        self._number, self._last = number, crossing.orders.read.before(number + 1) - 1
        crossing.enqueue = self.enqueue

    def enqueue(self, load: Any, *where: Any) -> None:
        if (load.k, load.number) != (self._last, self._number) or self.there.is_set():
            self._enqueue(load, *where)
            return
        self.there.set()
        self._until()
        self._enqueue(load, *where)
        self.sent.set()


def errors_of_a_part_that_outlives_its_run(checkpoint: Path) -> list[str]:
    """A pass fails while a part of the next one, of layer 0, is about to be sent to slot 1."""
    device = FakeDevice(seed=0, eager=0.0)
    engine = Engine([device], 0, None)
    with open_on(device, checkpoint, RING) as streamer:
        control, old = streamer._parts.pipeline.control, []

        def until_the_next_run_is_in_the_slot() -> None:
            while not old or (control.run is old[0] and not control.closing):
                os.sched_yield()
            give_time_until(lambda: control.run.lanes[0].copied.done >= 2)

        held = Held(streamer, NUM_LAYERS, until_the_next_run_is_in_the_slot)

        def fail_once_held(x: int, weights: Any, layer_idx: int) -> int:
            if layer_idx == NUM_LAYERS - 1:
                old.append(control.run)
                assert held.there.wait(HANG_SECONDS)
            return engine.launch(weights, layer_idx, fails_at=NUM_LAYERS - 1)

        def look_once_sent(x: int, weights: Any, layer_idx: int) -> int:
            assert held.sent.wait(HANG_SECONDS)
            held.lane.copier.stream.synchronize()
            return engine.launch(weights, layer_idx)

        with pytest.raises(LaunchFailed):
            streamer.run_pass(0, fail_once_held)
        streamer.run_pass(0, look_once_sent)
    device.drain()
    return device.errors


def test_a_run_begins_when_no_part_of_the_earlier_one_can_be_sent_any_more(
    checkpoint: Path,
) -> None:
    assert errors_of_a_part_that_outlives_its_run(checkpoint) == []


def test_a_part_that_is_sent_into_the_next_run_is_seen(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RingCopier, "carriers_left", lambda copier, run: True)
    assert errors_of_a_part_that_outlives_its_run(checkpoint)


def errors_of_a_change_of_stream(checkpoint: Path) -> list[str]:
    """The caller computes on the copy stream, and then on another, while a part is about to be sent
    on the former."""
    device = FakeDevice(seed=0, eager=0.0)
    engine, third = Engine([device], 0, None), device.new_stream()
    with ExitStack() as stack, open_on(device, checkpoint, RING) as streamer:
        copier = streamer._parts.pipeline.lanes[0].copier
        first = copier.stream

        def until_another_layer_may_be_begun() -> None:
            while held.lane.copier._control.run.released <= NUM_LAYERS:
                os.sched_yield()
            give_time_until(lambda: copier.stream is not first)

        held = Held(streamer, NUM_LAYERS + 1, until_another_layer_may_be_begun)

        looked, wait_reusable = threading.Event(), held.lane.host_pools[0].wait_reusable

        def wait_until_looked(slot: int) -> None:
            # To fill the part's slot again is to wait for its copy: that comes too soon.
            assert not held.sent.is_set() or looked.wait(HANG_SECONDS)
            wait_reusable(slot)

        held.lane.host_pools[0].wait_reusable = wait_until_looked

        def look(x: int, weights: Any, layer_idx: int) -> int:
            engine.launch(weights, layer_idx)
            device.current_stream().synchronize()
            return 0

        def look_elsewhere(x: int, weights: Any, layer_idx: int) -> int:
            look(x, weights, layer_idx)
            if layer_idx == 0:
                stack.enter_context(device.on(third))
            else:
                looked.set()
            return 0

        streamer.run_pass(0, look)
        assert held.there.wait(HANG_SECONDS)
        stack.enter_context(device.on(first))
        streamer.run_pass(0, look_elsewhere)
        assert held.sent.is_set()
        assert copier.stream is not first
    return device.errors


def test_the_copy_stream_changes_when_no_part_can_be_sent_on_the_old_one(
    checkpoint: Path,
) -> None:
    assert errors_of_a_change_of_stream(checkpoint) == []


def test_a_copy_stream_that_changes_under_a_part_is_seen(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RingCopier, "stream_unused", lambda copier, lane_run: True)
    assert errors_of_a_change_of_stream(checkpoint)


@settings(deadline=None)
@given(
    parts=st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any),
    passes=st.integers(1, 3),
    data=st.data(),
)
def test_every_part_is_taken_once_and_a_step_ends_with_its_last(
    parts: list[int], passes: int, data: st.DataObject
) -> None:
    length = len(parts)
    read = Order([i for i, count in enumerate(parts) for _ in range(count)], length)
    orders = Orders((None,) * length, Order(range(length), length), read)  # type: ignore[arg-type]
    run = RingRun(Run(0), Progress(1, length), orders)
    held: list[int] = []
    taken, ended = [], []
    while len(ended) < passes * sum(count > 0 for count in parts):
        if held and (len(taken) == read.count * passes or data.draw(st.booleans())):
            number = held.pop(data.draw(st.integers(0, len(held) - 1)))
            if run.leave(number):
                assert number not in held
                ended.append(number)
        else:
            load = run.take(7)
            assert load.place == taken.count(load.number)
            assert (load.k, run.newest, load.slot) == (len(taken), load.number, 7)
            taken.append(load.number)
            held.append(load.number)
        assert run.held == len(held)
    expected = [
        p * length + i for p in range(passes) for i in range(length) for _ in range(parts[i])
    ]
    assert taken == expected
    assert sorted(ended) == sorted(set(expected))


@pytest.mark.parametrize("read_threads", [1, 3, 64])
def test_there_are_no_more_readers_than_slots(tmp_path: Path, read_threads: int) -> None:
    tiny_checkpoint(tmp_path, 2, hidden=48)
    options = {**RING, "read_threads": read_threads}
    with open_checkpoint(FakeDevice(1), tmp_path, **options) as streamer:
        (lane,) = streamer._parts.pipeline.lanes
        assert len(lane.carriers) == min(read_threads, lane.host_pools[0].count)


def at_rest(streamer: LayerStreamer) -> tuple[Ring, RingRun]:
    """The ring of one lane once nothing more can be read, and the run."""
    (lane,) = streamer._parts.pipeline.lanes
    (run,) = streamer._parts.pipeline.control.run.lanes
    deadline = time.monotonic() + HANG_SECONDS
    while len(run.waiting) < lane.host_pools[0].count:
        assert time.monotonic() < deadline
        os.sched_yield()
    return lane.host_pools[0], run


@pytest.mark.parametrize("read_threads", [1, 2, 5])
def test_what_is_read_ahead_fills_the_ring(checkpoint: Path, read_threads: int) -> None:
    options = {**RING, "read_threads": read_threads}
    with open_checkpoint(FakeDevice(1), checkpoint, **options) as streamer:
        streamer.run_pass(0, lambda x, w, i: x)
        ring, run = at_rest(streamer)
        assert sorted(load.slot for load in run.waiting) == list(range(ring.count))
        assert ring.take() is None and not ring.can_take()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), ends=st.lists(st.integers(0, NUM_LAYERS), max_size=8))
def test_passes_that_are_left_anywhere_lose_no_slot_of_the_ring(seed: int, ends: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_safetensors(Path(folder) / "model.safetensors", TENSORS).parent
        with open_checkpoint(FakeDevice(seed), path, read_threads=3, **RING) as streamer:
            for end in ends:
                for layer_idx, _ in streamer.sweep():
                    if layer_idx == end:
                        break
            streamer.run_pass(0, lambda x, w, i: x)
            ring, run = at_rest(streamer)
            assert sorted(load.slot for load in run.waiting) == list(range(ring.count))


def test_the_slot_that_came_free_last_is_filled_next() -> None:
    device = FakeDevice(0, eager=0.0)
    ring = Ring("ring", HostArena([PAGE] * 3, CpuDevice(), pinned=False, threads=1), device)
    stream = device.new_stream()
    first, second = ring.take(), ring.take()
    assert first is not None and second is not None
    for slot in (first, second):
        ring.copy_enqueued(slot, stream)
        ring.give_back(slot)
    third = ring.take()
    assert third not in (first, second), "the device has yet to read those"
    stream.synchronize()
    assert [ring.take(), ring.take(), ring.take()] == [second, first, None]


def test_with_all_slots_on_their_way_the_oldest_is_waited_for() -> None:
    device = FakeDevice(0, eager=0.0)
    ring = Ring("ring", HostArena([PAGE] * 2, CpuDevice(), pinned=False, threads=1), device)
    stream = device.new_stream()
    taken = [ring.take(), ring.take()]
    for slot in taken:
        ring.copy_enqueued(slot, stream)
        ring.give_back(slot)
    assert ring.can_take()
    assert [ring.take(), ring.take()] == taken
    ring.wait_reusable(taken[1])
    assert not stream.operations


def test_files_are_looked_at_once_a_layer_not_once_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path, 3, hidden=48)
    with open_checkpoint(FakeDevice(1), tmp_path, **RING) as streamer:
        assert streamer._parts.pipeline.lanes[0].orders.read.count > 2 * 3
        looks, check = [], OpenFiles.check_unchanged

        def count(files: OpenFiles, *paths: Any) -> None:
            looks.append(threading.current_thread().name)
            check(files, *paths)

        monkeypatch.setattr(OpenFiles, "check_unchanged", count)
        for _ in range(4):
            streamer.run_pass(None, lambda x, w, i: x)
    own = [name for name in looks if name.startswith("layer-streamer-read")]
    assert 4 * 3 <= len(own) <= 4 * 3 + 3


def test_a_file_that_changes_while_its_layer_is_read_is_that_layers_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice(1)
    with open_on(device, checkpoint, RING) as streamer:
        seen: list[int] = []
        held = Held(streamer, 3, lambda: os.utime(checkpoint / "model.safetensors", ns=(1, 1)))
        with pytest.raises(CheckpointChangedError, match="changed since it was opened"):
            streamer.run_pass(0, lambda x, w, i: seen.append(i) or x)
        assert held.sent.is_set()
        assert seen == [0, 1, 2][: len(seen)]
