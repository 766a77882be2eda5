"""An opening that fails or is interrupted while layers are brought into memory leaves nothing."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fake_device import FakeDevice
from routes import (
    ROUTES,
    assert_next_pass_is_exact,
    default_params,
    nothing_left,
    of_tier,
    open_route,
    route_params,
)
from support import FailingDisk, in_thread, rewrite_in_place

from layer_streamer import CheckpointChangedError, LayerStreamer, ReadError
from layer_streamer.devices.device import CpuDevice
from layer_streamer.progress import ProgressBar
from layer_streamer.transport import mapped
from layer_streamer.transport.memory import HostArena

LOADING = [name for name, route in ROUTES.items() if route.tiers != {"disk"}]
"""Routes on which something is brought into memory while the streamer is opened."""
IN_PAGES = "cpu resident", "cpu partial"
"""On which what stays is used in the files' pages, as far as it lies aligned."""
MAPPED = [name for name in LOADING if ROUTES[name].read_mode == "mapped" or name in IN_PAGES]
COPIED = [name for name in LOADING if name not in MAPPED]
"""Those of them that read it."""
on_loading = pytest.mark.parametrize("route", default_params(*LOADING))


@pytest.fixture
def planned(route: str, tmp_path: Path, tensors: Any, device: Any) -> LayerStreamer:
    """A closed streamer, for its manifest: an opening that succeeded once."""
    with open_route(route, tmp_path, device) as streamer:
        streamer.resident = of_tier(streamer, "device") + of_tier(streamer, "host")
    return streamer


@pytest.mark.parametrize("route", default_params(*COPIED))
def test_a_read_error_while_loading_names_the_file_and_leaves_nothing(
    planned: LayerStreamer, route: str, tmp_path: Path, device: Any, tensors: Any, monkeypatch: Any
) -> None:
    for layer_idx in planned.resident:
        specs = planned.manifest.layers[layer_idx].tensors.values()
        middle = max(specs, key=lambda spec: spec.nbytes)
        disk = FailingDisk(middle.offset + middle.nbytes // 2, errno.EIO)
        with nothing_left(device), monkeypatch.context() as patch:
            patch.setattr(os, "preadv", disk)
            disk.times = 1
            with pytest.raises(ReadError, match=r"model\.safetensors.*Input/output"):
                open_route(route, tmp_path, device)
    with open_route(route, tmp_path, device) as streamer:
        assert_next_pass_is_exact(streamer, device, tensors)


@pytest.mark.parametrize("route", route_params("mapped", "two mapped", "cuda mapped", *IN_PAGES))
def test_pages_that_cannot_be_read_while_mapping_are_named_and_leave_nothing(
    planned: LayerStreamer, route: str, tmp_path: Path, device: Any, monkeypatch: Any
) -> None:
    def refuse(address: int, nbytes: int, *, write: bool) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(mapped, "populate", refuse)
    with nothing_left(device), pytest.raises(ReadError, match=r"model\.safetensors.*Input/output"):
        open_route(route, tmp_path, device)


def on_progress(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do something when the progress bar is moved for the ``number``-th time."""
    calls = count()
    monkeypatch.setattr(
        ProgressBar, "update", lambda bar, n=1: act() if next(calls) == number else None
    )


@on_loading
def test_a_file_that_changes_while_it_is_loaded_is_said_and_leaves_nothing(
    planned: LayerStreamer, route: str, tmp_path: Path, device: Any, monkeypatch: Any
) -> None:
    on_progress(monkeypatch, 0, lambda: rewrite_in_place(tmp_path / "model.safetensors"))
    with nothing_left(device), pytest.raises(CheckpointChangedError):
        open_route(route, tmp_path, device, track_progress=True)


@on_loading
def test_an_interrupt_in_the_progress_bar_leaves_nothing(
    planned: LayerStreamer, route: str, tmp_path: Path, device: Any, tensors: Any, monkeypatch: Any
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    # So small a checkpoint is mapped in one part.
    for number in (0,) if route in MAPPED else (0, 2):
        with nothing_left(device), monkeypatch.context() as patch:
            on_progress(patch, number, interrupt)
            with pytest.raises(KeyboardInterrupt):
                open_route(route, tmp_path, device, track_progress=True)
    with open_route(route, tmp_path, device) as streamer:
        assert_next_pass_is_exact(streamer, device, tensors)


def refuse_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but its ``number``-th call raises MemoryError."""
    calls = count()

    def refusing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise MemoryError
        return function(*args, **kwargs)

    return refusing


def refuse_host(patch: pytest.MonkeyPatch, number: int) -> None:
    refusing = refuse_at(number, HostArena)
    for module in ("lane_memory", "memory"):
        patch.setattr(f"layer_streamer.transport.{module}.HostArena", refusing)


def refuse_device(patch: pytest.MonkeyPatch, number: int) -> None:
    for kind in (FakeDevice, CpuDevice):
        patch.setattr(kind, "allocate", refuse_at(number, kind.allocate))


@pytest.mark.parametrize("refuse", [refuse_host, refuse_device])
def test_an_opening_that_is_refused_memory_at_any_point_leaves_nothing(
    planned: LayerStreamer, route: str, tmp_path: Path, device: Any, monkeypatch: Any,
    refuse: Callable[[pytest.MonkeyPatch, int], None],
) -> None:  # fmt: skip
    for number in count():
        with nothing_left(device), monkeypatch.context() as patch:
            refuse(patch, number)
            try:
                open_route(route, tmp_path, device).close()
            except MemoryError:
                continue
        return


PINNING = [name for name in LOADING if ROUTES[name].kind == "fake"]


@pytest.mark.parametrize("route", default_params(*PINNING))
def test_an_interrupt_while_memory_is_page_locked_leaves_nothing(
    planned: LayerStreamer, route: str, tmp_path: Path, device: Any, monkeypatch: Any
) -> None:
    pin = FakeDevice.pin
    # A lock of many gigabytes takes long enough for Ctrl-C to come in the middle.
    for number in count():
        calls = count()

        def interrupted(
            self: FakeDevice, memory: Any, *, number: int = number, calls: Any = calls, **kind: Any
        ) -> bool:
            is_pinned = pin(self, memory, **kind)
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGINT)
            return is_pinned

        monkeypatch.setattr(FakeDevice, "pin", interrupted)
        with nothing_left(device):
            try:
                open_route(route, tmp_path, device).close()
            except KeyboardInterrupt:
                continue
        assert number > 0
        return


def test_a_streamer_that_is_closed_as_soon_as_it_is_open_leaves_nothing(
    planned: LayerStreamer, route: str, tmp_path: Path, device: Any
) -> None:
    for close in (LayerStreamer.close, lambda streamer: in_thread(streamer.close)):
        with nothing_left(device):
            close(open_route(route, tmp_path, device))
