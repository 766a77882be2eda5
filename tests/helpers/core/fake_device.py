"""A device whose work happens late: the oracle for the order of events.

Memory is ordinary memory; streams are queues of closures. An operation runs when a wait forces it,
or earlier, as a seeded random scheduler pleases, in any order that the events permit. Copies poison
their target first, so that work that reads a slot too early or too late sees it.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from layer_streamer.devices.device import CpuDevice, Numbers, Pieces

POISON = 0xDB


class FakeEvent:
    """Tells its records apart, as a device does when an event is recorded again."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.owners: dict[int, FakeStream] = {}
        self.executed: set[int] = set()
        self.seconds = 0.0

    @property
    def latest(self) -> int | None:
        """The latest record that was issued."""
        return len(self.owners) - 1 if self.owners else None

    def record(self, stream: FakeStream | None = None) -> None:
        device = self._device
        with device.lock:
            number = len(self.owners)
            self.owners[number] = stream if stream is not None else device.current_stream()
            self.owners[number].push(lambda: self._execute(number))
            device.nudge()

    def wait(self, stream: FakeStream | None = None) -> None:
        (stream if stream is not None else self._device.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        with self._device.lock:
            if self.latest is not None:
                self._device.force(self, self.latest)

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.seconds - self.seconds) * 1e3

    def _execute(self, number: int) -> None:
        self.executed.add(number)
        self.seconds = time.perf_counter()


class FakeStream:
    """Operations in order; a wait holds the queue until its event's record has executed."""

    def __init__(self, device: FakeDevice, name: str) -> None:
        self.name = name
        self._device = device
        self.operations: deque[Callable[[], None] | tuple[FakeEvent, int]] = deque()

    def push(self, operation: Callable[[], None]) -> None:
        with self._device.lock:
            self.operations.append(operation)

    def wait_event(self, event: FakeEvent) -> None:
        with self._device.lock:
            # As on a real device: a wait on an event never recorded is no wait.
            if event.latest is not None:
                self.operations.append((event, event.latest))
            self._device.nudge()

    def synchronize(self) -> None:
        with self._device.lock:
            while self.operations:
                self._device.run_head(self)

    def ready(self) -> bool:
        if not self.operations:
            return False
        head = self.operations[0]
        return not isinstance(head, tuple) or head[1] in head[0].executed


class FakeDevice:
    """An asynchronous device in host memory; ``seed`` picks the schedule."""

    unified = False
    maps_files = True
    pin_segment = 1 << 40

    @classmethod
    def several(cls, count: int, seed: int) -> list[FakeDevice]:
        """Devices that share a host: one lock, one list of streams, of errors, of page locks."""
        first = cls(seed)
        return [first, *(cls(seed, host=first) for _ in range(count - 1))]

    def __init__(
        self, seed: int, eager: float | None = None, host: FakeDevice | None = None
    ) -> None:
        self.torch_device = torch.device("cpu")
        self.lock = threading.RLock() if host is None else host.lock
        self.errors: list[str] = [] if host is None else host.errors
        self._random = random.Random(seed)
        self._eager = self._random.choice([0.0, 0.1, 0.5, 0.9]) if eager is None else eager
        self._thread = threading.local()
        self.streams: list[FakeStream] = [] if host is None else host.streams
        self.default_stream = self.new_stream()
        self._pinned: set[int] = set() if host is None else host._pinned
        """Addresses of the memory that is page-locked."""
        # Whichever device copies from it: memory is pinned by one for all.
        self._copies: Counter[int] = Counter() if host is None else host._copies

    def allocate(self, nbytes: int) -> torch.Tensor:
        memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        # The allocator's promise covers its own stream only: earlier work may still run there.
        self.current_stream().push(lambda: memory.fill_(POISON))
        return memory

    def free_bytes(self) -> int:
        return 1 << 40

    def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
        self._pinned.add(memory.data_ptr())
        return True

    def unpin(self, memory: torch.Tensor) -> None:
        with self.lock:
            if self._copies[memory.data_ptr()]:
                self.errors.append("host memory was given back with copies still to run")
        self._pinned.discard(memory.data_ptr())

    def new_stream(self) -> FakeStream:
        stream = FakeStream(self, f"stream {len(self.streams)}")
        with self.lock:
            self.streams.append(stream)
        return stream

    def new_event(self) -> FakeEvent:
        return FakeEvent(self)

    def current_stream(self) -> FakeStream:
        return getattr(self._thread, "stream", self.default_stream)

    def use_in_this_thread(self, stream: FakeStream) -> None:
        self._thread.stream = stream

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        """Make ``stream`` the calling thread's current one for a while."""
        before = self.current_stream()
        self._thread.stream = stream
        try:
            yield
        finally:
            self._thread.stream = before

    def copy(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        stream = self.current_stream()
        with self.lock:
            stream.push(lambda: dst.view(-1).view(torch.uint8).fill_(POISON))
            arena = src.untyped_storage().data_ptr()
            self._copies[arena] += 1
            stream.push(lambda: self._execute_copy(dst, src, arena))
            self.nudge()

    def copy_pinned(self, dst: torch.Tensor, src: torch.Tensor, stream: FakeStream) -> None:
        self.copy(dst, src)

    def copy_pieces(self, to: Pieces, source: Pieces, nbytes: Numbers, stream: FakeStream) -> None:
        (there, to_at), (here, from_at) = to, source
        with self.on(stream):
            for i, j, n in zip(to_at.tolist(), from_at.tolist(), nbytes.tolist(), strict=True):
                self.copy(there[i : i + n], here[j : j + n])

    def _execute_copy(self, dst: torch.Tensor, src: torch.Tensor, arena: int) -> None:
        dst.copy_(src)
        self._copies[arena] -= 1

    def reads_host(self, memory: torch.Tensor) -> bool:
        """Kernels, which Triton's interpreter runs, see all memory."""
        return memory.data_ptr() in self._pinned

    def launch(self, operation: Callable[[], object]) -> None:
        """Enqueue work on the calling thread's current stream."""
        self.current_stream().push(operation)

    def wait_idle(self) -> None:
        self.drain()

    def guard(self) -> AbstractContextManager[object]:
        return nullcontext()

    def check_can_wait(self) -> None:
        return

    def nudge(self) -> None:
        """Let some work happen now, as a real device does behind the host's back."""
        while self._random.random() < self._eager:
            ready = [stream for stream in self.streams if stream.ready()]
            if not ready:
                return
            self.run_head(self._random.choice(ready))

    def force(self, event: FakeEvent, number: int) -> None:
        """Run no more than what the record ``number`` of ``event`` depends on."""
        while number not in event.executed:
            self.run_head(event.owners[number])

    def run_head(self, stream: FakeStream) -> None:
        """Execute a stream's oldest operation, and first whatever that waits for."""
        while True:
            behind = stream
            while not behind.ready():
                event, number = behind.operations[0]  # type: ignore[misc]
                behind = event.owners[number]
            operation = behind.operations.popleft()
            if not isinstance(operation, tuple):
                operation()
            if behind is stream:
                return

    def busy(self) -> bool:
        """True while the calling thread is inside the fake, where a real device has no Python."""
        return bool(self.lock._is_owned())  # type: ignore[attr-defined]

    def drain(self) -> None:
        """Run everything that is left."""
        with self.lock:
            while any(stream.operations for stream in self.streams):
                busy = [stream for stream in self.streams if stream.operations]
                self.run_head(self._random.choice(busy))


class NearDevice(CpuDevice):
    """A device with memory of its own whose work is done when a call returns: what is streamed is
    copied to its slots, and host memory is another tier."""

    unified = False
    maps_files = True

    def free_bytes(self) -> int:
        return 1 << 40

    def pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
        return True


@contextmanager
def near_device() -> Iterator[None]:
    """Streamers and plans of "cpu" take it for the CPU, and of a list for several."""
    with opened_as(lambda number: NearDevice()):
        yield


@contextmanager
def opened_as(make: Callable[[int], Any]) -> Iterator[None]:
    """What streamers and plans open for each device that is named, by its place among these."""

    def open_devices(wanted: Any) -> tuple[Any, ...]:
        names = wanted if isinstance(wanted, list | tuple) else [wanted]
        return tuple(make(number) for number in range(len(names)))

    with ExitStack() as stack:
        for module in ("streamer", "preview", "measuring.products"):
            stack.enter_context(patch(f"layer_streamer.{module}.open_devices", open_devices))
        yield


@contextmanager
def named_twice() -> Iterator[None]:
    """An engine may be given one device several times."""

    def choose(device: Any) -> tuple[torch.device, ...]:
        names = device.split(",") if isinstance(device, str) else device
        return tuple(map(torch.device, names if isinstance(names, list | tuple) else [names]))

    with ExitStack() as stack:
        for module in ("opening", "batching.room"):
            stack.enter_context(patch(f"layer_streamer.llm.{module}.choose_devices", choose))
        yield
