"""What only a GPU can show: pinned memory, bounded device memory, streams of the user's own."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from support import Witness, make_device, open_checkpoint

from layer_streamer import LayerStreamer, StreamerError
from layer_streamer.devices.accelerator import CudaDevice
from layer_streamer.transport.memory import HostArena

pytestmark = pytest.mark.gpu
NUM_LAYERS = 6


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    return tiny_checkpoint(tmp_path, NUM_LAYERS, hidden=1024)


def nothing(x: Any, weights: Any, layer_idx: int) -> Any:
    return x


def test_the_gpu_is_taken_when_no_device_is_named(tmp_path: Path, tensors: Any) -> None:
    with LayerStreamer.from_checkpoint(tmp_path) as streamer:
        assert streamer.device == torch.device("cuda", torch.cuda.current_device())
        devices = []
        streamer.run_pass(None, lambda x, w, i: devices.extend(t.device for t in w.values()))
        assert set(devices) == {streamer.device}


def test_the_pinned_pool_is_page_locked_and_exactly_as_large_as_its_slots(
    tmp_path: Path, tensors: Any
) -> None:
    with LayerStreamer.from_checkpoint(tmp_path, n_cpu_pinned=3, n_cpu=1) as streamer:
        host, pinned = streamer._parts.pipeline.lanes[0].memory.host_pools
        assert pinned.arena.memory.is_pinned()
        assert not host.arena.memory.is_pinned()
        layer = max(layer.nbytes for layer in streamer.manifest.layers)
        assert streamer.memory.pinned_bytes <= 4 * (layer + 8192)
        assert streamer.memory.host_bytes <= 6 * (layer + 8192)


def test_refused_page_locking_falls_back_and_the_next_kernel_is_clean(
    tmp_path: Path, tensors: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    device = CudaDevice(torch.device("cuda"))
    first = HostArena([1 << 20], device, pinned=True, threads=2)
    assert first.pinned
    # Registering the same memory again is what the driver refuses.
    assert not device.pin(first.memory)
    assert "refused" in caplog.text
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert torch.cuda.current_stream().query()
    first.close()
    assert device.pin(first.memory)
    device.unpin(first.memory)


def test_a_streamer_works_when_page_locking_is_refused(
    tmp_path: Path, tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_device("cuda")
    monkeypatch.setattr(device, "pin", lambda memory, **kind: False)
    witness = Witness(device, tensors)
    with open_checkpoint(device, tmp_path) as streamer:
        for _ in range(3):
            streamer.run_pass(None, witness)
        assert streamer.memory.pinned_bytes == 0
        witness.check()


def test_device_memory_is_the_slots_and_no_pass_adds_to_it(tmp_path: Path, tensors: Any) -> None:
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with LayerStreamer.from_checkpoint(tmp_path, n_gpu=2, dtype=torch.bfloat16) as streamer:
        taken = torch.cuda.memory_allocated() - before
        assert taken <= streamer.memory.device_bytes + (2 << 20)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(5):
            streamer.run_pass(None, nothing)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before == taken
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_layers_are_exact_on_streams_of_the_users_own_that_change_within_a_pass(
    tmp_path: Path, tensors: Any
) -> None:
    device = make_device("cuda")
    witness = Witness(device, tensors)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    with open_checkpoint(device, tmp_path, n_gpu=1, dtype=torch.float32) as streamer:
        for number in range(12):
            with torch.cuda.stream(streams[number % 3]):
                for layer_idx, weights in streamer.sweep():
                    with torch.cuda.stream(streams[layer_idx % 3]):
                        # The change of stream is the user's to order; release covers the
                        # stream of the hand-out and the one current at the advance.
                        streams[layer_idx % 3].wait_stream(streams[number % 3])
                        witness(None, weights, layer_idx)
                        streams[number % 3].wait_stream(streams[layer_idx % 3])
        torch.cuda.synchronize()
        witness.check()


def test_work_launched_before_layer_fn_raised_still_sees_its_own_layer(
    tmp_path: Path, tensors: Any
) -> None:
    device = make_device("cuda")
    witness = Witness(device, tensors)

    def failing_at(number: int) -> Any:
        def layer_fn(x: Any, weights: Any, layer_idx: int) -> None:
            torch.cuda._sleep(2_000_000)
            witness(x, weights, layer_idx)
            if layer_idx == number:
                raise ZeroDivisionError

        return layer_fn

    with open_checkpoint(device, tmp_path, n_gpu=1, n_cpu_pinned=1) as streamer:
        for number in (0, 1, 3, NUM_LAYERS - 1) * 3:
            with pytest.raises(ZeroDivisionError):
                streamer.run_pass(None, failing_at(number))
        streamer.run_pass(None, witness)
        witness.check()


def test_the_callers_thread_never_waits_for_the_device(tmp_path: Path, tensors: Any) -> None:
    with LayerStreamer.from_checkpoint(tmp_path, n_gpu=1, n_cpu_pinned=2 * NUM_LAYERS) as streamer:
        streamer.run_pass(None, nothing)
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)
        blocked = torch.cuda.Event()
        blocked.record()
        streamer.run_pass(None, nothing)
        assert not blocked.query(), "the pass was handed out only after the device was done"
        torch.cuda.synchronize()


def test_a_pass_under_graph_capture_is_an_error_and_the_next_one_is_exact(
    tmp_path: Path, tensors: Any
) -> None:
    device = make_device("cuda")
    with open_checkpoint(device, tmp_path) as streamer:
        graph, counter = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
        with torch.cuda.graph(graph):
            counter.add_(1)
            with pytest.raises(StreamerError, match="graph"):
                streamer.run_pass(None, nothing)
        graph.replay()
        assert counter.item() == 1
        witness = Witness(device, tensors)
        streamer.run_pass(None, witness)
        witness.check()


def test_the_report_counts_every_byte_of_read_memcpy_copy_and_compute(
    tmp_path: Path, tensors: Any
) -> None:
    with LayerStreamer.from_checkpoint(tmp_path, n_cpu_pinned=1, n_cpu=1) as streamer:
        for _ in range(3):
            streamer.run_pass(torch.zeros(1), lambda x, w, i: x + w["mlp.up_proj.weight"].sum())
        report = streamer.last_pass
        assert report is not None
        payload = sum(layer.nbytes for layer in streamer.manifest.layers)
        assert list(report.steps) == ["read", "memcpy", "copy", "compute"]
        for step in report.steps.values():
            assert step.bytes >= payload
            assert step.busy_seconds > 0
        assert 0 < report.seconds < 10
        print(report)
