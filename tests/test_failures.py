"""What goes wrong is said, in the pass that needs the layer, and the next pass is exact."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint, tiny_tensors, write_safetensors
from support import Witness, make_device, open_checkpoint

from layer_streamer import (
    CheckpointChangedError,
    CheckpointError,
    ClosedError,
    LayerStreamer,
    ReadError,
    StreamerError,
    SupersededError,
)

NUM_LAYERS = 6
DEVICES = ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)]
SECOND = 1.0


class Boom(Exception):
    """What the tests' own layer_fn raises."""


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    return tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=40)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Any:
    return make_device(request.param)


@pytest.fixture
def streamer(
    tmp_path: Path, tensors: dict[str, torch.Tensor], device: Any
) -> Iterator[LayerStreamer]:
    with open_checkpoint(device, tmp_path, n_gpu=1, n_cpu_pinned=1, n_cpu=1) as opened:
        yield opened


def assert_next_pass_is_exact(streamer: LayerStreamer, device: Any, tensors: Any) -> None:
    witness = Witness(device, tensors)
    streamer.run_pass(None, witness)
    assert witness.layers == list(range(NUM_LAYERS))
    witness.check()


def nothing(x: Any, weights: Any, layer_idx: int) -> Any:
    return x


def raises_at(number: int) -> Callable[[Any, Any, int], Any]:
    def layer_fn(x: Any, weights: Any, layer_idx: int) -> Any:
        if layer_idx == number:
            raise Boom
        return x

    return layer_fn


def rewrite_in_place(path: Path) -> None:
    """Other bytes of the same length, with the same time of modification."""
    info = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x11" * 8)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_a_truncated_shard_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        open_checkpoint(None, tmp_path)


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


@pytest.mark.parametrize("change", [rewrite_in_place, lambda path: os.truncate(path, 3000)])
def test_a_shard_that_changes_during_a_pass_ends_that_pass(
    tmp_path: Path, streamer: LayerStreamer, change: Callable[[Path], None]
) -> None:
    def layer_fn(x: Any, weights: Any, layer_idx: int) -> None:
        if layer_idx == 2:
            change(tmp_path / "model.safetensors")

    with pytest.raises(CheckpointChangedError):
        streamer.run_pass(None, layer_fn)


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


class FailingDisk:
    """os.preadv that fails once at a byte offset of a file, when it is switched on."""

    def __init__(self, offset: int, error: int) -> None:
        self._read = os.preadv
        self._offset = offset
        self._error = error
        self.times = 0
        self.failed = threading.Event()

    def __call__(self, descriptor: int, buffers: Any, offset: int) -> int:
        if self.times and offset <= self._offset < offset + len(buffers[0]):
            self.times -= 1
            self.failed.set()
            raise OSError(self._error, os.strerror(self._error))
        return self._read(descriptor, buffers, offset)


def fail_layer(
    monkeypatch: pytest.MonkeyPatch, streamer: LayerStreamer, layer_idx: int
) -> FailingDisk:
    spec = next(iter(streamer.manifest.layers[layer_idx].tensors.values()))
    disk = FailingDisk(spec.offset, errno.EIO)
    monkeypatch.setattr(os, "preadv", disk)
    return disk


@pytest.mark.parametrize("layer_idx", [0, 3, NUM_LAYERS - 1])
def test_a_read_error_in_the_middle_of_a_pass_names_file_and_layer(
    streamer: LayerStreamer, device: Any, tensors: Any, monkeypatch: Any, layer_idx: int
) -> None:
    fail_layer(monkeypatch, streamer, layer_idx).times = 1
    seen: list[int] = []
    with pytest.raises(ReadError, match=rf"layer {layer_idx}, .*model\.safetensors.*Input/output"):
        streamer.run_pass(None, lambda x, w, i: seen.append(i))
    assert seen == list(range(layer_idx))
    assert_next_pass_is_exact(streamer, device, tensors)


def test_a_read_error_while_prefetching_belongs_to_the_pass_that_needs_the_layer(
    streamer: LayerStreamer, device: Any, tensors: Any, monkeypatch: Any
) -> None:
    disk = fail_layer(monkeypatch, streamer, 0)

    def layer_fn(x: Any, weights: Any, layer_idx: int) -> None:
        # Layer 0 of this pass is long read: the next read of it is the next pass's.
        if layer_idx == 0:
            disk.times = 1
        if layer_idx == NUM_LAYERS - 1:
            assert disk.failed.wait(10 * SECOND)

    streamer.run_pass(None, layer_fn)
    with pytest.raises(ReadError, match="layer 0"):
        streamer.run_pass(None, nothing)
    assert_next_pass_is_exact(streamer, device, tensors)


@pytest.mark.parametrize("layer_idx", [0, 2, NUM_LAYERS - 1])
def test_an_error_of_layer_fn_ends_the_pass_and_nothing_else(
    streamer: LayerStreamer, device: Any, tensors: Any, layer_idx: int
) -> None:
    for _ in range(3):
        with pytest.raises(Boom):
            streamer.run_pass(None, raises_at(layer_idx))
        assert_next_pass_is_exact(streamer, device, tensors)


def test_an_error_of_on_copy_is_raised_in_the_pass(tmp_path: Path, tensors: Any) -> None:
    def on_copy(layer_idx: int, stream: Any) -> None:
        if layer_idx == 3:
            raise Boom

    for kind in ("cpu", "fake"):
        with (
            open_checkpoint(make_device(kind), tmp_path, on_copy=on_copy) as streamer,
            pytest.raises(Boom),
        ):
            streamer.run_pass(None, nothing)


@pytest.mark.parametrize("leave_at", [0, 2, NUM_LAYERS - 1])
def test_a_loop_left_early_ends_the_pass(
    streamer: LayerStreamer, device: Any, tensors: Any, leave_at: int
) -> None:
    for layer_idx, _ in streamer.sweep():
        if layer_idx == leave_at:
            break
    assert_next_pass_is_exact(streamer, device, tensors)


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


def in_thread(function: Callable[[], None]) -> BaseException | None:
    """Run ``function`` on another thread; the error it raised."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(10 * SECOND)
    assert not thread.is_alive()
    return errors[0] if errors else None


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
        lambda: streamer.last_pass,
        lambda: streamer.memory,
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
