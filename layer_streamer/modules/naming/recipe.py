"""What one parameter is made of: bytes of a checkpoint laid end to end, and rarely arithmetic.

Pure records. A parameter whose bytes lie in the checkpoint, if in several places, costs nothing
but its place: its pieces are read next to each other and seen as one tensor. Only where no order
of bytes gives it, a :class:`Conversion` makes it on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ...checkpoint.manifest import TensorSpec
from ...planning.layout import CASTABLE

CAST = "cast"
"""Name of the conversion that changes the dtype alone."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """Makes a parameter from tensors of the checkpoint by arithmetic, on the device they are on."""

    name: str
    """What is done, in a few words, for plans: "cast", "Transpose(dim0=1, dim1=2)"."""
    inputs: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    """Dtype and shape of each tensor that it takes, in the order in which they lie."""
    dtype: torch.dtype
    """Of the parameter."""
    shape: tuple[int, ...]
    """Of the parameter."""
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor] = field(repr=False, compare=False)
    """From the inputs to the parameter. Not for two threads at once."""

    def __call__(self, laid: torch.Tensor) -> torch.Tensor:
        """The parameter, from the recipe's pieces laid end to end, seen as the recipe says.

        On the device of ``laid``, enqueued on its current stream; it may be a view of ``laid``, so
        is gone when that memory is given back. For one thread at a time.
        """
        with torch.no_grad():
            return self.make(self._split(laid))

    def _split(self, laid: torch.Tensor) -> list[torch.Tensor]:
        if len(self.inputs) == 1:
            return [laid]
        tensors, begin = [], 0
        for dtype, shape in self.inputs:
            part = laid[begin : begin + math.prod(shape) * dtype.itemsize]
            begin += part.numel()
            if part.storage_offset() % dtype.itemsize:
                # Behind an odd number of bytes: torch sees no wider dtype there.
                part = part.clone()
            tensors.append(part.view(dtype).view(shape))
        return tensors


@dataclass(frozen=True, slots=True)
class Recipe:
    """One parameter or persistent buffer of a module, and where its bytes come from."""

    name: str
    """Full dotted name in the module."""
    pieces: tuple[TensorSpec, ...]
    """Sources, laid end to end in this order. A part of a fused tensor has an offset and a length
    of its own, and the fused tensor's name."""
    dtype: torch.dtype
    """Stored dtype: what the pieces, laid end to end, are seen as."""
    shape: tuple[int, ...]
    """Shape of that."""
    convert: Conversion | None = None
    """From that to the parameter; None where it is the parameter."""

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def made_nbytes(self) -> int:
        """Bytes of the parameter."""
        if self.convert is None:
            return self.nbytes
        return math.prod(self.convert.shape) * self.convert.dtype.itemsize

    @property
    def has_rows(self) -> bool:
        """Each row of it is a row of one tensor of the checkpoint, cast at most."""
        if len(self.shape) != 2 or len(self.pieces) != 1:
            return False
        return self.convert is None or (
            self.convert.name == CAST and {self.dtype, self.convert.dtype} <= {*CASTABLE}
        )


def recipe_of_inputs(name: str, inputs: Sequence[TensorSpec], convert: Conversion) -> Recipe:
    """The recipe of a parameter that ``convert`` makes of whole tensors of the checkpoint.

    Several of them are laid end to end as bytes, for their dtypes may differ.
    """
    if len(inputs) == 1:
        return Recipe(name, tuple(inputs), inputs[0].dtype, inputs[0].shape, convert)
    size = sum(spec.nbytes for spec in inputs)
    return Recipe(name, tuple(inputs), torch.uint8, (size,), convert)
