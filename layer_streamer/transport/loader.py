"""Brings what stays in memory there: resident layers and single tensors.

It happens once, by several threads: of layers while a streamer is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from ..checkpoint.manifest import TensorSpec
from ..devices.device import Device
from ..errors import StreamerError
from ..planning.layout import PAGE, Layout, Read, Step, align_up, lay_out_resident
from .files import OpenFiles
from .mapped import MappedFiles
from .memory import Bounces, HostArena, Watch, allocate
from .parts import Cutter, Extent, read_extent
from .pool import cut_parts, cut_source, view_all
from .residents import Residents
from .tasks import run_all

logger = logging.getLogger(__name__)

Target: TypeAlias = tuple[TensorSpec, torch.Tensor]
"""What is read, and the contiguous tensor of its shape that it is read into."""


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
            (extent, flat, done)
            for spec, tensor in targets
            for extent, flat in _cut(spec, tensor)
            for done in range(0, extent.nbytes, self.chunk)
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
        self.files.check_unchanged({spec.path for spec, _, _ in parts})

    def load_host(self, into: Residents, layouts: Mapping[int, Layout], device: Device) -> None:
        """Read steps into an arena of exactly their size, pinned if the device can."""
        sizes = [layout.host_nbytes for layout in layouts.values()]
        arena = HostArena(sizes, device, pinned=True, threads=self.threads)
        into.owners.append(arena)
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
        reads = [read for layout in layouts.values() for read in layout.reads]
        mapped = self.map_pages(reads, device)
        if mapped is None:
            return False
        into.owners.append(mapped)
        for i, layout in layouts.items():
            into.sources[i] = mapped.source(layout, device.pin_segment)
        return True

    def map_pages(self, reads: Iterable[Read], device: Device) -> MappedFiles | None:
        """The pages of files that some reads cover, page-locked; None where that is refused."""
        mapped = self._map(reads, handed_out=False)
        if mapped is None:
            return None
        mapped.populate_all(self.threads, self.on_loaded)
        return mapped if mapped.pin(device) else None

    def view_mapped(
        self,
        into: Residents,
        layouts: Mapping[int, Layout],
        steps: Mapping[int, Step],
        *,
        stay: bool,
    ) -> bool:
        """View steps in the files' own pages (CPU), which each pass faults in; if they are to
        ``stay``, all are now, and a pass only if they are gone.

        False, with nothing kept, where the system cannot say that a look at them would kill.
        """
        mapped = self.map_views(layouts)
        if mapped is None:
            return False
        views = into.weights if stay else into.mapped
        for i, layout in layouts.items():
            views[i], into.watches[i] = mapped.view(steps[i])
            into.reload[i] = partial(mapped.restore, layout.reads)
            if stay:
                into.looks[i] = partial(mapped.prepare_look, layout.reads)
                into.device_nbytes += lay_out_resident(steps[i], None)[1]
        if stay:
            mapped.populate_all(self.threads, self.on_loaded)
        else:
            into.fault_in = mapped.fault_in
        return True

    def leave_in_pages(
        self, into: Residents, steps: Mapping[int, Step], layouts: Sequence[Layout]
    ) -> Mapping[int, Step]:
        """Of steps that stay, use those in the files' own pages (CPU) that are used as they are
        stored; the others are returned."""
        viewed = {i: layouts[i] for i in steps if layouts[i].is_viewed and not layouts[i].casts}
        if not viewed or not self.view_mapped(into, viewed, steps, stay=True):
            return steps
        return {i: step for i, step in steps.items() if i not in viewed}

    def map_views(self, layouts: Mapping[int, Layout]) -> MappedFiles | None:
        """The pages of files that steps lie in, to be handed out; None where the system cannot say
        that a look at them would kill."""
        reads = [read for layout in layouts.values() for read in layout.reads]
        return self._map(reads, handed_out=True)

    def _map(self, reads: Iterable[Read], *, handed_out: bool) -> MappedFiles | None:
        try:
            mapped = MappedFiles(self.files, reads, handed_out=handed_out)
            if handed_out:
                mapped.check_populates()
        except OSError as error:
            logger.warning("mapping or populating files was refused (%s)", error)
            return None
        return mapped

    def _run(self, tasks: Sequence[Callable[[], int]]) -> None:
        run_all(tasks, self.threads, on_done=self.on_loaded)

    def _read_all(self, extents: Sequence[Extent], slot: memoryview) -> int:
        for extent in extents:
            read_extent(self.files, extent, slot)
        return sum(extent.wanted for extent in extents)

    def _load_part(
        self, spec: TensorSpec, tensor: torch.Tensor, done: int, bounces: Bounces
    ) -> int:
        """Bring up to a chunk of a (flat) tensor, from byte ``done`` on, to its device."""
        nbytes, itemsize = min(self.chunk, spec.nbytes - done), spec.dtype.itemsize
        as_stored = tensor.dtype == spec.dtype
        flat = tensor.view(torch.uint8) if as_stored else tensor
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


def _cut(spec: TensorSpec, tensor: torch.Tensor) -> Iterator[Target]:
    """What is read of a tensor at a stretch: the parts of it that its extents hold, flat."""
    flat, begin = tensor.view(-1), 0
    for extent in spec.extents:
        end = begin + extent.nbytes // spec.dtype.itemsize
        yield extent, flat[begin:end]
        begin = end
