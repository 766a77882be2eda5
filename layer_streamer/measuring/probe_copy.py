"""The memory's part of a probe: memcpy by threads; copies to devices, alone and together, raw."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from statistics import median

import numpy as np
import torch

from ..devices.device import CpuDevice, Device
from ..errors import StreamerError
from ..machine.limits import DeviceLimits, SizeRate, ThreadRate
from ..transport.memory import HostArena, allocate
from ..transport.tasks import run_all
from .probe_config import MIB, Journal, ProbeConfig
from .sampling import Sampler

PAGEABLE_NBYTES = 64 * MIB
"""Size of one copy from pageable memory."""
TOGETHER_NBYTES = 64 * MIB
"""The same, of copies to all devices at once."""
COPY_NBYTES = 512 << 20
"""Size of one raw copy: as fast as copies get."""
MAX_VIEWS = 256
"""Places in host memory that copies of one size go round."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Destination and source of a copy."""


def measure_memcpy(config: ProbeConfig, budget: int, journal: Journal) -> tuple[ThreadRate, ...]:
    """Host memory to host memory, each thread at its own piece; bytes are counted once."""
    size = config.buffered_chunk
    count = max(1, budget // 2 // size)
    sampler, rates = Sampler(config.effort), []
    with closing(host_memory([count * size] * 2)) as arena:
        source, target = (slot.numpy() for slot in arena.slots)

        def memcpy(worker: int, number: int) -> None:
            begin = number % count * size
            # One thread's copy: torch would spread it over threads of its own.
            np.copyto(target[begin : begin + size], source[begin : begin + size])

        for threads in config.memcpy_threads:
            journal.measuring(f"memcpy, {threads} threads")
            rate = sampler.measure(lambda num_jobs: memcpy, size, threads)
            if rate is not None:
                rates.append(ThreadRate(threads, rate))
    return tuple(rates)


def measure_device(
    device: Device, config: ProbeConfig, budget: int, journal: Journal
) -> DeviceLimits:
    """Copies of every size from pinned memory, from pageable memory, and back; one stream."""
    name = str(device.torch_device)
    memory = device_memory(device, min(max(config.copy_sizes), budget))
    copier = DeviceCopier(device, config)
    journal.measuring(f"{name}: copies from pageable memory")
    nbytes = min(PAGEABLE_NBYTES, memory.nbytes)
    with closing(host_memory([min(4 * nbytes, budget)])) as arena:
        pageable = copier.rate(pairs_of(memory, arena.memory, nbytes))
    with closing(host_memory([memory.nbytes], device)) as arena:
        if not arena.pinned:
            journal.note(f"{name}: page-locking was refused, its copies are of pageable memory")
        rates = []
        for size in copy_sizes(config, memory.nbytes):
            journal.measuring(f"{name}: copies of {size >> 10} KiB")
            rates.append(SizeRate(size, copier.rate(pairs_of(memory, arena.memory, size))))
        journal.measuring(f"{name}: copies back")
        pairs = pairs_of(memory, arena.memory, copy_sizes(config, memory.nbytes)[-1])
        back = copier.rate([(source, target) for target, source in pairs])
        return DeviceLimits(name, arena.pinned, tuple(rates), pageable, back)


def measure_together(
    devices: Sequence[Device], rates: Sequence[float], config: ProbeConfig, budget: int
) -> float:
    """Bytes a second of copies to all ``devices`` at once, a thread and a stream for each.

    Each gets bytes in proportion to its rate alone, so that all would end at the same time.
    """
    nbytes = min(TOGETHER_NBYTES, budget // len(devices))
    totals = [max(nbytes, round(rate * config.copy_seconds)) for rate in rates]
    with closing(RawCopies(devices, totals, nbytes)) as copies:
        samples = [sum(totals) / max(copies.seconds(), 1e-9) for _ in range(1 + config.samples)]
        return median(samples[1:])


def copy_sizes(config: ProbeConfig, most: int) -> list[int]:
    """The sizes of copies to measure, with no more than ``most`` bytes of memory."""
    return [size for size in config.copy_sizes if size <= most] or [most]


class DeviceCopier:
    """Rates of copies on one stream of a device, timed by the device's events."""

    def __init__(self, device: Device, config: ProbeConfig) -> None:
        self._device = device
        self._config = config
        self._stream = device.new_stream()

    def rate(self, pairs: Sequence[Pair]) -> float:
        """Bytes a second of copies of ``pairs`` in turn, back to back: the median of samples."""
        stopped = threading.Event()
        (rate,) = run_all([partial(self._measure, pairs, stopped)], 1, stopped=stopped)
        return rate

    def _measure(self, pairs: Sequence[Pair], stopped: threading.Event) -> float:
        # On a thread of the probe's own: the caller's current device and stream stay.
        self._device.use_in_this_thread(self._stream)
        begin, end = self._device.new_event(), self._device.new_event()
        nbytes = pairs[0][0].nbytes

        def sample(count: int) -> float:
            begin.record()
            _enqueue(self._device, pairs, count)
            end.record()
            end.synchronize()
            return count * nbytes / max(begin.elapsed_time(end) / 1e3, 1e-9)

        few = max(1, min(64, 64 * MIB // nbytes))
        try:
            sample(few)
            seconds = self._config.copy_seconds / self._config.samples
            count = max(1, int(sample(few) * seconds / nbytes))
            rates = [sample(count) for _ in range(self._config.samples) if not stopped.is_set()]
        finally:
            self._stream.synchronize()
        return median(rates) if rates else 0.0


class RawCopies:
    """Back-to-back copies of so many bytes from pinned memory to each device, all at once.

    Thread rules: one thread; it starts one a device.
    """

    def __init__(
        self, devices: Sequence[Device], totals: Sequence[int], piece: int = COPY_NBYTES
    ) -> None:
        """``totals``: bytes of each device, of which ``piece`` at a time. StreamerError."""
        self._loads = list[_Copies]()
        try:
            for device, total in zip(devices, totals, strict=True):
                if total:
                    self._loads.append(_Copies(device, min(piece, total), total))
        except BaseException:
            self.close()
            raise

    def seconds(self) -> float:
        """Measure once."""
        spans = run_all([load.run for load in self._loads], len(self._loads))
        return max(end for _, end in spans) - min(begin for begin, _ in spans)

    def close(self) -> None:
        """Give the pinned memory back."""
        for load in self._loads:
            load.arena.close()


class _Copies:
    """Copies of ``total`` bytes to one device, round and round through one piece of memory."""

    def __init__(self, device: Device, piece: int, total: int) -> None:
        self._device, self._stream = device, device.new_stream()
        memory = device_memory(device, piece)
        self.arena = host_memory([memory.nbytes], device)
        sizes = [min(memory.nbytes, total - done) for done in range(0, total, memory.nbytes)]
        self._pairs = [pairs_of(memory, self.arena.memory, size)[0] for size in sizes]

    def run(self) -> tuple[float, float]:
        """When the copies began and when they had ended, on the host's clock."""
        self._device.use_in_this_thread(self._stream)
        begin = time.perf_counter()
        try:
            _enqueue(self._device, self._pairs, len(self._pairs))
        finally:
            self._stream.synchronize()
        return begin, time.perf_counter()


def _enqueue(device: Device, pairs: Sequence[Pair], count: int) -> None:
    for number in range(count):
        device.copy(*pairs[number % len(pairs)])


def pairs_of(target: torch.Tensor, source: torch.Tensor, nbytes: int) -> list[Pair]:
    """Copies of ``nbytes`` to the same place on the device, from place after place on the host."""
    places = min(source.nbytes // nbytes, MAX_VIEWS)
    stride = source.nbytes // places
    with torch.inference_mode(False):
        to = target[:nbytes]
        return [(to, source[i * stride : i * stride + nbytes]) for i in range(places)]


def host_memory(sizes: Sequence[int], device: Device | None = None) -> HostArena:
    """Slots of host memory; page-locked for a device, if one is given and that is not refused."""
    pinned = device is not None
    arena = HostArena(sizes, device or CpuDevice(), pinned=pinned, threads=4)
    # Untouched pages are all the same page of zeros.
    arena.memory.fill_(1)
    return arena


def device_memory(device: Device, nbytes: int) -> torch.Tensor:
    """``nbytes`` on the device, or as near to it as there is free. StreamerError below a MiB."""
    while True:
        try:
            with device.guard():
                memory = allocate(nbytes, device)
                device.current_stream().synchronize()
                return memory
        except torch.OutOfMemoryError as error:
            nbytes //= 2
            if nbytes < MIB:
                raise StreamerError(f"{device.torch_device}: no memory is free there") from error
