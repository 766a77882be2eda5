"""Layers that live in host memory: copied from there, and some of them handed out there as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from ..devices.device import CpuDevice, Device
from ..planning.layout import Copy, Layout, Step, lay_out
from .loader import Loader, Target
from .memory import HostArena, Watch
from .pool import Scratch, cut_source, view_all
from .residents import Residents


@dataclass(frozen=True, slots=True)
class HostHome:
    """Brings them there, while a streamer is opened. Raises what reads raise."""

    loader: Loader
    into: Residents
    device: Device
    """Copies from there, as others may do."""

    def hold(
        self, layouts: Mapping[int, Layout], computed: Mapping[int, Step], *, mapped: bool
    ) -> bool:
        """Hold steps, in the pages of their files or in memory of their own; those that may be
        ``computed`` there can be handed out. False if ``mapped`` was asked for, and refused."""
        viewed = {i: layouts[i] for i, step in computed.items() if mapped and _is_viewed(step)}
        others = {i: layout for i, layout in layouts.items() if i not in computed}
        in_pages = {**others, **viewed}
        refused = mapped and not (
            not in_pages or self.loader.map_host(self.into, in_pages, self.device)
        )
        if refused or not self._view(viewed, computed):
            viewed = {}
        imaged = {i: layouts[i] for i in computed if i not in viewed}
        if imaged:
            self._hold_images(imaged, computed)
        if others and (refused or not mapped):
            self.loader.load_host(self.into, others, self.device)
        self._hold_scratch([layouts[i] for i in computed])
        return not refused

    def _view(self, layouts: Mapping[int, Layout], steps: Mapping[int, Step]) -> bool:
        """View steps in the pages that the device copies from: mapped once more, since a write to
        what is handed out has to stay away from them. False, with nothing kept, where refused."""
        mapped = self.loader.map_views(layouts) if layouts else None
        if mapped is None:
            return not layouts
        for i, layout in layouts.items():
            self.into.host[i], self.into.watches[i] = mapped.view(steps[i])
            self.into.reload[i] = partial(mapped.restore, layout.reads)
            # The lock that the device copies by keeps them in memory; only the file may go.
            paths = tuple({read.path for read in layout.reads})
            self.into.looks[i] = partial(self.loader.files.check_unchanged, paths)
        mapped.populate_all(self.loader.threads, lambda nbytes: None)
        return True

    def _hold_images(self, layouts: Mapping[int, Layout], steps: Mapping[int, Step]) -> None:
        """Read steps into memory of their own as they lie in a slot of the device, where each
        tensor has a place that suits it: one memory to hand out and to copy from."""
        loader, into = self.loader, self.into
        sizes = [layout.device_nbytes for layout in layouts.values()]
        arena = HostArena(sizes, self.device, pinned=True, threads=loader.threads)
        into.owners.append(arena)
        again, targets = Loader(loader.files, loader.chunk, loader.threads), list[Target]()
        for (i, layout), memory, base in zip(
            layouts.items(), arena.slots, arena.offsets, strict=True
        ):
            copies = tuple(Copy(copy.dst, copy.dst, copy.nbytes) for copy in layout.copies)
            segment, pinned = self.device.pin_segment, arena.pinned
            into.sources[i] = cut_source(arena.memory, base, copies, segment, pinned=pinned)
            watch = into.watches[i] = Watch([memory])
            into.host[i] = view_all(watch.memory[0], layout.views)
            tensors = view_all(memory, layout.views)
            of_step = [(spec, tensors[key]) for key, spec in steps[i].tensors.items()]
            into.reload[i] = partial(again.fill, of_step, CpuDevice())
            targets += of_step
        loader.fill(targets, CpuDevice())

    def _hold_scratch(self, layouts: list[Layout]) -> None:
        nbytes = max((layout.scratch_nbytes for layout in layouts), default=0)
        if nbytes:
            with torch.inference_mode(False):
                memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            self.into.scratch = Scratch(memory, CpuDevice())


def _is_viewed(step: Step) -> bool:
    """All of it lies in its file as tensors of its dtypes have to."""
    return lay_out(step, unified=True).is_viewed
