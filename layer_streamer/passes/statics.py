"""Tensors outside the streamed layers: put on the device for good, or viewed in host memory."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..checkpoint.manifest import Manifest, TensorSpec
from ..planning.layout import CASTABLE, View
from ..transport.files import OpenFiles
from ..transport.memory import view_tensor

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Linux's flag, which the mmap module of Python 3.11 does not name."""

BOUNCE = 16 << 20
"""Bytes of host memory that a tensor passes through on its way to the device."""


class Statics:
    """Loads single tensors of a checkpoint.

    Thread rules: any thread. What two threads ask for at once may be read twice, and is kept once.
    """

    def __init__(self, manifest: Manifest, files: OpenFiles, dtype: torch.dtype | None) -> None:
        self._manifest = manifest
        self._files = files
        self._dtype = dtype
        self._loaded: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._mapped: dict[str, torch.Tensor] = {}
        self.sizes: dict[tuple[str, torch.device], int] = {}
        """Bytes of what was loaded, by name and device."""

    def load(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor on ``device``, read once, cast as the layers are."""
        key = name, device
        if key not in self.sizes:
            loaded = self._load(self._manifest.tensor(name), device)
            self.sizes[key] = self._loaded.setdefault(key, loaded).nbytes
        return self._loaded[key]

    def view(self, name: str) -> torch.Tensor:
        """The tensor as stored, over the file's mapped pages; a copy if it is misaligned there."""
        spec = self._manifest.tensor(name)
        self._files.check_unchanged([spec.path])
        if spec.offset % spec.dtype.itemsize:
            with torch.inference_mode(False):
                memory = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
            self._files.read_into(spec.path, _bytes_of(memory), spec.offset)
            return view_tensor(memory, View(name, spec.dtype, spec.shape, 0, spec.nbytes))
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
        viewed = self._mapped.get(name)
        if viewed is None:
            viewed = self._mapped[name] = self._map(spec)
        return viewed

    def _map(self, spec: TensorSpec) -> torch.Tensor:
        # Copy-on-write: a stray write reaches neither the file nor a read-only page. No reserve:
        # a table larger than the free memory may be mapped all the same.
        start = spec.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(
            self._files.descriptor(spec.path),
            spec.offset + spec.nbytes - start,
            flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", MAP_NORESERVE),
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=start,
        )
        with torch.inference_mode(False):
            mapped = torch.from_numpy(np.frombuffer(pages, dtype=np.uint8))
        offset = spec.offset - start
        return view_tensor(mapped, View(spec.name, spec.dtype, spec.shape, offset, spec.nbytes))

    def _load(self, spec: TensorSpec, device: torch.device) -> torch.Tensor:
        dtype = spec.dtype
        if self._dtype is not None and dtype in CASTABLE:
            dtype = self._dtype
        with torch.inference_mode(False):
            result = torch.empty(spec.shape, dtype=dtype, device=device)
            flat = result.view(-1).view(torch.uint8) if dtype == spec.dtype else result.view(-1)
            # Reinterpreting a scalar's bytes needs a dimension, which view(-1) gave it.
            bounce = torch.empty(min(BOUNCE, max(spec.nbytes, 1)), dtype=torch.uint8, device="cpu")
        window = _bytes_of(bounce)
        done = 0
        while done < spec.nbytes:
            nbytes = min(len(window), spec.nbytes - done)
            self._files.read_into(spec.path, window[:nbytes], spec.offset + done)
            part = bounce[:nbytes]
            if dtype == spec.dtype:
                flat[done : done + nbytes].copy_(part)
            else:
                first, count = done // spec.dtype.itemsize, nbytes // spec.dtype.itemsize
                flat[first : first + count].copy_(part.view(spec.dtype))
            done += nbytes
        self._files.check_unchanged([spec.path])
        return result


def sum_by_device(sizes: Mapping[tuple[str, torch.device], int]) -> dict[str, int]:
    """Bytes by device's name. ``sizes`` may grow meanwhile, on another thread."""
    nbytes = dict[str, int]()
    for (_, device), size in dict(sizes).items():
        nbytes[str(device)] = nbytes.get(str(device), 0) + size
    return nbytes


def _bytes_of(memory: torch.Tensor) -> memoryview:
    array: Any = memory.numpy()
    return memoryview(array)
