"""Passes that go forth and back: every layer's own bytes, and only those brought that have gone."""

from __future__ import annotations

import errno
import gc
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupter import Interrupt, Interrupter
from routes import NUM_LAYERS, Boom, assert_next_pass_is_exact, of_tier
from support import FailingDisk, Witness, in_thread, open_checkpoint

from layer_streamer import LayerStreamer, ReadError

FEW = pytest.mark.parametrize("route", ["cpu pools", "ring", "partial"])
STEP = [{"turns": True}, {"back": True, "turns": True}]
"""A forward, and the backward that follows it."""


def run(streamer: LayerStreamer, layer_fn: Any, **way: bool) -> None:
    with closing(streamer.sweep(**way)) as layers:
        for i, weights in layers:
            layer_fn(None, weights, i)


def steps_are_exact(streamer: LayerStreamer, device: Any, tensors: Any, count: int = 2) -> None:
    witness = Witness(device, tensors)
    for _ in range(count):
        for way in STEP:
            run(streamer, witness, **way)
    ahead = [*range(streamer.num_layers)]
    assert witness.layers == count * (ahead + ahead[::-1])
    witness.check()


def test_passes_that_turn_hand_out_every_layers_own_bytes(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    steps_are_exact(streamer, device, tensors, 3)
    assert_next_pass_is_exact(streamer, device, tensors)
    steps_are_exact(streamer, device, tensors, 1)


@FEW
def test_what_lies_in_slots_at_a_turn_is_neither_read_nor_copied(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    lanes = streamer._parts.pipeline.lanes  # type: ignore[union-attr]
    for number in range(6):
        run(streamer, lambda x, w, i: x, **STEP[number % 2])
        report = streamer.last_pass
        assert report is not None
        expected = []
        for at, lane in enumerate(lanes):
            some = [i for i in lane.memory.passes if i % len(lanes) == at]
            some = some[::-1] if number % 2 else some
            expected += some[len(lane.memory.slots) if number else 0 :]
        read = (
            {s.layer_idx for s in report.steps["read"].spans} if "read" in report.steps else set()
        )
        assert read == set(expected) & set(of_tier(streamer, "disk"))
        layouts = streamer._parts.pipeline.schedule.layouts  # type: ignore[union-attr]
        if read:
            assert report.steps["read"].bytes == sum(layouts[i].read_nbytes for i in read)
        if "copy" in report.steps:
            copied = {span.layer_idx for span in report.steps["copy"].spans}
            assert copied <= set(expected)


@FEW
def test_passes_without_a_turn_go_back_as_well(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    witness = Witness(device, tensors)
    for _ in range(3):
        run(streamer, witness, back=True)
    assert witness.layers == 3 * [*range(NUM_LAYERS)][::-1]
    witness.check()


SHARED: list[Any] = []


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("shared")
    tensors = tiny_checkpoint(path, NUM_LAYERS, hidden=40)
    with open_checkpoint(None, path, n_gpu=1, n_cpu_pinned=1, n_cpu=1) as streamer:
        SHARED.append((streamer, tensors))
        yield
        SHARED.clear()


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, NUM_LAYERS)), max_size=7))
@settings(max_examples=40)
def test_passes_of_any_heading_left_anywhere_are_exact(
    passes: list[tuple[bool, bool, int]],
) -> None:
    ((streamer, tensors),) = SHARED
    witness = Witness(None, tensors)
    for back, turns, left in passes:
        with closing(streamer.sweep(back=back, turns=turns)) as layers:
            for number, (i, weights) in enumerate(layers):
                assert i == (NUM_LAYERS - 1 - number if back else number)
                witness(None, weights, i)
                if number + 1 == left:
                    break
    witness.check()
    assert_next_pass_is_exact(streamer, None, tensors)


@FEW
@pytest.mark.parametrize("back", [False, True])
def test_after_an_error_in_a_pass_that_turns_the_next_ones_are_exact(
    streamer: LayerStreamer, device: Any, tensors: Any, back: bool
) -> None:
    def boom(x: Any, weights: Any, layer_idx: int) -> None:
        if layer_idx == 2:
            raise Boom

    for _ in range(2):
        if back:
            run(streamer, lambda x, w, i: x, **STEP[0])
        with pytest.raises(Boom):
            run(streamer, boom, **STEP[back])
        steps_are_exact(streamer, device, tensors)


def test_a_read_error_on_the_way_back_names_its_layer_and_the_next_step_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)
    options = {"n_gpu": 0, "n_cpu_pinned": 1, "n_cpu": 0, "read_mode": "buffered"}
    with open_checkpoint(None, tmp_path, **options) as streamer:
        layer = streamer.manifest.layers[1]
        extent = next(iter(layer.tensors.values())).extents[0]
        disk = FailingDisk(extent.offset, errno.EIO)
        monkeypatch.setattr("os.preadv", disk)
        steps_are_exact(streamer, None, tensors)

        def fail(x: Any, weights: Any, layer_idx: int) -> None:
            disk.times = 1 if layer_idx == NUM_LAYERS - 1 else disk.times

        run(streamer, lambda x, w, i: x, **STEP[0])
        with pytest.raises(ReadError, match="layer 1, tensor"):
            run(streamer, fail, **STEP[1])
        disk.times = 0
        steps_are_exact(streamer, None, tensors)


@FEW
def test_a_layer_that_was_written_to_is_brought_again_after_the_error(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    run(streamer, lambda x, w, i: x, **STEP[0])

    def write(x: Any, weights: Any, layer_idx: int) -> None:
        if hasattr(device, "drain"):
            device.drain()
        if layer_idx == NUM_LAYERS - 1:
            next(iter(weights.values())).add_(1)

    with pytest.raises(Exception, match="written to"):
        run(streamer, write, **STEP[1])
    steps_are_exact(streamer, device, tensors)


@pytest.mark.parametrize(
    ("route", "kind", "stride"),
    [
        ("pools", "opcode", 499),
        pytest.param("pools", "line", 7, marks=pytest.mark.slow),
        pytest.param("cpu pools", "line", 7, marks=pytest.mark.slow),
        pytest.param("ring", "opcode", 97, marks=pytest.mark.slow),
        pytest.param("two partial", "opcode", 97, marks=pytest.mark.slow),
    ],
)
def test_after_an_interrupt_of_passes_that_turn_the_next_ones_are_exact(
    streamer: LayerStreamer, device: Any, tensors: Any, kind: str, stride: int
) -> None:
    def use() -> None:
        for way in (*STEP, STEP[0]):
            run(streamer, lambda x, w, i: x, **way)
        sweep = streamer.sweep(**STEP[1])
        next(sweep)
        sweep.close()

    number, fired = 0, True
    while fired:
        try:
            with Interrupter(number, kind) as interrupter:
                use()
        except Interrupt:
            pass
        finally:
            sys.settrace(None)
        steps_are_exact(streamer, device, tensors, 1)
        if number % 2:
            assert in_thread(lambda: assert_next_pass_is_exact(streamer, device, tensors)) is None
        number, fired = number + stride, interrupter.fired
    assert number > 10 * stride


def test_a_hundred_steps_that_turn_leave_no_object_more(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)
    with open_checkpoint(None, tmp_path, n_gpu=1, n_cpu_pinned=1, n_cpu=1) as streamer:

        def count() -> int:
            gc.collect()
            return len(gc.get_objects())

        for number in range(220):
            if number == 20:
                before = count()
            run(streamer, lambda x, w, i: x, **STEP[number % 2])
        assert count() - before < 100


def test_a_pass_back_casts_as_a_pass_ahead_does(tmp_path: Path) -> None:
    tensors = tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)
    cast = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    with open_checkpoint(None, tmp_path, n_gpu=1, dtype=torch.bfloat16) as streamer:
        steps_are_exact(streamer, None, cast)
