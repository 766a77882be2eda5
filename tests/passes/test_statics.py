"""load_static: on which device, once, and counted."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint, write_safetensors
from fake_device import FakeDevice
from routes import open_route
from support import (
    HANG_SECONDS,
    FailingDisk,
    footprint,
    make_device,
    open_checkpoint,
    raw,
)

from layer_streamer import ConfigError, LayerStreamer, ReadError
from layer_streamer.passes import statics
from layer_streamer.transport.files import OpenFiles

NAMES = ("lm_head.weight", "model.norm.weight")


def test_each_static_tensor_counts_once_in_memory_and_in_the_plan(
    tmp_path: Path, tensors: Any, route: str, device: Any
) -> None:
    with open_route(route, tmp_path, device) as streamer:
        before, plan = streamer.memory, streamer.plan
        assert before.static_bytes == plan.static_bytes == plan.document()["static_bytes"] == {}
        for _ in range(2):
            for name in NAMES:
                assert streamer.load_static(name) is streamer.load_static(name, streamer.device)
        nbytes, after = sum(tensors[name].nbytes for name in NAMES), streamer.memory
        where = str(streamer.device)
        assert after.static_bytes == streamer.plan.static_bytes == {where: nbytes}
        on_host = nbytes if streamer.device.type == "cpu" else 0
        assert after.host_bytes == before.host_bytes + on_host
        assert after.device_bytes == before.device_bytes + nbytes - on_host
        assert after.pinned_bytes == before.pinned_bytes
        assert f"static tensors on {where}: {nbytes / 1024:.2f} KiB" in str(streamer.plan)
        assert streamer.plan.document()["static_bytes"] == {where: nbytes}


def test_what_is_counted_is_what_a_cast_tensor_takes(tmp_path: Path) -> None:
    tensors = tiny_checkpoint(tmp_path)
    with open_checkpoint(None, tmp_path, dtype=torch.bfloat16) as streamer:
        streamer.load_static(NAMES[0])
        assert streamer.memory.static_bytes == {"cpu": tensors[NAMES[0]].nbytes // 2}


@pytest.mark.gpu
def test_a_static_tensor_on_another_device_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    tensors = tiny_checkpoint(tmp_path)
    with LayerStreamer.from_checkpoint(tmp_path, device="cuda") as streamer:
        found = [streamer.load_static(NAMES[0], device) for device in ("cpu", "cuda", None)]
        assert [tensor.device.type for tensor in found] == ["cpu", "cuda", "cuda"]
        assert found[1] is found[2]
        for tensor in found:
            assert torch.equal(raw(tensor.cpu()), raw(tensors[NAMES[0]]))
        nbytes = tensors[NAMES[0]].nbytes
        assert streamer.memory.static_bytes == {"cpu": nbytes, str(streamer.device): nbytes}


def test_a_device_that_torch_does_not_have_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    with open_checkpoint(None, tmp_path) as streamer:
        for device in ("cuda:77", "nonsense"):
            with pytest.raises(ConfigError, match=f"device='{device}'"):
                streamer.load_static(NAMES[0], device)
        assert streamer.memory.static_bytes == {}


def test_what_two_threads_load_at_once_is_one_tensor_and_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = tiny_checkpoint(tmp_path)
    both, load, found = threading.Barrier(2), statics.Statics._load, list[torch.Tensor]()

    def load_together(self: Any, *args: Any) -> torch.Tensor:
        both.wait(HANG_SECONDS)
        return load(self, *args)

    monkeypatch.setattr(statics.Statics, "_load", load_together)
    with open_checkpoint(None, tmp_path) as streamer:
        threads = [
            threading.Thread(target=lambda: found.append(streamer.load_static(NAMES[0])))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_SECONDS)
        assert len(found) == 2
        assert found[0] is found[1]
        assert streamer.memory.static_bytes == {"cpu": tensors[NAMES[0]].nbytes}


def test_a_static_tensor_that_nobody_holds_goes_when_the_streamer_is_closed(
    tmp_path: Path,
) -> None:
    tiny_checkpoint(tmp_path)
    streamer = open_checkpoint(None, tmp_path)
    kept, dropped = streamer.load_static(NAMES[0]), weakref.ref(streamer.load_static(NAMES[1]))
    counted = streamer.memory
    gc.disable()
    try:
        streamer.close()
        assert dropped() is None
    finally:
        gc.enable()
    assert torch.isfinite(kept).all()
    assert streamer.memory == counted


def test_a_default_device_of_torch_moves_nothing(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    for options in ({}, {"device_budget": "64MiB"}, {"dtype": torch.bfloat16}):
        with torch.device("meta"), open_checkpoint(None, tmp_path, **options) as streamer:
            found = {streamer.load_static(NAMES[0]).device, streamer.host_tensor(NAMES[0]).device}
            streamer.run_pass(None, lambda x, w, i, found=found: found.update(
                tensor.device for tensor in w.values()
            ))  # fmt: skip
            assert {device.type for device in found} == {"cpu"}


@pytest.mark.parametrize("what", ["load_static", "host_tensor"])
def test_threads_that_ask_at_once_get_the_same_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    tiny_checkpoint(tmp_path)
    both, found = threading.Barrier(2, timeout=HANG_SECONDS), list[Any]()
    with open_checkpoint(None, tmp_path) as streamer:
        kept = streamer._opened().statics

        def at_once(work: Any) -> Any:
            def load(*arguments: Any) -> Any:
                loaded = work(*arguments)
                both.wait()
                return loaded

            return load

        monkeypatch.setattr(kept, "_load", at_once(kept._load))
        monkeypatch.setattr(kept, "_view", at_once(kept._view))
        threads = [
            threading.Thread(target=lambda: found.append(getattr(streamer, what)(NAMES[0])))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_SECONDS)
        assert found[0] is found[1] is getattr(streamer, what)(NAMES[0])


DEVICES = ["cpu", "fake", pytest.param("cuda", marks=pytest.mark.gpu)]
LARGE = {"model.layers.0.w": torch.ones(1), "large": torch.randn(3 * 1024 - 8)}
"""With chunks of a page, what is large is read in three parts."""
CHUNKS = {"n_cpu_pinned": 1, "read_mode": "buffered", "read_chunk": 4096}


@pytest.mark.parametrize("kind", DEVICES)
def test_a_static_tensor_is_read_by_as_many_threads_as_layers_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", LARGE)
    device, together = make_device(kind), threading.Barrier(3, timeout=HANG_SECONDS)
    with open_checkpoint(device, path, **CHUNKS, read_threads=3) as streamer:
        read = OpenFiles.read_into

        def meet(*arguments: Any) -> None:
            together.wait()
            read(*arguments)

        monkeypatch.setattr(OpenFiles, "read_into", meet)
        assert torch.equal(streamer.load_static("large").cpu(), LARGE["large"])


def test_pages_are_locked_while_a_static_tensor_is_loaded_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", LARGE)
    device, locked = FakeDevice(seed=1), list[int]()
    with open_checkpoint(device, path, **CHUNKS) as streamer:
        before, read = set(device._pinned), OpenFiles.read_into

        def look(*arguments: Any) -> None:
            locked.append(len(device._pinned))
            read(*arguments)

        monkeypatch.setattr(OpenFiles, "read_into", look)
        streamer.load_static("large")
        assert locked == [len(before) + 1] * 3
        assert device._pinned == before
        assert not device.errors


@pytest.mark.parametrize("kind", DEVICES)
def test_a_static_tensor_that_cannot_be_read_is_named_and_can_be_loaded_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", LARGE)
    device = make_device(kind)
    with open_checkpoint(device, path, **CHUNKS) as streamer:
        before, locked = footprint(), set(getattr(device, "_pinned", ()))
        disk = FailingDisk(streamer.manifest.tensor("large").offset + 5000, errno.EIO)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", disk)
            disk.times = 1
            with pytest.raises(ReadError, match=r"tensor 'large'.*model\.safetensors") as raised:
                streamer.load_static("large")
        assert raised.value.__traceback__  # what its frames hold is given back all the same
        assert footprint() == before
        assert set(getattr(device, "_pinned", ())) == locked
        assert streamer.memory.static_bytes == {}
        assert torch.equal(streamer.load_static("large").cpu(), LARGE["large"])


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("read_mode", ["buffered", "direct"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_static_tensor_in_parts_is_exact_wherever_it_lies_and_however_it_is_read(
    tmp_path: Path, kind: str, padding: int, read_mode: str, dtype: torch.dtype | None
) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", LARGE, padding=padding)
    options: dict[str, Any] = {**CHUNKS, "read_mode": read_mode, "dtype": dtype}
    with open_checkpoint(make_device(kind), path, **options) as streamer:
        with torch.inference_mode():
            loaded, viewed = streamer.load_static("large"), streamer.host_tensor("large")
        assert not loaded.is_inference()
        assert torch.equal(raw(loaded.cpu()), raw(LARGE["large"].to(dtype or torch.float32)))
        assert torch.equal(raw(viewed), raw(LARGE["large"]))


@pytest.mark.parametrize("padding", [0, 1])
def test_a_host_view_is_the_same_each_time_wherever_it_lies(tmp_path: Path, padding: int) -> None:
    tensors = {"model.layers.0.w": torch.ones(1), "a": torch.arange(6.0), "e": torch.ones(0, 3)}
    write_safetensors(tmp_path / "model.safetensors", tensors, padding=padding)
    with open_checkpoint(None, tmp_path) as streamer:
        for name in ("a", "e"):
            with torch.inference_mode():
                viewed = streamer.host_tensor(name)
            assert viewed is streamer.host_tensor(name)
            assert not viewed.is_inference()
            assert torch.equal(viewed, tensors[name])
