"""Where experts come from: the files' own pages, page-locked, or reads, as they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..checkpoint.experts import ExpertLayer
from ..devices.device import Device, Numbers
from ..experts.policies import Key
from ..planning.layout import PAGE, View
from ..transport.fetcher import Fetch, Fetcher, Piece
from ..transport.mapped import MappedFiles, Region
from ..transport.residents import Owner
from .expert_tiers import holds


class Wanted(NamedTuple):
    """An expert that is to come to a slot."""

    layer_idx: int
    expert: int
    offset: int
    """Of the slot, in the pool's memory."""


class Home(Protocol):
    """Brings experts to slots."""

    @property
    def owners(self) -> Sequence[Owner]:
        """Of host memory with page locks."""

    def bring(self, wanted: Sequence[Wanted], slab: torch.Tensor, stream: Any) -> None:
        """Have slots filled: by copies on ``stream``. What was brought before has been waited for,
        and nothing that is enqueued elsewhere uses the slots any more, once ``stream`` is there."""

    def wait(self) -> None:
        """Block until all of it is enqueued, or is there. Raises what reads raise."""


_Pieces = tuple[Region, Numbers]
"""(4, n): of each piece in the region the expert, where to in the slot, where from in the region,
bytes."""


class MappedExperts:
    """Pages of the files, page-locked: the page cache is the host's copy. One call enqueues the
    copies of all experts that are asked for."""

    def __init__(
        self,
        mapped: MappedFiles,
        layers: Mapping[int, ExpertLayer],
        views: Mapping[int, Sequence[View]],
        device: Device,
    ) -> None:
        """``mapped``: pinned, with all that experts have. ``views``: how a layer's experts lie in a
        slot."""
        self.owners: Sequence[Owner] = (mapped,)
        self._mapped, self._device = mapped, device
        self._layers, self._views = layers, views
        self._known: dict[int, list[_Pieces]] = {}
        """What has been found out of layers, at their first time."""

    def bring(self, wanted: Sequence[Wanted], slab: torch.Tensor, stream: Any) -> None:
        for layer_idx, own in groupby(wanted, lambda one: one.layer_idx):
            known = self._known.get(layer_idx)
            if known is None:
                known = self._known[layer_idx] = self._pieces(layer_idx)
            slots = np.full(self._layers[layer_idx].num_experts, -1, dtype=np.int64)
            for one in own:
                slots[one.expert] = one.offset
            for region, pieces in known:
                expert, to, source, nbytes = pieces[:, slots[pieces[0]] >= 0]
                places = slots[expert] + to, source
                self._device.copy_pieces(
                    (slab, places[0]), (region.memory, places[1]), nbytes, stream
                )

    def wait(self) -> None:
        return

    def places(self, layer_idx: int, expert: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Where an expert lies: the byte of a slot that a part goes to, and the memory (uint8) that
        it comes from; the same parts of all experts, wherever these lie."""
        for region, to, start, nbytes in self._extents(layer_idx, expert):
            yield to, region.memory[start : start + nbytes]

    @property
    def regions(self) -> Sequence[torch.Tensor]:
        """The pages."""
        return [region.memory for region in self._mapped.regions]

    def _pieces(self, layer_idx: int) -> list[_Pieces]:
        """Of all the layer's experts, the largest first."""
        found: dict[int, tuple[Region, list[tuple[int, int, int, int]]]] = {}
        for expert in range(self._layers[layer_idx].num_experts):
            for region, piece in self._cut(layer_idx, expert):
                found.setdefault(id(region), (region, []))[1].append((expert, *piece))
        return [
            (region, np.array(sorted(pieces, key=lambda piece: -piece[3]), dtype=np.int64).T)
            for region, pieces in found.values()
        ]

    def _cut(self, layer_idx: int, expert: int) -> Iterator[tuple[Region, tuple[int, int, int]]]:
        """(where to, where from, bytes): what adjoins in both is one piece, up to the end of a
        registration."""
        segment, run = self._device.pin_segment, None
        for region, to, start, nbytes in self._extents(layer_idx, expert):
            if run and run[0] is region and (run[1] + run[3], run[2] + run[3]) == (to, start):
                run = region, run[1], run[2], run[3] + nbytes
                continue
            if run:
                yield from _cut_piece(*run, segment)
            run = region, to, start, nbytes
        if run:
            yield from _cut_piece(*run, segment)

    def _extents(self, layer_idx: int, expert: int) -> Iterator[tuple[Region, int, int, int]]:
        """What an expert has in files: the region, where to in the slot, where from, bytes."""
        banks = self._layers[layer_idx].banks
        for view in self._views[layer_idx]:
            to = view.offset
            for extent in filter(holds, banks[view.key][expert].extents):
                region = self._mapped.find(extent.path, extent.offset)
                yield region, to, extent.offset - region.offset, extent.nbytes
                to += extent.nbytes


class ReadExperts:
    """Files that are read when an expert is asked for, by threads that stay: past the page cache
    where layers are read so, to where it is used on a CPU, to a device through a little page-locked
    memory. An expert's tensors that lie next to each other in the file are read together."""

    def __init__(
        self,
        fetcher: Fetcher,
        layers: Mapping[int, ExpertLayer],
        views: Mapping[int, Sequence[View]],
        chunk: int,
    ) -> None:
        """``chunk``: bytes that one thread reads at a stretch."""
        self.owners: Sequence[Owner] = () if fetcher.arena is None else (fetcher.arena,)
        self._fetcher, self._chunk = fetcher, chunk
        self._layers, self._views = layers, views
        self._known: dict[Key, list[Fetch]] = {}
        """What has been found out of experts, at their first time."""

    def bring(self, wanted: Sequence[Wanted], slab: torch.Tensor, stream: Any) -> None:
        fetches = list[tuple[Fetch, int]]()
        for one in wanted:
            key = (one.layer_idx, one.expert)
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = list(self._cut(*key))
            fetches += [(fetch, one.offset) for fetch in known]
        self._fetcher.begin(fetches, slab, stream)

    def wait(self) -> None:
        self._fetcher.wait()

    def _cut(self, layer_idx: int, expert: int) -> Iterator[Fetch]:
        """What is read for an expert: bytes next to each other, up to a chunk at a time."""
        banks = self._layers[layer_idx].banks
        found = list[_Place]()
        for view in self._views[layer_idx]:
            spec, to = banks[view.key][expert], view.offset
            name = f"layer {layer_idx}, expert {expert}: tensor {spec.name!r}"
            for extent in filter(holds, spec.extents):
                found.append(_Place(extent.path, extent.offset, extent.nbytes, to, name))
                to += extent.nbytes
        together = list[_Place]()
        for place in self._pieces(sorted(found, key=lambda place: (str(place.path), place.offset))):
            if together and not _follows(together, place, self._chunk):
                yield _fetch(together)
                together = []
            together.append(place)
        if together:
            yield _fetch(together)

    def _pieces(self, places: Iterable[_Place]) -> Iterator[_Place]:
        """None larger than a chunk: cut where pages begin, so that direct reads share none."""
        for path, offset, nbytes, to, name in places:
            done = 0
            while done < nbytes:
                start = offset + done
                size = min(nbytes - done, (start + self._chunk) // PAGE * PAGE - start)
                yield _Place(path, start, size, to + done, name)
                done += size


class SplitExperts:
    """Some layers' experts from pages, as many as host memory has room for, the others' read."""

    def __init__(self, mapped: MappedExperts, read: ReadExperts, in_pages: Collection[int]) -> None:
        """``in_pages``: the layers of ``mapped``."""
        self.owners: Sequence[Owner] = (*mapped.owners, *read.owners)
        self._mapped, self._read, self._in_pages = mapped, read, in_pages

    def bring(self, wanted: Sequence[Wanted], slab: torch.Tensor, stream: Any) -> None:
        there = [one for one in wanted if one.layer_idx in self._in_pages]
        on_disk = [one for one in wanted if one.layer_idx not in self._in_pages]
        if there:
            self._mapped.bring(there, slab, stream)
        if on_disk:
            self._read.bring(on_disk, slab, stream)

    def wait(self) -> None:
        self._read.wait()


def _cut_piece(
    region: Region, to: int, start: int, nbytes: int, segment: int
) -> Iterator[tuple[Region, tuple[int, int, int]]]:
    """No copy may cross from one registration to the next."""
    end = start + nbytes
    while start < end:
        size = min(end - start, segment - start % segment)
        yield region, (to, start, size)
        start, to = start + size, to + size


class _Place(NamedTuple):
    """Bytes of a file, where they go in a slot, and whose they are."""

    path: Path
    offset: int
    nbytes: int
    to: int
    name: str


def _follows(together: Sequence[_Place], place: _Place, chunk: int) -> bool:
    """It lies next to these, or a page away, and all is no more than a chunk."""
    first, last = together[0], together[-1]
    gap = place.offset - last.offset - last.nbytes
    near = place.path == first.path and 0 <= gap <= PAGE
    return near and place.offset + place.nbytes - first.offset <= chunk


def _fetch(together: Sequence[_Place]) -> Fetch:
    first, last = together[0], together[-1]
    pieces = tuple(Piece(p.offset - first.offset, p.to, p.nbytes) for p in together)
    nbytes = last.offset + last.nbytes - first.offset
    return Fetch(first.path, first.offset, nbytes, pieces, first.name)
