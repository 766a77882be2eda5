"""The tensors outside of layers, which are written as floats: read in pieces, in little memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import torch

from layer_streamer import TensorSpec

from ..opening import Model
from ..weights.stored import Stored
from .shards import Entry, name_of
from .texts import float_unpacker

CPU = torch.device("cpu")


class _Mapping:
    """A tensor over its file's pages, which it can give back."""

    def __init__(self, spec: TensorSpec) -> None:
        begin = spec.offset - spec.offset % mmap.ALLOCATIONGRANULARITY
        end = spec.offset + spec.nbytes
        with open(spec.path, "rb") as file:
            self._map = mmap.mmap(
                file.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin
            )  # never written to
        raw = np.frombuffer(self._map, np.uint8, spec.nbytes, spec.offset - begin)
        self.tensor = torch.from_numpy(raw).view(spec.dtype).view(spec.shape)

    def release(self) -> None:
        """Take its pages off this process; they come back when they are touched."""
        self._map.madvise(mmap.MADV_DONTNEED)


def matrix_entry(model: Model, matrix: Stored, dtype: torch.dtype) -> Entry:
    """The embedding or the output head, as floats."""
    return Entry(name_of(dtype), (matrix.rows, matrix.width), _blocks(model, matrix, dtype))


def _blocks(model: Model, matrix: Stored, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    mappings = {key: _Mapping(model.manifest.static[key]) for key in matrix.keys.values()}
    packed = matrix.packed({key: mapping.tensor for key, mapping in mappings.items()})
    for _, _, rows in float_unpacker(model, CPU).blocks(packed):
        yield rows.to(dtype)
        for mapping in mappings.values():
            mapping.release()


def norm_entry(model: Model, dtype: torch.dtype) -> Entry:
    """The norm before the output head, as transformers has it."""
    names = model.names
    values = _Mapping(model.manifest.static[names.norm]).tensor.float()
    if names.norm_offset is not None:
        values = values + (names.norm_offset - 1.0)
    return Entry.of(values.to(dtype))
