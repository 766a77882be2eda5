"""Devices with memory of their own, and the choice of one.

:class:`AcceleratorDevice` is any device with torch's device-generic streams and events;
:class:`CudaDevice` adds page-locked host memory and events that let a waiting thread sleep.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, StreamerError
from ..planning.options import DeviceName
from .cudart import CudaEvent, load_runtime
from .device import CpuDevice, Device, Event, Numbers, Pieces, Stream
from .pieces import copy_pieces

logger = logging.getLogger(__name__)

CUDA_HOST_REGISTER_PORTABLE = 1
CUDA_HOST_REGISTER_READ_ONLY = 8


class AcceleratorDevice(Device):
    """A device with torch's generic streams and events; host memory stays pageable."""

    unified = False

    def __init__(self, torch_device: torch.device) -> None:
        index = torch_device.index
        if index is None:
            index = torch.accelerator.current_device_index()
        self.torch_device = torch.device(torch_device.type, index)

    def free_bytes(self) -> int:
        free, _ = torch.accelerator.get_memory_info(self.torch_device.index)
        return int(free)

    def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
        logger.warning(
            "%s: host memory cannot be page-locked, copies are slower", self.torch_device
        )
        return False

    def new_stream(self) -> Stream:
        return torch.Stream(self.torch_device)

    def new_event(self) -> Event:
        return torch.Event(self.torch_device, enable_timing=True)

    def current_stream(self) -> Stream:
        return torch.accelerator.current_stream(self.torch_device)

    def use_in_this_thread(self, stream: Any) -> None:
        torch.accelerator.set_device_index(self.torch_device.index)
        torch.accelerator.set_stream(stream)

    def wait_idle(self) -> None:
        torch.accelerator.synchronize(self.torch_device)

    def guard(self) -> AbstractContextManager[object]:
        return torch.accelerator.device_index(self.torch_device.index)


class CudaDevice(AcceleratorDevice):
    """An NVIDIA (or ROCm) GPU."""

    maps_files = True

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(torch_device)
        check_architecture(self.torch_device.index)
        self._runtime = load_runtime()

    def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
        flags = CUDA_HOST_REGISTER_PORTABLE | (CUDA_HOST_REGISTER_READ_ONLY if read_only else 0)
        cudart, nbytes = torch.cuda.cudart(), memory.nbytes
        for offset in range(0, nbytes, self.pin_segment):
            length = min(self.pin_segment, nbytes - offset)
            with self.guard():
                code = cudart.cudaHostRegister(memory.data_ptr() + offset, length, flags)
            if int(code) != 0:
                self._drain_error()
                self.unpin(memory[:offset])
                kind = "pages of a mapped file" if read_only else "host memory"
                gib = nbytes / 2**30
                logger.warning("page-locking %.2f GiB of %s was refused (%s)", gib, kind, code)
                return False
        return True

    def unpin(self, memory: torch.Tensor) -> None:
        cudart = torch.cuda.cudart()
        codes = [
            cudart.cudaHostUnregister(memory.data_ptr() + offset)
            for offset in range(0, memory.nbytes, self.pin_segment)
        ]
        if any(int(code) != 0 for code in codes):
            self._drain_error()

    def _drain_error(self) -> None:
        """Take the CUDA error of a refused registration: the next kernel is not to report it.

        torch has no binding for cudaGetLastError; its check after a kernel launch reads and clears
        that error.
        """
        try:
            torch.zeros(1, dtype=torch.float32, device=self.torch_device).add_(1)
        except RuntimeError as error:
            logger.debug("drained after a refused registration: %s", error)

    def new_stream(self) -> Stream:
        # High priority: the pool of streams that users rarely draw from.
        return torch.cuda.Stream(self.torch_device, priority=-1)

    def new_event(self) -> Event:
        return CudaEvent.make(self._runtime)

    def copy_pinned(self, dst: torch.Tensor, src: torch.Tensor, stream: Any) -> None:
        if self._runtime is None:
            self.copy(dst, src)
        else:
            self._runtime.copy(dst, src, stream)

    def copy_pieces(self, to: Pieces, source: Pieces, nbytes: Numbers, stream: Any) -> None:
        copy_pieces(*to, *source, nbytes, stream)

    def reads_host(self, memory: torch.Tensor) -> bool:
        with self.guard():
            return self._runtime is not None and self._runtime.same_address(memory)

    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self.torch_device)

    def check_can_wait(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise StreamerError(
                "a pass cannot run while the current stream captures a CUDA graph: "
                "the layers' copies would not be part of the graph"
            )


def check_architecture(index: int) -> None:
    """ConfigError if this torch has no code for GPU ``index``."""
    major, minor = torch.cuda.get_device_capability(index)
    archs = [arch for arch in torch.cuda.get_arch_list() if "_" in arch]
    found = [int(arch.split("_")[1].rstrip("af")) for arch in archs if arch.startswith("sm_")]
    ptx = [int(arch.split("_")[1].rstrip("af")) for arch in archs if arch.startswith("compute_")]
    own = 10 * major + minor
    # Machine code runs on the same major version from its minor on; PTX on anything newer.
    runs = any(sm // 10 == major and sm <= own for sm in found) or any(p <= own for p in ptx)
    if archs and torch.version.hip is None and not runs:
        raise ConfigError(
            f"device=cuda:{index}: {torch.cuda.get_device_name(index)} has compute capability "
            f"{major}.{minor}, this torch {torch.__version__} was built for {', '.join(archs)}; "
            "install a torch built for it, or pass device='cpu'"
        )


def open_device(device: DeviceName | None) -> Device:
    """The device that ``device`` names; None takes the GPU if there is one, else the CPU.

    ConfigError if it does not exist, or if a GPU is present that this torch cannot use: that is
    never answered by running on the CPU in silence.
    """
    if device is None:
        if torch.cuda.is_available():
            return CudaDevice(torch.device("cuda"))
        present = _unusable_gpu()
        if present:
            raise ConfigError(f"{present}; install a CUDA build of torch, or pass device='cpu'")
        return CpuDevice()
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={device!r}: no device has that name ({reason})") from error
    if wanted.type == "cpu":
        return CpuDevice()
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            reason = _unusable_gpu() or "no NVIDIA GPU was found"
            raise ConfigError(f"device={str(wanted)!r}: {reason}")
        if wanted.index is not None and wanted.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device={str(wanted)!r}: this machine has {torch.cuda.device_count()} GPU(s)"
            )
        return CudaDevice(wanted)
    current = torch.accelerator.current_accelerator(check_available=True)
    if current is None or current.type != wanted.type:
        found = current.type if current is not None else "none"
        raise ConfigError(f"device={str(wanted)!r}: not available (accelerator found: {found})")
    return AcceleratorDevice(wanted)


def open_devices(device: DeviceName | Sequence[DeviceName] | None) -> tuple[Device, ...]:
    """The devices that ``device`` names, one or several of one kind. Raises ConfigError."""
    if device is None or isinstance(device, str | torch.device):
        return (open_device(device),)
    if not device:
        raise ConfigError("device=[]: must name a device")
    devices = tuple(open_device(name) for name in device)
    names = [str(opened.torch_device) for opened in devices]
    if len({name.split(":")[0] for name in names}) > 1:
        raise ConfigError(f"device={names}: must be devices of one kind")
    if len(set(names)) < len(names) and not devices[0].unified:
        raise ConfigError(f"device={names}: a device is named twice")
    return devices


def _unusable_gpu() -> str | None:
    """What is known of an NVIDIA GPU that torch does not see; None if there is no sign of one."""
    driver, sign = Path("/proc/driver/nvidia/version"), "/dev/nvidiactl"
    if driver.exists():
        version = driver.read_text(errors="replace").splitlines()[0].removeprefix("NVRM version: ")
        sign = f"driver: {version.strip()}"
    elif not Path(sign).exists():
        return None
    cuda = torch.version.cuda
    built = f"built for CUDA {cuda}, cannot use it" if cuda else "is a CPU build"
    return f"an NVIDIA GPU is present ({sign}) but torch {torch.__version__} {built}"
