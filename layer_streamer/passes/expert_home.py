"""Where experts come from: the files' own pages, page-locked, or reads, as they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.manifest import TensorSpec
from ..devices.device import Device, Numbers
from ..errors import StreamerError
from ..experts.policies import Key
from ..planning.layout import Read, View
from ..transport.loader import Loader, Target
from ..transport.mapped import MappedFiles, Region
from ..transport.memory import view_tensor
from ..transport.pool import cut_parts
from ..transport.residents import Owner

MARK = " of "
"""In a tensor's name, before whose it is."""


@dataclass(frozen=True, slots=True)
class Wanted:
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
        """Have slots filled: by copies that are enqueued on ``stream``, or by its return. Nothing
        that is enqueued elsewhere uses them any more, once ``stream`` is there."""


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
        self._known: dict[Key, list[tuple[Region, Numbers]]] = {}
        """What has been found out of experts, at their first time."""

    def bring(self, wanted: Sequence[Wanted], slab: torch.Tensor, stream: Any) -> None:
        by_region: dict[int, tuple[Region, list[Numbers]]] = {}
        for one in wanted:
            key = (one.layer_idx, one.expert)
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = self._pieces(*key)
            for region, pieces in known:
                there = pieces + np.array((one.offset, 0, 0))
                by_region.setdefault(id(region), (region, []))[1].append(there)
        for region, parts in by_region.values():
            to, from_, nbytes = np.concatenate(parts).T
            self._device.copy_pieces((slab, to), (region.memory, from_), nbytes, stream)

    def _pieces(self, layer_idx: int, expert: int) -> list[tuple[Region, Numbers]]:
        """By region: (where to in the slot, where from in the region, bytes), (n, 3)."""
        found: dict[int, tuple[Region, list[tuple[int, int, int]]]] = {}
        for region, piece in self._cut(layer_idx, expert):
            found.setdefault(id(region), (region, []))[1].append(piece)
        return [(region, np.array(pieces, dtype=np.int64)) for region, pieces in found.values()]

    def _cut(self, layer_idx: int, expert: int) -> Iterator[tuple[Region, tuple[int, int, int]]]:
        banks, segment = self._layers[layer_idx].banks, self._device.pin_segment
        for view in self._views[layer_idx]:
            to = view.offset
            for extent in filter(_holds, banks[view.key][expert].extents):
                region = self._mapped.find(extent.path, extent.offset)
                start = extent.offset - region.offset
                end = start + extent.nbytes
                while start < end:  # no copy may cross from one registration to the next
                    nbytes = min(end - start, segment - start % segment)
                    yield region, (to, start, nbytes)
                    start, to = start + nbytes, to + nbytes


class ReadExperts:
    """Files that are read when an expert is asked for, by several threads: to where it is used on a
    CPU, to a device through page-locked memory. The calling thread waits."""

    owners: Sequence[Owner] = ()

    def __init__(
        self,
        loader: Loader,
        layers: Mapping[int, ExpertLayer],
        views: Mapping[int, Sequence[View]],
        device: Device,
    ) -> None:
        self._loader, self._device = loader, device
        self._layers, self._views = layers, views

    def bring(self, wanted: Sequence[Wanted], slab: torch.Tensor, stream: Any) -> None:
        self.wait_given_up(stream)
        targets = [target for one in wanted for target in self._targets(one, slab)]
        try:
            with self._device.guard():
                self._loader.fill(targets, self._device)
        except StreamerError as error:
            said, _, rest = str(error).partition(MARK)
            expert, _, fault = rest.partition("'")
            if not rest:
                raise
            raise type(error)(f"{expert}: {said}'{fault}") from error

    def wait_given_up(self, stream: Any) -> None:
        """Block until slots are not used any more: reads would not wait for that."""
        stream.synchronize()

    def _targets(self, one: Wanted, slab: torch.Tensor) -> Iterator[Target]:
        """Its tensors, where they go, and in their names whose they are, for errors."""
        banks, views = self._layers[one.layer_idx].banks, self._views[one.layer_idx]
        last = views[-1]
        (memory,) = cut_parts(slab, [(one.offset, last.offset + last.nbytes)])
        whose = f"{MARK}layer {one.layer_idx}, expert {one.expert}"
        for view in views:
            spec = banks[view.key][one.expert]
            pieces = tuple(replace(piece, name=piece.name + whose) for piece in spec.pieces)
            named = replace(spec, name=spec.name + whose, pieces=pieces)
            yield named, view_tensor(memory, view)


def expert_reads(layers: Iterable[ExpertLayer]) -> list[Read]:
    """What files have to be mapped."""
    return [
        Read(extent.path, extent.offset, 0, extent.nbytes)
        for layer in layers
        for bank in layer.banks.values()
        for spec in bank
        for extent in filter(_holds, spec.extents)
    ]


def _holds(extent: TensorSpec) -> bool:
    return extent.nbytes > 0
