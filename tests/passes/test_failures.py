"""What goes wrong is said, in the pass that needs the layer, and the next pass is exact."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint, tiny_tensors, write_safetensors
from routes import (
    NUM_LAYERS,
    ROUTES,
    Boom,
    assert_next_pass_is_exact,
    default_params,
    nothing,
    of_tier,
    open_route,
    raises_at,
)
from support import FailingDisk, in_thread, open_checkpoint, rewrite_in_place

from layer_streamer import (
    CheckpointChangedError,
    CheckpointError,
    LayerStreamer,
    ReadError,
    StreamerError,
)
from layer_streamer.transport.stage import Stage

SECONDS = 100.0
READING = default_params(
    *(name for name, route in ROUTES.items() if "disk" in route.tiers and name != "cpu mapped")
)
"""The routes on which a pass reads."""
reading = pytest.mark.parametrize("route", READING)
# The fake device copies with the CPU, which a look at the missing pages of a mapped file kills. So
# does a GPU's driver where layers are as small as these.
shrinkable = pytest.mark.parametrize(
    "route",
    default_params(*(n for n in ROUTES if ("mapped" not in n and "views" not in n) or "cpu" in n)),
)


def test_a_truncated_shard_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        open_checkpoint(None, tmp_path)


@shrinkable
def test_a_shard_that_shrinks_between_passes_ends_the_next_pass(
    tmp_path: Path, streamer: LayerStreamer
) -> None:
    streamer.run_pass(None, nothing)
    os.truncate(tmp_path / "model.safetensors", 3000)
    for _ in range(2):
        with pytest.raises(CheckpointChangedError, match=r"model\.safetensors.*3000"):
            streamer.run_pass(None, nothing)


def test_a_shard_rewritten_between_passes_ends_the_next_pass(
    tmp_path: Path, streamer: LayerStreamer
) -> None:
    streamer.run_pass(None, nothing)
    rewrite_in_place(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointChangedError, match="changed since it was opened"):
        streamer.run_pass(None, nothing)


def changing(path: Path, change: Callable[[Path], None]) -> Callable[[Any, Any, int], None]:
    def layer_fn(x: Any, weights: Any, layer_idx: int) -> None:
        if layer_idx == 2:
            change(path / "model.safetensors")

    return layer_fn


def test_a_shard_rewritten_during_a_pass_ends_that_pass(
    tmp_path: Path, streamer: LayerStreamer
) -> None:
    with pytest.raises(CheckpointChangedError):
        streamer.run_pass(None, changing(tmp_path, rewrite_in_place))


@shrinkable
def test_a_shard_that_shrinks_during_a_pass_ends_that_pass(
    tmp_path: Path, streamer: LayerStreamer
) -> None:
    with pytest.raises(CheckpointChangedError):
        streamer.run_pass(None, changing(tmp_path, lambda path: os.truncate(path, 3000)))


def test_a_shard_replaced_by_another_file_ends_the_next_pass(
    tmp_path: Path, streamer: LayerStreamer
) -> None:
    streamer.run_pass(None, nothing)
    new = write_safetensors(tmp_path / "new", tiny_tensors(NUM_LAYERS, hidden=40, seed=9))
    new.replace(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointChangedError):
        streamer.run_pass(None, nothing)


def test_a_tensor_missing_from_a_layer_of_the_tables_is_named(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"layer 0: tensor 'model\.layers\.0\.nope'"):
        LayerStreamer(
            model_dir=tmp_path, tensor_info={}, shard_offsets={}, block_keys=["nope"],
            block_sizes={"nope": 1}, dtype=torch.float32, num_layers=1, device="cpu",
        )  # fmt: skip


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*Permission denied"):
        open_checkpoint(None, tmp_path)


def fail_layer(
    monkeypatch: pytest.MonkeyPatch, streamer: LayerStreamer, layer_idx: int
) -> FailingDisk:
    specs = streamer.manifest.layers[layer_idx].tensors.values()
    # In the middle: whole pages at the ends may hold bytes of the layers beside.
    middle = max(specs, key=lambda spec: spec.nbytes)
    disk = FailingDisk(middle.offset + middle.nbytes // 2, errno.EIO)
    monkeypatch.setattr(os, "preadv", disk)
    return disk


@reading
@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_read_error_in_the_middle_of_a_pass_names_file_and_layer(
    streamer: LayerStreamer, device: Any, tensors: Any, monkeypatch: Any, number: int
) -> None:
    layer_idx = of_tier(streamer, "disk")[number]
    fail_layer(monkeypatch, streamer, layer_idx).times = 1
    seen: list[int] = []
    with pytest.raises(ReadError, match=rf"layer {layer_idx}, .*model\.safetensors.*Input/output"):
        streamer.run_pass(None, lambda x, w, i: seen.append(i))
    assert seen == list(range(layer_idx))
    assert_next_pass_is_exact(streamer, device, tensors)


@reading
def test_a_read_error_while_prefetching_belongs_to_the_pass_that_needs_the_layer(
    streamer: LayerStreamer, device: Any, tensors: Any, monkeypatch: Any
) -> None:
    first = of_tier(streamer, "disk")[0]
    disk = fail_layer(monkeypatch, streamer, first)

    def layer_fn(x: Any, weights: Any, layer_idx: int) -> None:
        # The first layer of this pass is long read: the next read of it is the next pass's.
        if layer_idx == first:
            disk.times = 1
        if layer_idx == NUM_LAYERS - 1:
            assert disk.failed.wait(SECONDS)

    streamer.run_pass(None, layer_fn)
    seen: list[int] = []
    with pytest.raises(ReadError, match=f"layer {first}"):
        # Not always the next pass: slots for many layers are filled a pass ahead.
        for _ in range(3):
            seen.clear()
            streamer.run_pass(None, lambda x, w, i: seen.append(i))
    assert seen == list(range(first))
    assert_next_pass_is_exact(streamer, device, tensors)


@pytest.mark.parametrize("layer_idx", range(NUM_LAYERS))
def test_an_error_of_layer_fn_ends_the_pass_and_nothing_else(
    streamer: LayerStreamer, device: Any, tensors: Any, layer_idx: int
) -> None:
    for _ in range(3):
        with pytest.raises(Boom):
            streamer.run_pass(None, raises_at(layer_idx))
        assert_next_pass_is_exact(streamer, device, tensors)


def test_an_error_of_on_copy_is_raised_in_the_pass(
    tmp_path: Path, tensors: Any, route: str, device: Any
) -> None:
    def on_copy(layer_idx: int, stream: Any) -> None:
        if layer_idx == 3:
            raise Boom

    with open_route(route, tmp_path, device, on_copy=on_copy) as streamer:
        for _ in range(2):
            with pytest.raises(Boom):
                streamer.run_pass(None, nothing)


@pytest.mark.parametrize("leave_at", range(NUM_LAYERS))
def test_a_loop_left_early_ends_the_pass(
    streamer: LayerStreamer, device: Any, tensors: Any, leave_at: int
) -> None:
    for layer_idx, _ in streamer.sweep():
        if layer_idx == leave_at:
            break
    assert_next_pass_is_exact(streamer, device, tensors)


@pytest.mark.parametrize(
    "route", default_params(*(name for name in ROUTES if "resident" not in name))
)
def test_a_thread_that_dies_ends_the_pass_instead_of_leaving_it_to_wait(
    streamer: LayerStreamer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(stage: Stage, run: Any, condition: Any) -> bool:
        raise MemoryError("no room for a thread")

    monkeypatch.setattr(Stage, "await_true", die)
    for _ in range(2):
        error = in_thread(lambda: streamer.run_pass(None, nothing))
        assert isinstance(error, StreamerError)
        assert "no room for a thread" in str(error)


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, GeneratorExit, SystemExit])
def test_what_on_copy_raises_comes_out_of_a_pass_as_itself(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)
    cause, error = ValueError("why"), kind("mine")

    def on_copy(layer_idx: int, stream: object) -> None:
        if layer_idx == 2:
            raise error from cause

    with open_checkpoint(None, tmp_path, on_copy=on_copy) as streamer:
        for _ in range(2):
            with pytest.raises(kind) as caught:
                streamer.run_pass(None, nothing)
            assert caught.value is error and error.__cause__ is cause


def test_a_loop_over_a_pass_is_not_ended_by_a_stop_iteration_of_on_copy(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, NUM_LAYERS)

    def on_copy(layer_idx: int, stream: object) -> None:
        raise StopIteration(layer_idx)

    with open_checkpoint(None, tmp_path, on_copy=on_copy) as streamer:
        with pytest.raises(StreamerError, match="on_copy raised StopIteration") as caught:
            list(streamer.sweep())
        assert isinstance(caught.value.__cause__, StopIteration)
