"""The tensors outside of layers, which are written as floats: read in pieces, in little memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..opening import Model
from ..weights.stored import Mapped, Stored
from .shards import Entry, name_of
from .texts import float_unpacker

CPU = torch.device("cpu")


def matrix_entry(model: Model, matrix: Stored, dtype: torch.dtype) -> Entry:
    """The embedding or the output head, as floats."""
    return Entry(name_of(dtype), (matrix.rows, matrix.width), _blocks(model, matrix, dtype))


def _blocks(model: Model, matrix: Stored, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    mappings = {key: Mapped(model.manifest.static[key]) for key in matrix.keys.values()}
    packed = matrix.packed({key: mapping.tensor for key, mapping in mappings.items()})
    for _, _, rows in float_unpacker(model, CPU).blocks(packed):
        yield rows.to(dtype)
        for mapping in mappings.values():
            mapping.release()


def norm_entry(model: Model, dtype: torch.dtype) -> Entry:
    """The norm before the output head, as transformers has it."""
    names = model.names
    values = Mapped(model.manifest.static[names.norm]).tensor.float()
    if names.norm_offset is not None:
        values = values + (names.norm_offset - 1.0)
    return Entry.of(values.to(dtype))
