"""Unpacking of rows into one reused buffer of floats: how many at a time, and what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..kernels.fused import KERNEL_FORMATS, unpack
from .packed import Packed, scratch_nbytes
from .quants import BLOCK_TYPES
from .scratch import Scratch

ROW_STEP = 8
"""Rows that are unpacked together in every format."""

_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 20, 1 << 24


def ggml_matrix(rows_NB: torch.Tensor, ggml_type: str) -> Packed:
    """A matrix of packed rows (rows, bytes of a row)."""
    return Packed(
        format=ggml_type,
        rows=rows_NB.shape[0],
        width=row_width(rows_NB.shape[1], ggml_type),
        parts={"raw": rows_NB},
        group=BLOCK_TYPES[ggml_type].weights,
    )


def row_width(row_bytes: int, ggml_type: str) -> int:
    """Weights in a packed row of this many bytes."""
    kind = BLOCK_TYPES[ggml_type]
    return row_bytes // kind.nbytes * kind.weights


@dataclass(frozen=True, slots=True)
class Widest:
    """What a buffer must hold of all packed matrices of a model."""

    width: int = 0
    """Of the widest matrix; 0: nothing is packed."""
    kinds: frozenset[tuple[str, bool]] = frozenset()
    """Their formats; True: columns are in the order of groups."""

    @classmethod
    def of(cls, matrices: Iterable[tuple[str, int, bool]]) -> Widest:
        """Of (format, width, ordered)."""
        found = list(matrices)
        width = max((width for _, width, _ in found), default=0)
        return cls(width, frozenset((kind, ordered) for kind, _, ordered in found))


class Unpacker:
    """Unpacks rows, a few at a time, into one reused buffer on one device.

    On a CPU the buffer is small enough that floats are still in the cache when they are
    multiplied; on a GPU it is large enough to fill it. The buffer belongs to the caller until the
    next block is asked for; work on a GPU must stay on one stream.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        widest: Widest,
        *,
        kernels: bool = False,
    ) -> None:
        """At least ROW_STEP rows of the widest matrix fit. If nothing is packed, no memory is
        taken. ``kernels``: Triton serves the device, so that most formats take no scratch."""
        self.device, self.dtype = device, dtype
        usual = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
        self._limit = max(usual, ROW_STEP * widest.width) if widest.width else 0
        self._floats = torch.empty(self._limit, dtype=dtype, device=device)
        self._plain = {(kind, o) for kind, o in widest.kinds if not kernels or not o}
        self._plain |= {(kind, o) for kind, o in widest.kinds if kind not in KERNEL_FORMATS}
        each = (scratch_nbytes(kind, dtype, ordered=o) for kind, o in self._plain)
        self._scratch = Scratch(self._limit * max(each, default=0), device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, taken for good."""
        return self._floats.nbytes + self._scratch.nbytes

    def blocks(self, packed: Packed) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, end row, their weights (rows, width)) for all rows in order."""
        planned = (packed.format, "g_idx" not in packed.parts) in self._plain
        scratch = self._scratch if planned else None
        step = max(1, self._limit // packed.width // ROW_STEP) * ROW_STEP
        for start in range(0, packed.rows, step):
            end = min(start + step, packed.rows)
            floats = self._floats[: (end - start) * packed.width].view(-1, packed.width)
            unpack(packed, start, end, floats, scratch)
            yield start, end, floats
