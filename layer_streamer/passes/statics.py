"""Tensors outside the streamed layers: put on the device for good, or viewed in host memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..checkpoint.manifest import Manifest, TensorSpec
from ..devices.device import CpuDevice, Device
from ..planning.layout import Step, cast_dtype, lay_out
from ..transport.loader import Loader
from ..transport.mapped import MappedFiles


class Statics:
    """Loads single tensors of a checkpoint.

    Thread rules: any thread. What two threads ask for at once may be read twice; both get the same.
    """

    def __init__(self, manifest: Manifest, loader: Loader, dtype: torch.dtype | None) -> None:
        self._manifest = manifest
        self._loader = loader
        self._dtype = dtype
        self._loaded: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._viewed: dict[str, torch.Tensor] = {}
        self.sizes: dict[tuple[str, torch.device], int] = {}
        """Bytes of what was loaded, by name and device."""

    def load(self, name: str, device: Device) -> torch.Tensor:
        """The tensor on ``device``, read once, cast as the layers are."""
        key = name, device.torch_device
        if key not in self.sizes:
            spec = self._manifest.tensor(name)
            loaded = self._load(spec, cast_dtype(spec.dtype, self._dtype), device)
            self.sizes[key] = self._loaded.setdefault(key, loaded).nbytes
        return self._loaded[key]

    def view(self, name: str) -> torch.Tensor:
        """The tensor as stored, over the file's mapped pages; a copy if it is misaligned there."""
        spec = self._manifest.tensor(name)
        self._loader.files.check_unchanged([spec.path])
        if name not in self._viewed:
            return self._viewed.setdefault(name, self._view(spec))
        return self._viewed[name]

    def _view(self, spec: TensorSpec) -> torch.Tensor:
        step = Step(0, {spec.name: spec})
        layout = lay_out(step, unified=True)
        if layout.copies:
            return self._load(spec, spec.dtype, CpuDevice())
        mapped = MappedFiles(self._loader.files, layout.reads, handed_out=True)
        return mapped.view(step)[0][spec.name]

    def _load(self, spec: TensorSpec, dtype: torch.dtype, device: Device) -> torch.Tensor:
        with device.guard():
            with torch.inference_mode(False):
                result = torch.empty(spec.shape, dtype=dtype, device=device.torch_device)
            self._loader.fill([(spec, result)], device)
        return result


def sum_by_device(sizes: Mapping[tuple[str, torch.device], int]) -> dict[str, int]:
    """Bytes by device's name. ``sizes`` may grow meanwhile, on another thread."""
    nbytes = dict[str, int]()
    for (_, device), size in dict(sizes).items():
        nbytes[str(device)] = nbytes.get(str(device), 0) + size
    return nbytes
