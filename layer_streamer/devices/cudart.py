"""CUDA runtime calls that keep the interpreter's lock, and events that use them.

torch gives the lock back in each of these calls. They take microseconds, but a thread that computes
in pure Python may then take the lock and keep it for 5 ms, and a layer needs several such calls.
None of them waits for the device, unless about a thousand operations are queued on it.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

HOST_TO_DEVICE = 1
"""cudaMemcpyHostToDevice."""


class Runtime:
    """The runtime library that torch has loaded. Thread rules: as CUDA's; any thread."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        handle, count = ctypes.c_void_p, ctypes.c_size_t
        self._record = library.cudaEventRecord
        self._record.argtypes = [handle, handle]
        self._wait = library.cudaStreamWaitEvent
        self._wait.argtypes = [handle, handle, ctypes.c_uint]
        self._memcpy = library.cudaMemcpyAsync
        self._memcpy.argtypes = [handle, handle, count, ctypes.c_int, handle]
        self._describe = library.cudaGetErrorString
        self._describe.restype = ctypes.c_char_p

    def record(self, event: int, stream: Any) -> None:
        """Mark this point of ``stream`` by ``event``, a handle."""
        self._check(self._record(event, stream.cuda_stream))

    def wait(self, event: int, stream: Any) -> None:
        """Let ``stream`` wait for the latest record of ``event``."""
        self._check(self._wait(stream.cuda_stream, event, 0))

    def copy(self, dst: torch.Tensor, src: torch.Tensor, stream: Any) -> None:
        """Enqueue a copy from page-locked memory, of equal bytes, on ``stream``."""
        to, from_, nbytes = dst.data_ptr(), src.data_ptr(), dst.nbytes
        self._check(self._memcpy(to, from_, nbytes, HOST_TO_DEVICE, stream.cuda_stream))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code}: {self._describe(code).decode()}")


@cache
def load_runtime() -> Runtime | None:
    """The runtime of torch's CUDA version; None where there is none to be had (ROCm)."""
    if torch.version.cuda is None:
        return None
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    try:
        # By this name the loader finds the library that torch has loaded.
        return Runtime(ctypes.PyDLL(name))
    except (OSError, AttributeError) as error:
        logger.info("%s cannot be used (%s): torch's own calls are", name, error)
        return None


class CudaEvent(torch.cuda.Event):
    """A torch event whose records and waits keep the interpreter's lock.

    torch makes the event at its first record; from then on the runtime is called here. The default
    stream has no handle of its own, and is the current device's: then torch is asked, too.
    """

    _runtime: Runtime | None
    _handle: int

    @classmethod
    def make(cls, runtime: Runtime | None) -> CudaEvent:
        """An event that can be timed and lets a thread that waits for it sleep."""
        event = cls(enable_timing=True, blocking=True)
        event._runtime, event._handle = runtime, 0
        return event

    def record(self, stream: Any = None) -> None:
        """Mark this point of ``stream`` (None: the current one)."""
        if self._handle and self._runtime is not None and names_itself(stream):
            self._runtime.record(self._handle, stream)
            return
        super().record(stream)
        self._handle = self.cuda_event or 0

    def wait(self, stream: Any = None) -> None:
        """Let ``stream`` wait for this event, if it was ever recorded."""
        if self._handle and self._runtime is not None and names_itself(stream):
            self._runtime.wait(self._handle, stream)
            return
        super().wait(stream)


def names_itself(stream: Any) -> bool:
    """True if a call with this stream's handle means this stream."""
    if stream is None:
        return False
    return bool(stream.cuda_stream) or stream.device_index == torch.cuda.current_device()
