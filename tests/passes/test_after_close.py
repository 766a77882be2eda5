"""What outlives a streamer's name, or the streamer: its sweep; its plan, memory and last pass."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from routes import NUM_LAYERS, Boom, assert_nothing_is_left, make_devices, nothing, open_route
from support import Witness, footprint, in_thread, open_checkpoint

from layer_streamer import LayerStreamer, PassReport


def essence(report: PassReport | None) -> Any:
    """What two looks at one pass must agree on: where clocks are compared, they differ a bit."""
    assert report is not None
    moved = {name: step.bytes for name, step in report.steps.items()}
    return report.seconds, report.num_layers, moved, report.peak_slots


def test_the_sweep_of_a_streamer_without_a_name_is_exact_and_then_closes_it(
    tmp_path: Path, tensors: Any, route: str, device: Any
) -> None:
    open_route(route, tmp_path, device).close()  # a GPU's driver opens descriptors of its own, once
    before, witness = footprint(), Witness(device, tensors)
    gc.disable()
    try:
        for layer_idx, weights in open_route(route, tmp_path, device).sweep():
            witness(None, weights, layer_idx)
        weights = None  # views of a mapped file, which they hold
        assert footprint() == before
    finally:
        gc.enable()
    witness.check()
    assert witness.layers == list(range(NUM_LAYERS))


def test_a_sweep_that_is_dropped_half_way_closes_the_streamer_that_it_kept(
    tmp_path: Path, tensors: Any, route: str, device: Any
) -> None:
    open_route(route, tmp_path, device).close()
    before = footprint()
    gc.disable()
    try:
        sweep = open_route(route, tmp_path, device).sweep()
        next(sweep)
        assert footprint() != before
        del sweep
        assert footprint() == before
    finally:
        gc.enable()
    assert_nothing_is_left(device)


def test_a_streamer_that_holds_its_own_sweep_is_collected_and_closes(
    tmp_path: Path, tensors: Any
) -> None:
    before = footprint()
    streamer: Any = open_checkpoint(None, tmp_path)
    streamer.loop = streamer.sweep()
    next(streamer.loop)
    del streamer
    gc.collect()
    assert footprint() == before


def test_plan_memory_and_last_pass_are_the_same_after_close(
    streamer: LayerStreamer, device: Any
) -> None:
    streamer.load_static("model.norm.weight")
    streamer.run_pass(torch.zeros(1), nothing)
    before = streamer.plan, streamer.memory, essence(streamer.last_pass), streamer.num_steps
    streamer.close()
    for _ in range(2):
        after = streamer.plan, streamer.memory, essence(streamer.last_pass), streamer.num_steps
        assert after == before
        streamer.close()
    assert_nothing_is_left(device)


def test_a_last_pass_that_nobody_asked_for_can_be_had_after_the_block(
    tmp_path: Path, tensors: Any, route: str
) -> None:
    with open_route(route, tmp_path, make_devices(route)) as streamer:
        streamer.run_pass(torch.zeros(1), nothing)
    assert streamer.last_pass is not None
    assert 0 < streamer.last_pass.seconds < 60
    assert streamer.last_pass is streamer.last_pass


def test_without_a_finished_pass_there_is_no_last_one_after_close(streamer: LayerStreamer) -> None:
    next(streamer.sweep())
    streamer.close()
    assert streamer.last_pass is None


def test_closing_in_the_midst_of_a_pass_leaves_the_report_of_the_one_before(
    streamer: LayerStreamer,
) -> None:
    streamer.run_pass(torch.zeros(1), nothing)
    finished = essence(streamer.last_pass)
    sweep = streamer.sweep()
    next(sweep)
    next(sweep)
    assert in_thread(streamer.close) is None
    assert essence(streamer.last_pass) == finished


def test_an_error_in_the_block_leaves_the_report_of_the_pass_before(
    tmp_path: Path, tensors: Any
) -> None:
    def leave(streamer: LayerStreamer) -> None:
        with streamer:
            streamer.run_pass(None, nothing)
            raise Boom

    streamer = open_checkpoint(None, tmp_path)
    with pytest.raises(Boom):
        leave(streamer)
    assert streamer.closed
    assert streamer.last_pass is not None


def test_a_report_that_cannot_be_had_does_not_keep_the_streamer_open(
    tmp_path: Path, tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(caller: Any) -> None:
        raise Boom

    before = footprint()
    streamer = open_checkpoint(None, tmp_path)
    streamer.run_pass(None, nothing)
    monkeypatch.setattr("layer_streamer.passes.caller.Caller.report", fail)
    with pytest.raises(Boom):
        streamer.close()
    assert streamer.closed
    assert footprint() == before
