"""What stays in memory for good: layers resident on a device or in host memory, and their loading.

Everything here happens once, while a streamer is opened, by several threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from ..checkpoint.manifest import TensorSpec
from ..devices.device import Device, Event, Stream
from ..errors import StreamerError
from ..planning.layout import PAGE, Layout, Step, align_up, lay_out_resident
from .files import OpenFiles
from .mapped import MappedFiles
from .memory import HostArena, Watch, allocate
from .parts import Cutter, Extent, read_extent
from .pool import Source, cut_parts, cut_source, view_all
from .tasks import run_all
from .weights import Weights

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Residents:
    """What steps have in memory for good, by their index in the pass.

    Ownership: filled while opening, then the caller's thread's. What changes afterwards may be
    interrupted anywhere, and called again.
    """

    weights: dict[int, Weights] = field(default_factory=dict)
    """On their device, as they are handed out."""
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
    owners: list[HostArena | MappedFiles] = field(default_factory=list)
    """What has page locks to give back."""
    device_nbytes: int = 0
    host_nbytes: int = 0
    pinned_nbytes: int = 0

    def view_mapped(self, other: Residents) -> None:
        """Hand out the mapped steps of ``other``, which owns them."""
        self.mapped, self.fault_in = other.mapped, other.fault_in
        for i in other.mapped:
            self.watches[i], self.reload[i] = other.watches[i], other.reload[i]

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

    def restore(self, i: int) -> None:
        """Load a step again if it has been written to. Raises what reads raise."""
        if i in self.written:
            self.reload[i]()
            self.watches[i].expire()  # what autograd has saved of it is gone
            self.written.discard(i)

    def close(self) -> None:
        """Give the page locks back; the memory goes with its last view. Idempotent."""
        for owner in self.owners:
            owner.close()


class Loader:
    """Brings resident layers into memory: ``threads`` at once, ``chunk`` bytes at a stretch.

    ``on_loaded(bytes)`` is called on the calling thread as they arrive. Raises what reads raise,
    with the tensor's name.
    """

    def __init__(
        self, files: OpenFiles, chunk: int, threads: int, on_loaded: Callable[[int], object]
    ) -> None:
        self._files = files
        self._chunk = align_up(chunk, PAGE)
        self._threads = threads
        self._on_loaded = on_loaded

    def load_device(
        self, into: Residents, steps: Mapping[int, Step], device: Device, dtype: torch.dtype | None
    ) -> None:
        """Put steps on the device for good, cast as they are handed out."""
        placed = {i: lay_out_resident(step, dtype) for i, step in steps.items()}
        slab = allocate(sum(nbytes for _, nbytes in placed.values()), device)
        into.device_nbytes += slab.nbytes
        again = Loader(self._files, self._chunk, self._threads, lambda nbytes: None)
        targets, base = list[tuple[Step, Weights]](), 0
        for i, (views, nbytes) in placed.items():
            (memory,) = cut_parts(slab, [(base, nbytes)])
            watch = into.watches[i] = Watch([memory])
            into.weights[i] = view_all(watch.memory[0], views)
            targets.append((steps[i], view_all(memory, views)))
            into.reload[i] = partial(again._reload, targets[-1:], device)
            base += nbytes
        self._fill(targets, device)

    def _reload(self, targets: Sequence[tuple[Step, Weights]], device: Device) -> None:
        device.wait_idle()  # no event tells what still reads them
        with device.guard():
            self._fill(targets, device)

    def _fill(self, targets: Sequence[tuple[Step, Weights]], device: Device) -> None:
        bounces = _Bounces(device, self._chunk, self._threads)
        try:
            tasks = list[Callable[[], int]]()
            for step, tensors in targets:
                for key, spec in step.tensors.items():
                    tasks += self._cut_tensor(spec, tensors[key], bounces)
            self._run(tasks)
        finally:
            bounces.close()

    def load_host(self, into: Residents, layouts: Mapping[int, Layout], device: Device) -> None:
        """Read steps into an arena of exactly their size, pinned if the device can."""
        sizes = [layout.host_nbytes for layout in layouts.values()]
        arena = HostArena(sizes, device, pinned=True, threads=self._threads)
        into.owners.append(arena)
        into.host_nbytes += arena.nbytes
        into.pinned_nbytes += arena.nbytes if arena.pinned else 0
        cutter = Cutter(None, self._chunk, aligned=self._files.reads_direct)
        tasks: list[Callable[[], int]] = []
        for (i, layout), slot, base in zip(
            layouts.items(), arena.bytes, arena.offsets, strict=True
        ):
            into.sources[i] = cut_source(
                arena.memory, base, layout.copies, device.pin_segment, pinned=arena.pinned
            )
            (part,) = cutter.cut(layout)
            tasks += [partial(self._read_all, part.job(j), slot) for j in range(part.num_jobs)]
        self._run(tasks)

    def map_host(self, into: Residents, layouts: Mapping[int, Layout], device: Device) -> bool:
        """Page-lock the files' own pages; False, with nothing kept, where that is refused."""
        try:
            mapped = self._map(layouts, private=False)
        except OSError as error:
            logger.warning("mapping files was refused (%s)", error)
            return False
        mapped.populate_all(self._threads, self._on_loaded)
        if not mapped.pin(device):
            return False
        into.owners.append(mapped)
        into.host_nbytes += mapped.nbytes
        into.pinned_nbytes += mapped.nbytes
        for i, layout in layouts.items():
            into.sources[i] = mapped.source(layout, device.pin_segment)
        return True

    def view_mapped(
        self, into: Residents, steps: Mapping[int, Step], layouts: Mapping[int, Layout]
    ) -> bool:
        """View steps in the files' own pages (CPU), which each pass faults in.

        False, with nothing kept, where the system cannot say that a look at them would kill.
        """
        try:
            mapped = self._map(layouts, private=True)
            mapped.check_populates()
        except OSError as error:
            logger.warning("mapping or populating files was refused (%s)", error)
            return False
        into.owners.append(mapped)
        for i, step in steps.items():
            into.mapped[i], into.watches[i] = mapped.view(step)
            into.reload[i] = partial(mapped.restore, layouts[i].reads)
        into.fault_in = mapped.fault_in
        return True

    def _map(self, layouts: Mapping[int, Layout], *, private: bool) -> MappedFiles:
        reads = [read for layout in layouts.values() for read in layout.reads]
        return MappedFiles(self._files, reads, private=private)

    def _run(self, tasks: Sequence[Callable[[], int]]) -> None:
        run_all(tasks, self._threads, on_done=self._on_loaded)
        self._files.check_unchanged()

    def _read_all(self, extents: Sequence[Extent], slot: memoryview) -> int:
        for extent in extents:
            read_extent(self._files, extent, slot)
        return sum(extent.wanted for extent in extents)

    def _cut_tensor(
        self, spec: TensorSpec, tensor: torch.Tensor, bounces: _Bounces
    ) -> list[Callable[[], int]]:
        return [
            partial(self._load_part, spec, tensor, done, bounces)
            for done in range(0, spec.nbytes, self._chunk)
        ]

    def _load_part(
        self, spec: TensorSpec, tensor: torch.Tensor, done: int, bounces: _Bounces
    ) -> int:
        """Bring up to a chunk of a tensor, from byte ``done`` on, to its device."""
        nbytes = min(self._chunk, spec.nbytes - done)
        bounce = bounces.mine()
        try:
            payload = self._read(spec, done, nbytes, bounce.slot)
        except StreamerError as error:
            raise type(error)(f"tensor {spec.name!r}: {error}") from error
        flat = tensor.view(-1)
        if tensor.dtype == spec.dtype:
            bounces.copy(bounce, flat.view(torch.uint8)[done : done + nbytes], payload)
        else:
            first, itemsize = done // spec.dtype.itemsize, spec.dtype.itemsize
            aligned = payload if not payload.data_ptr() % itemsize else payload.clone()
            part = flat[first : first + nbytes // itemsize]
            bounces.copy(bounce, part, aligned.view(spec.dtype))
        return nbytes

    def _read(self, spec: TensorSpec, done: int, nbytes: int, slot: torch.Tensor) -> torch.Tensor:
        offset = spec.offset + done
        lead = offset % PAGE if self._files.reads_direct else 0
        length = align_up(lead + nbytes, PAGE) if self._files.reads_direct else nbytes
        array: Any = slot.numpy()
        view = memoryview(array)[:length]
        self._files.read_into(spec.path, view, offset - lead, lead + nbytes)
        return slot[lead : lead + nbytes]


class _Bounce(NamedTuple):
    """One thread's host memory on the way to a device."""

    slot: torch.Tensor
    stream: Stream
    copied: Event


class _Bounces:
    """Pinned host memory for each loading thread, ``chunk`` bytes and the pages at its ends."""

    def __init__(self, device: Device, chunk: int, threads: int) -> None:
        self._device = device
        self._allocated = device.new_event()
        self._allocated.record(device.current_stream())
        sizes = [chunk + 2 * PAGE] * threads
        self._arena = HostArena(sizes, device, pinned=not device.unified, threads=threads)
        self._free = list(self._arena.slots)
        self._local = threading.local()

    def mine(self) -> _Bounce:
        """The calling thread's own, on a stream that is made the thread's at the first call."""
        if not hasattr(self._local, "bounce"):
            stream = self._device.new_stream()
            self._device.use_in_this_thread(stream)
            self.order_after_allocation(stream)
            self._local.bounce = _Bounce(self._free.pop(), stream, self._device.new_event())
        bounce: _Bounce = self._local.bounce
        return bounce

    def order_after_allocation(self, stream: Stream) -> None:
        """Let the copies wait for whatever used the layers' memory before it was theirs."""
        self._allocated.wait(stream)

    def copy(self, bounce: _Bounce, dst: torch.Tensor, src: torch.Tensor) -> None:
        """Copy and wait until it has happened; the other threads read meanwhile."""
        self._device.copy(dst, src)
        bounce.copied.record(bounce.stream)
        self.wait_copied(bounce)

    def wait_copied(self, bounce: _Bounce) -> None:
        """Block until the device has read the bounce, which is filled again after that."""
        bounce.copied.synchronize()

    def close(self) -> None:
        self._arena.close()
