"""CUDA runtime calls that keep the interpreter's lock, and events that use them.

torch gives the lock back in each of these calls. They take microseconds, but a thread that computes
in pure Python may then take the lock and keep it for 5 ms, and a layer needs several such calls.
None of them waits for the device, unless about a thousand operations are queued on it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

logger = logging.getLogger(__name__)

HOST_TO_DEVICE = 1
"""cudaMemcpyHostToDevice."""
EITHER_WAY = 4
"""cudaMemcpyDefault: from the addresses."""
IN_STREAM_ORDER = 1
"""cudaMemcpySrcAccessOrderStream."""
BESIDE_COMPUTE = 1
"""cudaMemcpyFlagPreferOverlapWithCompute: the copy engines are to do it."""
MOST_BATCHES = 8
"""Of copies that were asked for at once; of more different sizes, all are one."""
BATCHES_SINCE = 13
"""Major version of CUDA whose cudaMemcpyBatchAsync has the parameters that are passed here."""


class CopyAttributes(ctypes.Structure):
    """cudaMemcpyAttributes, of CUDA 13's cuda_runtime_api.h; hints of places are left at none."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source_place", ctypes.c_int * 2),
        ("to_place", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


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
        self._memcpy_batch = None
        if cuda_version() >= BATCHES_SINCE:
            self._memcpy_batch = library.cudaMemcpyBatchAsync
            self._memcpy_batch.argtypes = [
                *[handle] * 3, count, handle, handle, count, handle,
            ]  # fmt: skip
            self._attributes = CopyAttributes(order=IN_STREAM_ORDER, flags=BESIDE_COMPUTE)
            self._first = ctypes.c_size_t(0)
        self._address = library.cudaHostGetDevicePointer
        self._address.argtypes = [ctypes.POINTER(handle), handle, ctypes.c_uint]
        self._forget = library.cudaGetLastError
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

    def copy_all(
        self,
        to: npt.NDArray[np.int64],
        from_: npt.NDArray[np.int64],
        nbytes: npt.NDArray[np.int64],
        stream: Any,
    ) -> None:
        """Enqueue copies between addresses of the device and of page-locked memory, in any order
        among themselves, on ``stream``. Best sorted by size."""
        handle = stream.cuda_stream
        if not nbytes.any():
            return
        if self._memcpy_batch is None or not handle:  # the default stream takes no batches
            for i, j, n in zip(to.tolist(), from_.tolist(), nbytes.tolist(), strict=True):
                self._check(self._memcpy(i, j, n, EITHER_WAY, handle))
            return
        # In memory of their own, one after the other; the call has read them at its return. A
        # batch may hold nothing empty.
        some = nbytes > 0
        numbers = np.stack([values[some] for values in (to, from_, nbytes)])
        rows = [numbers.ctypes.data + i * numbers.strides[0] for i in range(3)]
        attributes, first = ctypes.byref(self._attributes), ctypes.byref(self._first)
        for begin, end in _batches(numbers[2]):
            at = [row + begin * numbers.itemsize for row in rows]
            self._check(self._memcpy_batch(*at, end - begin, attributes, first, 1, handle))

    def same_address(self, memory: torch.Tensor) -> bool:
        """True: the current device's kernels find page-locked memory where the host has it."""
        found = ctypes.c_void_p()
        if self._address(ctypes.byref(found), memory.data_ptr(), 0):
            self._forget()
            return False
        return found.value == memory.data_ptr()

    def _check(self, code: int) -> None:
        if code:
            self._forget()  # or the next launch that torch checks would raise it, too
            raise RuntimeError(f"CUDA error {code}: {self._describe(code).decode()}")


def _batches(nbytes: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """From where to where: those of one size together. A batch of an expert after the other, with
    what is small between what is large, took a quarter longer on an H200."""
    bounds = [0, *(np.flatnonzero(np.diff(nbytes)) + 1).tolist(), len(nbytes)]
    return pairwise(bounds if len(bounds) <= MOST_BATCHES + 1 else (0, len(nbytes)))


def cuda_version() -> int:
    """Major version of the CUDA that torch was built for; 0: none."""
    return int((torch.version.cuda or "0").split(".")[0])


@cache
def load_runtime() -> Runtime | None:
    """The runtime of torch's CUDA version; None where there is none to be had (ROCm)."""
    if not cuda_version():
        return None
    name = f"libcudart.so.{cuda_version()}"
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
