"""What the hardware alone needs for a pass: raw reads, bare compute. Copies: see ``probe_copy``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.manifest import Manifest
from ..planning.layout import CASTABLE, PAGE, Read, align_up
from ..streamer import LayerStreamer
from ..transport.files import OpenFiles
from ..transport.mapped import merge_ranges
from .probe_copy import host_memory
from .sampling import run_jobs

READ_GRID = ((1, 16 << 20), (8, 2 << 20), (8, 8 << 20), (16, 1 << 20), (2, 1 << 20))
"""(threads, bytes a read) of which the fastest is the raw rate."""
TRIAL_NBYTES = 2 << 30
"""Bytes that each point of the grid reads to be chosen."""


class RawReads:
    """Reads of a pass's extents, in order, past the page cache if the streamer reads so too.

    The way to read is the fastest of READ_GRID on the first TRIAL_NBYTES of them. Each thread reads
    into the same small memory again and again, which may never leave the CPU's cache;
    ``spread_nbytes`` is the memory that whoever keeps the bytes for a while goes round through.
    """

    def __init__(
        self, manifest: Manifest, reads: Sequence[Read], *, direct: bool, spread_nbytes: int
    ) -> None:
        self._sizes = {path: stamp.size for path, stamp in manifest.files.items()}
        self._files = OpenFiles(manifest.files)
        if direct:
            self._files.use_direct()
        self._reads = reads
        largest = max(threads * chunk for threads, chunk in READ_GRID)
        self._arena = host_memory([max(largest, spread_nbytes)])
        times = {
            (threads, chunk): self._measure(threads, chunk, most=TRIAL_NBYTES)
            for threads, chunk in READ_GRID
        }
        self.threads, self.chunk = min(times, key=lambda point: times[point])
        self._slots = max(self.threads, spread_nbytes // self.chunk)

    def seconds(self) -> float:
        """Measure once."""
        return self._measure(self.threads, self.chunk)

    def spread_seconds(self) -> float:
        """Measure once, into as much memory as was said."""
        return self._measure(self.threads, self.chunk, slots=self._slots)

    def close(self) -> None:
        self._arena.close()
        self._files.close()

    def _measure(
        self, threads: int, chunk: int, *, most: int | None = None, slots: int | None = None
    ) -> float:
        """Seconds for the extents, or for about ``most`` bytes of them."""
        chunks = list(self._cut(chunk))
        if most is not None:
            chunks = chunks[: -(-most // chunk)]
        memory = self._arena.bytes[0]

        def read(worker: int, number: int) -> None:
            path, offset, nbytes, wanted = chunks[number]
            slot = worker if slots is None else number % slots
            view = memory[slot * chunk : slot * chunk + nbytes]
            self._files.read_into(path, view, offset, wanted)

        begin = time.perf_counter()
        run_jobs(read, len(chunks), threads)
        return time.perf_counter() - begin

    def _cut(self, chunk: int) -> Iterator[tuple[Path, int, int, int]]:
        """(path, offset, bytes in whole pages, bytes that the file has of these)."""
        for path, start, end in merge_ranges(self._reads):
            for offset in range(start, end, chunk):
                wanted = min(chunk, end - offset)
                nbytes = align_up(wanted, PAGE)
                yield path, offset, nbytes, min(nbytes, self._sizes[path] - offset)


class BareCompute:
    """A load's layers one after the other with weights that are on the device already.

    The weights of one layer stand for all: they are the same work.
    """

    def __init__(self, streamer: LayerStreamer, load: Load) -> None:
        self._load, self._device = load, streamer.device
        self._count = streamer.num_steps - len(streamer.plan.host_layers)
        sweep = streamer.sweep(on_host=False)
        _, weights = next(sweep)
        self._weights = {key: tensor.clone() for key, tensor in weights.items()}
        sweep.close()

    def seconds(self) -> float:
        """Measure once."""
        synchronize(self._device)
        begin = time.perf_counter()
        for layer_idx in range(self._count):
            self._load(None, self._weights, layer_idx)
        synchronize(self._device)
        return time.perf_counter() - begin


class Load:
    """A stand-in for a model: a layer's matrices of plain floats times ``tokens`` vectors."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._inputs: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}

    def __call__(self, x: Any, weights: Mapping[str, torch.Tensor], layer_idx: int) -> Any:
        for weight in weights.values():
            if self.tokens and weight.ndim == 2 and weight.dtype in CASTABLE:
                self._input(weight) @ weight.T
        return x

    def _input(self, weight: torch.Tensor) -> torch.Tensor:
        key = (weight.shape[1], weight.dtype, weight.device)
        if key not in self._inputs:
            shape = (self.tokens, weight.shape[1])
            self._inputs[key] = torch.randn(shape, dtype=torch.float32, device=weight.device).to(
                weight.dtype
            )
        return self._inputs[key]


def packed_share(manifest: Manifest) -> float:
    """Share of the layers' bytes with which :class:`Load` computes nothing: packed weights."""
    specs = [spec for layer in manifest.layers for spec in layer.tensors.values()]
    packed = sum(spec.nbytes for spec in specs if spec.dtype not in CASTABLE)
    return packed / max(sum(spec.nbytes for spec in specs), 1)


def synchronize(device: torch.device) -> None:
    """Wait for the work on the current stream of a device, as a caller that reads a result does.

    To wait for the whole device would be to wait for copies that are prefetched, too.
    """
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()
