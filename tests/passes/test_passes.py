"""One pass at a time: newer passes, other threads, closing in the middle."""

from __future__ import annotations

from typing import Any

import pytest
from routes import NUM_LAYERS, Boom, assert_next_pass_is_exact, nothing, raises_at
from support import Witness, in_thread

from layer_streamer import (
    CheckpointError,
    ClosedError,
    LayerStreamer,
    StreamerError,
    SupersededError,
)


def test_a_new_pass_supersedes_an_unfinished_sweep_whose_next_advance_raises(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    old = streamer.sweep()
    next(old)
    next(old)
    assert_next_pass_is_exact(streamer, device, tensors)
    with pytest.raises(SupersededError):
        next(old)
    assert_next_pass_is_exact(streamer, device, tensors)


def test_a_pass_within_layer_fn_supersedes_the_outer_one(streamer: LayerStreamer) -> None:
    def layer_fn(x: Any, weights: Any, layer_idx: int) -> None:
        if layer_idx == 1:
            streamer.run_pass(None, nothing)

    with pytest.raises(SupersededError):
        streamer.run_pass(None, layer_fn)


def test_a_sweep_dropped_after_a_newer_pass_began_does_not_end_that_pass(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    old: Any = streamer.sweep()
    next(old)
    witness = Witness(device, tensors)
    for layer_idx, weights in streamer.sweep():
        old = None
        witness(None, weights, layer_idx)
    assert witness.layers == list(range(NUM_LAYERS))
    witness.check()


def test_a_second_pass_from_another_thread_is_an_error_and_harms_nothing(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    witness = Witness(device, tensors)

    def layer_fn(x: Any, weights: Any, layer_idx: int) -> None:
        if layer_idx == 2:
            error = in_thread(lambda: streamer.run_pass(None, nothing))
            assert isinstance(error, StreamerError)
            assert "one pass at a time" in str(error)
        witness(x, weights, layer_idx)

    streamer.run_pass(None, layer_fn)
    witness.check()


def test_passes_may_move_between_threads(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    for _ in range(2):
        assert in_thread(lambda: assert_next_pass_is_exact(streamer, device, tensors)) is None
        assert_next_pass_is_exact(streamer, device, tensors)


def test_a_thread_that_ended_within_a_sweep_does_not_lock_the_streamer(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    sweeps: list[Any] = []

    def leave_open() -> None:
        sweeps.append(streamer.sweep())
        next(sweeps[0])

    assert in_thread(leave_open) is None
    assert_next_pass_is_exact(streamer, device, tensors)


def test_an_error_that_somebody_keeps_does_not_lock_the_streamer(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    with pytest.raises(Boom) as kept:
        streamer.run_pass(None, raises_at(2))
    assert kept.value.__traceback__ is not None
    assert in_thread(lambda: assert_next_pass_is_exact(streamer, device, tensors)) is None


def test_closing_during_a_pass_ends_it_with_an_error(streamer: LayerStreamer) -> None:
    def layer_fn(x: Any, weights: Any, layer_idx: int) -> None:
        if layer_idx == 1:
            assert in_thread(streamer.close) is None

    with pytest.raises(ClosedError):
        streamer.run_pass(None, layer_fn)


def test_closing_from_within_layer_fn_ends_the_pass_with_an_error(streamer: LayerStreamer) -> None:
    with pytest.raises(ClosedError):
        streamer.run_pass(None, lambda x, w, i: streamer.close())


def test_everything_but_close_on_a_closed_streamer_is_an_error(streamer: LayerStreamer) -> None:
    streamer.close()
    streamer.close()
    for use in (
        lambda: streamer.run_pass(None, nothing),
        lambda: next(streamer.sweep()),
        lambda: streamer.load_static("lm_head.weight"),
        lambda: streamer.host_tensor("lm_head.weight"),
        lambda: streamer.read_modes,
    ):
        with pytest.raises(ClosedError):
            use()
    assert "closed" in repr(streamer)


def test_an_unknown_tensor_name_is_refused_by_name(streamer: LayerStreamer) -> None:
    for load in (streamer.load_static, streamer.host_tensor):
        with pytest.raises(CheckpointError, match="no tensor named 'nope'"):
            load("nope")


def test_a_layers_weights_cannot_be_changed(streamer: LayerStreamer) -> None:
    def layer_fn(x: Any, weights: Any, layer_idx: int) -> None:
        for change in (weights.clear, weights.popitem, lambda: weights.update(a=1)):
            with pytest.raises(TypeError, match="read-only"):
                change()

    streamer.run_pass(None, layer_fn)
