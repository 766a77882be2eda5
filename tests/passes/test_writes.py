"""Writes to weights: an error that names the layer, and the next pass is the files' again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from routes import NUM_LAYERS, Boom, assert_next_pass_is_exact, nothing
from support import open_checkpoint
from test_gradients import HIDDEN, NORM, Q, finish

from layer_streamer import LayerStreamer, StreamerError

WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda t: t.add_(1),
    "an element": lambda t: t.view(-1)[1:2].fill_(7),
    "detached": lambda t: t.detach().zero_(),
    "out": lambda t: torch.add(t, 1, out=t),
    "as bytes": lambda t: t.view(torch.uint8).zero_(),
}


@pytest.mark.parametrize("layer_idx", [0, 3, NUM_LAYERS - 1])
def test_a_write_is_an_error_that_names_the_layer_and_the_next_pass_is_exact(
    streamer: LayerStreamer, device: Any, tensors: Any, layer_idx: int
) -> None:
    def writes(x: Any, weights: Any, i: int) -> Any:
        finish(device)
        if i == layer_idx:
            weights[NORM].add_(1)
        return x

    for _ in range(2):
        with pytest.raises(StreamerError, match=rf"layer {layer_idx}: .* written"):
            streamer.run_pass(None, writes)
        assert_next_pass_is_exact(streamer, device, tensors)


def test_a_write_after_the_hand_out_is_found_in_the_next_pass_all_at_once(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    kept = [weights[Q] for _, weights in streamer.sweep()]
    finish(device)
    for tensor in kept:
        tensor.mul_(2)
    with pytest.raises(StreamerError, match=r"layer 0: .* written"):
        streamer.run_pass(None, nothing)
    assert_next_pass_is_exact(streamer, device, tensors)


def test_a_write_before_another_error_leaves_the_next_pass_exact(
    streamer: LayerStreamer, device: Any, tensors: Any
) -> None:
    def writes_and_raises(x: Any, weights: Any, i: int) -> Any:
        finish(device)
        weights[Q].zero_()
        raise Boom

    with pytest.raises(Boom):
        streamer.run_pass(None, writes_and_raises)
    assert_next_pass_is_exact(streamer, device, tensors)
    for _, weights in streamer.sweep():
        finish(device)
        weights[Q].zero_()
        break
    assert_next_pass_is_exact(streamer, device, tensors)


OPTIONS: dict[str, dict[str, Any]] = {
    "slots": {"read_mode": "buffered", "n_gpu": 1},
    "cast": {"read_mode": "buffered", "n_gpu": 1, "dtype": torch.bfloat16},
    "mapped": {"read_mode": "mapped"},
    "mapped and cast": {"read_mode": "mapped", "dtype": torch.bfloat16},
    "resident": {"device_budget": "1GiB"},
    "resident and cast": {"device_budget": "1GiB", "dtype": torch.bfloat16},
    "heard of": {"device_budget": "1GiB", "on_copy": lambda i, stream: None},
}


@pytest.mark.parametrize(
    ("how", "mode"),
    # In inference mode a view of another dtype has no version, and is not seen.
    [
        (how, mode)
        for how in WRITES
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode)
        if (how, mode) != ("as bytes", torch.inference_mode)
    ],
)
@pytest.mark.parametrize("options", list(OPTIONS))
def test_every_kind_of_write_is_found_in_every_mode_of_gradients(
    tmp_path: Path, options: str, how: str, mode: Any
) -> None:
    tensors = tiny_checkpoint(tmp_path, 2, hidden=HIDDEN)
    head = "model.layers.{}." + NORM

    def writes(x: Any, weights: Any, i: int) -> Any:
        if i == 1:
            WRITES[how](weights[NORM])
        return x

    with open_checkpoint(None, tmp_path, **OPTIONS[options]) as streamer:
        streamer.run_pass(None, nothing)
        with mode():
            with pytest.raises(StreamerError, match=r"layer 1: .* written"):
                streamer.run_pass(None, writes)
            for i, weights in streamer.sweep():
                assert torch.equal(weights[NORM], tensors[head.format(i)].to(weights[NORM].dtype))


def test_what_autograd_has_saved_of_a_layer_that_is_loaded_again_is_refused(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, 2, hidden=HIDDEN)
    x = torch.ones(HIDDEN, requires_grad=True)
    for options in ({"read_mode": "mapped"}, {"device_budget": "1GiB"}):
        with open_checkpoint(None, tmp_path, **options) as streamer:
            sweep = streamer.sweep()
            _, weights = next(sweep)
            weights[NORM].add_(1)
            y = x * weights[NORM]
            with pytest.raises(StreamerError, match="layer 0"):
                next(sweep)
            streamer.run_pass(None, nothing)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_a_write_to_mapped_weights_reaches_no_file_and_no_other_layer(
    tmp_path: Path, tensors: Any
) -> None:
    before = (tmp_path / "model.safetensors").read_bytes()
    with open_checkpoint(None, tmp_path, read_mode="mapped") as streamer:
        for i, weights in streamer.sweep():
            assert torch.equal(weights[Q], tensors[f"model.layers.{i}.{Q}"])
            with torch.no_grad():
                weights[Q].data.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_file_that_has_gone_bad_when_a_layer_is_to_be_loaded_again_is_an_error(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path, 2, hidden=HIDDEN)
    with open_checkpoint(None, tmp_path, device_budget="1GiB") as streamer:
        with pytest.raises(StreamerError, match="layer 0"):
            streamer.run_pass(None, lambda x, w, i: w[Q].zero_())
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(100)
        for _ in range(2):
            with pytest.raises(StreamerError, match=r"model\.safetensors"):
                streamer.run_pass(None, nothing)
