"""What stays in memory for good: layers resident on a device or in host memory, and the loading of
these and of single tensors.

It happens once, by several threads: of layers while a streamer is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch

from ..checkpoint.manifest import TensorSpec
from ..devices.device import Device
from ..errors import StreamerError
from ..planning.layout import PAGE, Layout, Step, align_up, lay_out_resident
from .files import OpenFiles
from .mapped import MappedFiles
from .memory import Bounces, HostArena, Watch, allocate
from .parts import Cutter, Extent, read_extent
from .pool import Source, cut_parts, cut_source, view_all
from .tasks import run_all
from .weights import Weights

logger = logging.getLogger(__name__)

Target: TypeAlias = tuple[TensorSpec, torch.Tensor]
"""What is read, and the contiguous tensor of its shape that it is read into."""


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


@dataclass(slots=True)
class Loader:
    """Brings what stays into memory: ``threads`` at once, ``chunk`` bytes at a stretch.

    Thread rules: any thread. Raises what reads raise, with the tensor's name.
    """

    files: OpenFiles
    chunk: int
    threads: int
    on_loaded: Callable[[int], object] = lambda nbytes: None
    """Called with bytes as they arrive, on the calling thread."""

    def __post_init__(self) -> None:
        self.chunk = align_up(self.chunk, PAGE)

    def load_device(
        self, into: Residents, steps: Mapping[int, Step], device: Device, dtype: torch.dtype | None
    ) -> None:
        """Put steps on the device for good, cast as they are handed out."""
        placed = {i: lay_out_resident(step, dtype) for i, step in steps.items()}
        slab = allocate(sum(nbytes for _, nbytes in placed.values()), device)
        into.device_nbytes += slab.nbytes
        again = Loader(self.files, self.chunk, self.threads)
        targets, base = list[Target](), 0
        for i, (views, nbytes) in placed.items():
            (memory,) = cut_parts(slab, [(base, nbytes)])
            watch = into.watches[i] = Watch([memory])
            into.weights[i] = view_all(watch.memory[0], views)
            tensors = view_all(memory, views)
            of_step = [(spec, tensors[key]) for key, spec in steps[i].tensors.items()]
            into.reload[i] = partial(again._reload, of_step, device)
            targets += of_step
            base += nbytes
        self.fill(targets, device)

    def _reload(self, targets: Sequence[Target], device: Device) -> None:
        device.wait_idle()  # no event tells what still reads them
        with device.guard():
            self.fill(targets, device)

    def fill(self, targets: Sequence[Target], device: Device) -> None:
        """Read tensors, cast where their dtype is not the stored one, through pinned memory.

        ``device``, where they lie, is the current one; nothing else uses their memory any more.
        """
        parts = [
            (spec, tensor, done)
            for spec, tensor in targets
            for done in range(0, spec.nbytes, self.chunk)
        ]
        if not parts:
            return
        chunk = min(self.chunk, max(spec.nbytes for spec, _, _ in parts))
        # To lock pages takes longer than it saves a single part.
        pinned = len(parts) > 1 and not device.unified
        bounces = Bounces(device, chunk, min(self.threads, len(parts)), pinned=pinned)
        try:
            self._run([partial(self._load_part, *part, bounces) for part in parts])
        finally:
            bounces.close()
        self.files.check_unchanged({spec.path for spec, _ in targets})

    def load_host(self, into: Residents, layouts: Mapping[int, Layout], device: Device) -> None:
        """Read steps into an arena of exactly their size, pinned if the device can."""
        sizes = [layout.host_nbytes for layout in layouts.values()]
        arena = HostArena(sizes, device, pinned=True, threads=self.threads)
        into.owners.append(arena)
        into.host_nbytes += arena.nbytes
        into.pinned_nbytes += arena.nbytes if arena.pinned else 0
        cutter = Cutter(None, self.chunk, aligned=self.files.reads_direct)
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
        self.files.check_unchanged()

    def map_host(self, into: Residents, layouts: Mapping[int, Layout], device: Device) -> bool:
        """Page-lock the files' own pages; False, with nothing kept, where that is refused."""
        try:
            mapped = self._map(layouts, handed_out=False)
        except OSError as error:
            logger.warning("mapping files was refused (%s)", error)
            return False
        mapped.populate_all(self.threads, self.on_loaded)
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
            mapped = self._map(layouts, handed_out=True)
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

    def _map(self, layouts: Mapping[int, Layout], *, handed_out: bool) -> MappedFiles:
        reads = [read for layout in layouts.values() for read in layout.reads]
        return MappedFiles(self.files, reads, handed_out=handed_out)

    def _run(self, tasks: Sequence[Callable[[], int]]) -> None:
        run_all(tasks, self.threads, on_done=self.on_loaded)

    def _read_all(self, extents: Sequence[Extent], slot: memoryview) -> int:
        for extent in extents:
            read_extent(self.files, extent, slot)
        return sum(extent.wanted for extent in extents)

    def _load_part(
        self, spec: TensorSpec, tensor: torch.Tensor, done: int, bounces: Bounces
    ) -> int:
        """Bring up to a chunk of a tensor, from byte ``done`` on, to its device."""
        nbytes, itemsize = min(self.chunk, spec.nbytes - done), spec.dtype.itemsize
        as_stored = tensor.dtype == spec.dtype
        flat = tensor.view(-1).view(torch.uint8) if as_stored else tensor.view(-1)
        unit = 1 if as_stored else itemsize
        part = flat[done // unit : (done + nbytes) // unit]
        bounce = bounces.mine()
        # Read to where it is used: torch would copy by threads of its own for each of these.
        in_place = as_stored and bounces.unified and not self.files.reads_direct
        try:
            payload = self._read(spec, done, nbytes, part if in_place else bounce.slot)
        except StreamerError as error:
            raise type(error)(f"tensor {spec.name!r}: {error}") from error
        if not as_stored:
            aligned = payload if not payload.data_ptr() % itemsize else payload.clone()
            payload = aligned.view(spec.dtype)
        if not in_place:
            bounces.copy(bounce, part, payload)
        return nbytes

    def _read(self, spec: TensorSpec, done: int, nbytes: int, slot: torch.Tensor) -> torch.Tensor:
        offset = spec.offset + done
        lead = offset % PAGE if self.files.reads_direct else 0
        length = align_up(lead + nbytes, PAGE) if self.files.reads_direct else nbytes
        array: Any = slot.numpy()
        view = memoryview(array)[:length]
        self.files.read_into(spec.path, view, offset - lead, lead + nbytes)
        return slot[lead : lead + nbytes]
