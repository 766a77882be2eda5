"""Streamers for the tests: on the CPU, over the late fake device, on a GPU; and what they saw."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from fake_device import FakeDevice

import layer_streamer.streamer
from layer_streamer import LayerStreamer
from layer_streamer.devices.accelerator import CudaDevice
from layer_streamer.devices.device import CpuDevice

POISON = 0xDB
HANG_SECONDS = 100.0


class LateCudaDevice(CudaDevice):
    """A GPU on which every copy first poisons its target and dawdles, so that order matters."""

    def copy(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        dst.view(-1).view(torch.uint8).fill_(POISON)
        torch.cuda._sleep(200_000)
        super().copy(dst, src)

    def copy_pinned(self, dst: torch.Tensor, src: torch.Tensor, stream: Any) -> None:
        dst.view(-1).view(torch.uint8).fill_(POISON)
        torch.cuda._sleep(200_000)
        super().copy_pinned(dst, src, stream)


def make_device(kind: str) -> Any:
    """A device by name: "cpu" (None: the streamer's own), "fake", "cuda"."""
    if kind == "fake":
        return FakeDevice(seed=7)
    return LateCudaDevice(torch.device("cuda")) if kind == "cuda" else None


def make_devices(kind: str, count: int) -> list[Any]:
    """``count`` devices of a kind; of GPUs no more than there are."""
    if kind == "cuda":
        there = min(count, torch.cuda.device_count())
        return [LateCudaDevice(torch.device("cuda", i)) for i in range(there)]
    return FakeDevice.several(count, seed=7) if kind == "fake" else [CpuDevice()] * count


@contextmanager
def opened_on(device: Any) -> Iterator[None]:
    """Streamers that are opened within get ``device``, one or several; None: the CPU."""
    before = layer_streamer.streamer.open_devices
    chosen = before("cpu") if device is None else device
    devices = tuple(chosen) if isinstance(chosen, list | tuple) else (chosen,)
    layer_streamer.streamer.open_devices = lambda wanted: devices
    try:
        yield
    finally:
        layer_streamer.streamer.open_devices = before


def open_checkpoint(device: Any, path: Path, **options: Any) -> LayerStreamer:
    """A streamer of the checkpoint at ``path`` on ``device``."""
    with opened_on(device):
        return LayerStreamer.from_checkpoint(path, **options)


class FailingDisk:
    """os.preadv that fails at a byte offset of a file, ``times`` times, once that is set."""

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
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()
    return errors[0] if errors else None


def footprint() -> tuple[list[str], int]:
    """Names of the threads, and number of open file descriptors, of this process."""
    return sorted(t.name for t in threading.enumerate()), psutil.Process().num_fds()


def held_nbytes() -> int:
    """Of all tensors that somebody has, once all is collected that nobody has."""
    while gc.collect():  # what is collected may let go of more
        pass
    memory = [some.untyped_storage() for some in gc.get_objects() if type(some) is torch.Tensor]
    return sum({each.data_ptr(): each.nbytes() for each in memory}.values())


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, flat."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Witness:
    """A layer_fn that compares every tensor it is given with the file's, byte for byte.

    ``device``: the one that layers are handed out on, or several; ``order``: the layers of a pass,
    if they are not all in order.

    On an asynchronous device the comparison is launched work; :meth:`check` waits for it.
    """

    def __init__(
        self,
        device: Any,
        tensors: Mapping[str, torch.Tensor],
        prefix: str = "model.layers.{i}.",
        order: Sequence[int] | None = None,
    ) -> None:
        self._devices = list(device) if isinstance(device, list | tuple) else [device]
        self._device = self._devices[0]
        self._prefix = prefix
        self._order = order
        self._tensors = tensors
        self._on_gpu = isinstance(self._device, CudaDevice)
        self._expected = {
            name: raw(tensor).cuda() if self._on_gpu else raw(tensor)
            for name, tensor in tensors.items()
        }
        self._flags: list[torch.Tensor] = []
        self.there: Sequence[int] = ()
        """Layers that are handed out in host memory, where work is not late."""
        self.layers: list[int] = []
        self.errors: list[str] = []

    def __call__(self, x: Any, weights: Mapping[str, torch.Tensor], layer_idx: int) -> Any:
        self.layers.append(layer_idx)
        # Work runs where its layer is: only there is it ordered after the layer's copies.
        place = layer_idx if self._order is None else self._order.index(layer_idx)
        self._device = self._devices[place % len(self._devices)]
        head = self._prefix.format(i=layer_idx)
        expected = {n[len(head) :] for n in self._tensors if n.startswith(head)}
        if set(weights) != expected:
            self.errors.append(f"layer {layer_idx}: keys {sorted(weights)}")
        for key, tensor in weights.items():
            self.see(head + key, tensor)
        return x

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """Compare one tensor."""
        wanted = self._tensors[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            self.errors.append(f"{name}: {tensor.dtype} {tuple(tensor.shape)}")
        if self._on_gpu and tensor.device.type == "cpu":
            if not torch.equal(raw(tensor), raw(wanted)):
                self.errors.append(f"{name}: not the file's bytes in host memory")
        elif self._on_gpu:
            torch.cuda._sleep(100_000)
            expected = self._expected[name].to(tensor.device, non_blocking=True)
            self._flags.append((raw(tensor) != expected).any())
        elif isinstance(self._device, FakeDevice) and self.layers[-1] not in self.there:
            self._device.launch(lambda: self._look(name, tensor))
        else:
            self._look(name, tensor)

    def _look(self, name: str, tensor: torch.Tensor) -> None:
        if not torch.equal(raw(tensor), self._expected[name]):
            self.errors.append(f"{name}: not the file's bytes")

    def check(self) -> None:
        """Fail unless every comparison so far, launched ones included, came out equal."""
        if isinstance(self._device, FakeDevice):
            self._device.drain()
            self.errors += self._device.errors
        if any(flag.item() for flag in self._flags):
            self.errors.append("a layer's bytes on the GPU were not the file's")
        self._flags.clear()
        assert not self.errors, self.errors[:5]


def rewrite_in_place(path: Path) -> None:
    """Other bytes of the same length, a moment later."""
    info = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x11" * 8)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))  # whatever a clock's tick
