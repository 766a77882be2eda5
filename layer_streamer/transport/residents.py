"""What stays in memory for good: layers resident on a device or in host memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..devices.device import HostStream
from ..planning.layout import Layout
from .memory import Watch
from .parts import Extent
from .pool import Scratch, Source
from .weights import Weights

HOST = HostStream()


class Owner(Protocol):
    """Of host memory: a HostArena, MappedFiles, or what has some."""

    @property
    def nbytes(self) -> int: ...
    @property
    def pinned(self) -> bool: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Residents:
    """What the steps of all devices have in memory for good, by their index in the pass.

    Ownership: filled while opening, then the caller's thread's. What changes afterwards may be
    interrupted anywhere, and called again.
    """

    weights: dict[int, Weights] = field(default_factory=dict)
    """On their device, as they are handed out."""
    looks: dict[int, Callable[[], None]] = field(default_factory=dict)
    """Of those of them, and of ``host``, that lie in the pages of a mapped file, what has these in
    memory, on the thread that is handed them. Raises what reads raise."""
    host: dict[int, Weights] = field(default_factory=dict)
    """In host memory, as they are handed out there, but for casts; they have ``sources``, too."""
    scratch: Scratch | None = None
    """The slot for casts of these."""
    sources: dict[int, Source] = field(default_factory=dict)
    """In host memory, as they are copied."""
    mapped: dict[int, Weights] = field(default_factory=dict)
    """Over the pages of a mapped file, as stored; faulted in anew for every pass (CPU)."""
    fault_in: Callable[[Extent], None] = lambda extent: None
    """Brings bytes of the mapped ones into memory. Any thread."""
    watches: dict[int, Watch] = field(default_factory=dict)
    """Over the memory that is handed out, on the device or mapped."""
    reload: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What brings a step's bytes there again."""
    written: set[int] = field(default_factory=set)
    """Steps whose bytes are no longer those of the files, for the caller wrote to them."""
    owners: list[Owner] = field(default_factory=list)
    """Of host memory that the sources lie in, with page locks to give back."""
    device_nbytes: int = 0
    """Of the steps on devices."""

    @property
    def scratch_nbytes(self) -> int:
        """Host memory that casts take."""
        return 0 if self.scratch is None else self.scratch.memory.nbytes

    def on_host(self, i: int, layout: Layout) -> Weights:
        """A step's tensors in host memory, cast. Raises what reads raise."""
        if i in self.looks:
            self.looks[i]()
        stored = self.host[i]
        return stored if self.scratch is None else self.scratch.cast(stored, layout, HOST)

    def release_cast(self, i: int, layout: Layout) -> bool:
        """The hand-out of a step in host memory has ended; True if its casts were written to."""
        if self.scratch is None:
            return False
        self.scratch.record_uses(HOST)
        return self.scratch.expire_cast(self.host[i], layout)

    def release(self, i: int) -> bool:
        """The hand-out of a step has ended; True if the caller has written to its tensors."""
        watch = self.watches.get(i)
        if watch is None:
            return False
        mapped = self.mapped.get(i)
        if mapped is not None and mapped.wants_grad():
            self.mapped[i] = mapped.without_grad()
        if watch.written():
            self.written.add(i)
        return i in self.written

    def find_written(self) -> None:
        """Look for steps that the caller has written to."""
        self.written |= {i for i, watch in self.watches.items() if watch.written()}

    def restore_host(self) -> None:
        """Load those again that are copied from where the caller has written. Raises what reads
        raise; before anything is copied in a new run."""
        for i in self.written.intersection(self.host):
            self.restore(i)

    def restore(self, i: int) -> None:
        """Load a step again if it has been written to. Raises what reads raise."""
        if i in self.written:
            self.reload[i]()
            self.watches[i].expire()  # what autograd has saved of it is gone
            self.written.discard(i)
