"""What the streamer needs from a device: memory, streams, events, asynchronous copies.

:class:`CpuDevice` computes where the bytes are read; :mod:`.accelerator` has the devices with
memory of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ..machine.hostmem import available_host_bytes

# Registering fails beyond some hundred GiB a call; segments of this size work everywhere.
PIN_SEGMENT = 64 << 30
NO_GUARD: AbstractContextManager[object] = nullcontext()
"""May be entered again and again, also within itself."""


Numbers: TypeAlias = npt.NDArray[np.int64]
Pieces: TypeAlias = tuple[torch.Tensor, Numbers]
"""Bytes of memory (uint8), and where in it pieces begin."""


class Event(Protocol):
    """A point in a stream's work. Waiting on one that was never recorded does nothing."""

    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class Stream(Protocol):
    """A queue of device work, first in first out."""

    def synchronize(self) -> None: ...


class Device(Protocol):
    """The seam between the pipeline and a device; tests put an asynchronous fake behind it.

    What has a body here is what a device does that names it as its base, and says nothing else.
    """

    torch_device: torch.device
    unified: bool
    """True if host memory is the device's memory, so that a byte read is where it is used."""
    maps_files: bool = False
    """True if :meth:`pin` may be asked for the read-only pages of a mapped file."""
    pin_segment: int = PIN_SEGMENT
    """Bytes that :meth:`pin` locks at a time; no copy may cross from one segment to the next."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 tensor of ``nbytes`` on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def free_bytes(self) -> int:
        """Bytes of memory that can still be allocated on the device."""

    def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
        """Page-lock host memory; False, with a logged reason, where that is refused."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo :meth:`pin`; of memory that is not page-locked (any more): nothing."""
        return

    def new_stream(self) -> Stream:
        """A stream for copies."""

    def new_event(self) -> Event:
        """An event that can be timed and waited on by a thread."""

    def current_stream(self) -> Stream:
        """The calling thread's current stream on this device."""

    def use_in_this_thread(self, stream: Stream) -> None:
        """Make this device and ``stream`` the calling thread's current ones."""

    def copy(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        """Enqueue a copy (a cast, if dtypes differ) on the calling thread's current stream."""
        dst.copy_(src, non_blocking=True)

    def copy_pinned(self, dst: torch.Tensor, src: torch.Tensor, stream: Stream) -> None:
        """Enqueue a copy of equal bytes from page-locked memory on the thread's current stream."""
        self.copy(dst, src)

    def copy_pieces(self, to: Pieces, source: Pieces, nbytes: Numbers, stream: Any) -> None:
        """Enqueue many copies from page-locked memory on ``stream``, in any order. Of devices that
        copy from mapped files."""
        (there, to_at), (here, from_at) = to, source
        for i, j, n in zip(to_at.tolist(), from_at.tolist(), nbytes.tolist(), strict=True):
            self.copy_pinned(there[i : i + n], here[j : j + n], stream)

    def reads_host(self, memory: torch.Tensor) -> bool:
        """True: its kernels may read this page-locked memory by the host's address."""
        return False

    def launch(self, work: Callable[[], object]) -> None:
        """Do ``work``, which only launches kernels on the calling thread's current stream."""
        work()

    def wait_idle(self) -> None:
        """Block until the device has done all work there is."""

    def guard(self) -> AbstractContextManager[object]:
        """Context in which this device is the current one."""

    def check_can_wait(self) -> None:
        """StreamerError if the current stream cannot take part in a pass (graph capture)."""
        return


class HostEvent:
    """An event of a device whose work is done when the call returns: a time stamp."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        return

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this record to ``end``'s, as torch's events count."""
        return (end.seconds - self.seconds) * 1e3


class HostStream:
    """The one stream of a device that computes synchronously."""

    __slots__ = ()

    def synchronize(self) -> None:
        return


class CpuDevice(Device):
    """The CPU: slots are ordinary memory, and work is done when a call returns."""

    unified = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._stream = HostStream()

    def free_bytes(self) -> int:
        return available_host_bytes()

    def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
        return False

    def new_stream(self) -> Stream:
        return self._stream

    def new_event(self) -> Event:
        return HostEvent()

    def current_stream(self) -> Stream:
        return self._stream

    def use_in_this_thread(self, stream: Stream) -> None:
        return

    def wait_idle(self) -> None:
        return

    def guard(self) -> AbstractContextManager[object]:
        return NO_GUARD
