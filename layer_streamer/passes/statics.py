"""Tensors outside the streamed layers: put on the device for good, or viewed in host memory."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint.manifest import Manifest, TensorSpec
from ..planning.layout import CASTABLE, View
from ..transport.files import OpenFiles
from ..transport.mapped import map_range
from ..transport.memory import view_tensor

BOUNCE = 16 << 20
"""Bytes of host memory that a tensor passes through on its way to the device."""


class Statics:
    """Loads single tensors of a checkpoint.

    Thread rules: any thread. What two threads ask for at once may be read twice; both get the same.
    """

    def __init__(self, manifest: Manifest, files: OpenFiles, dtype: torch.dtype | None) -> None:
        self._manifest = manifest
        self._files = files
        self._dtype = dtype
        self._loaded: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._viewed: dict[str, torch.Tensor] = {}
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
        if name not in self._viewed:
            return self._viewed.setdefault(name, self._view(spec))
        return self._viewed[name]

    def _view(self, spec: TensorSpec) -> torch.Tensor:
        if spec.nbytes and not spec.offset % spec.dtype.itemsize:
            start = spec.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            end = spec.offset + spec.nbytes
            memory = map_range(self._files, spec.path, start, end, private=True).memory
        else:
            start = spec.offset
            with torch.inference_mode(False):
                memory = torch.empty(spec.nbytes, dtype=torch.uint8, device="cpu")
            self._files.read_into(spec.path, _bytes_of(memory), spec.offset)
        offset = spec.offset - start
        return view_tensor(memory, View(spec.name, spec.dtype, spec.shape, offset, spec.nbytes))

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
