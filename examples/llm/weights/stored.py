"""How one matrix of a checkpoint is stored, and the record of it over a pass's tensors."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from layer_streamer import TensorSpec

from ..errors import UnsupportedModelError
from .dequant import row_width
from .packed import FLOATS, Packed
from .quants import BLOCK_TYPES

COMPARED_NBYTES = 1 << 20
"""Of two tensors at a time."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One matrix of a checkpoint."""

    format: str
    """One of ``packed.FORMATS``."""
    rows: int
    width: int
    keys: Mapping[str, str]
    """The tensor of each part, by its key in the layer or its name outside of layers."""
    streamed: str
    """The part with the weights; the others are small."""
    group: int = 0
    group_rows: int = 1
    zero_offset: int = 0
    scale_shape: tuple[int, ...] | None = None
    """The scale is viewed so; with 1 for many rows it is expanded where the format has none."""
    first: int = 0
    step: int = 1
    """Rows of its tensors that are its: every so-manieth from the first on."""
    turned: bool = False
    """Rows of it are columns of its tensor, which holds floats."""
    expert: int | None = None
    """Which of several matrices of one tensor this is; None: it has a tensor of its own."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Of a matrix that is only floats."""
        return FLOATS.get(self.format)

    @property
    def key(self) -> str:
        """Of the weights' own tensor."""
        return self.keys[self.streamed]

    @property
    def scale_key(self) -> str:
        """Of the tensor with the scales."""
        return self.keys.get("scale", self.key)

    @property
    def number(self) -> int | None:
        """Which it is of all matrices of its tensor; None: there is no other."""
        return None if self.expert is None else self.expert * self.step + self.first

    @property
    def ordered(self) -> bool:
        """True: columns are in the order of their groups."""
        return "g_idx" not in self.keys

    @property
    def transposed(self) -> bool:
        """True: rows of the matrix are columns of its tensors."""
        return self.format.startswith(("awq", "gptq"))

    def packed(self, tensors: Mapping[str, torch.Tensor], *, first_row: int = 0) -> Packed:
        """The matrix over these tensors; fewer rows from ``first_row`` on if its own has fewer."""
        parts = {part: self._own(tensors[key]) for part, key in self.keys.items()}
        own = parts[self.streamed]
        rows = self.rows if self.transposed else own.shape[0]
        if self.format == "fp8":
            parts["weight"] = own.view(torch.uint8)
        if self.scale_shape is not None:
            scale = parts["scale"].view(self.scale_shape)
            if scale.dtype == torch.float8_e8m0fnu:
                scale = scale.view(torch.uint8)
            if self.format != "fp8":
                scale = scale.expand(self.rows, scale.shape[1])
            parts["scale"] = scale
        if rows < self.rows:
            for part in _parts_by_row(self.format, self.group_rows):
                if part in parts and part != self.streamed:
                    parts[part] = parts[part][first_row : first_row + rows]
        return Packed(
            format=self.format,
            rows=rows,
            width=self.width,
            parts=parts,
            group=self.group,
            group_rows=self.group_rows,
            first_row=first_row,
            zero_offset=self.zero_offset,
        )

    def in_slots(self, banks: Mapping[str, torch.Tensor]) -> Packed:
        """The matrix of all experts that lie in slots: its parts have a dimension more, the first,
        for slots, of which ``banks`` have one by key."""
        one = replace(self, expert=None).packed({key: bank[0] for key, bank in banks.items()})
        parts = {}
        for part, tensor in one.parts.items():
            bank = banks[self.keys[part]].view(tensor.dtype)  # of as many bytes
            shape, strides = (len(bank), *tensor.shape), (bank.stride(0), *tensor.stride())
            parts[part] = bank.as_strided(shape, strides, tensor.storage_offset())
        return replace(one, parts=parts)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that is this matrix's; a copy only of what lies turned."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        elif self.rows == 1 and tensor.dim() == 1:
            return tensor.view(1, -1)
        if self.turned and tensor.dim() > 1:
            return tensor.t()[self.first :: self.step].contiguous()
        if self.step > 1:
            tensor = tensor[self.first :: self.step]
        return tensor.flatten(1) if tensor.dim() > 2 else tensor


def _parts_by_row(kind: str, group_rows: int) -> tuple[str, ...]:
    """Parts that have a row for each row of the matrix."""
    if kind == "fp8":
        return ()  # scales go by the number of a row
    return ("scale", "zero") if kind == "int8" else ("scale",)


def check_plain(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    """UnsupportedModelError unless a tensor holds floats, or GGUF blocks, of this shape."""
    kind, found = spec.ggml_type, spec.shape
    if kind in BLOCK_TYPES:
        found = (*found[:-1], row_width(found[-1], kind))
    elif kind not in (None, *FLOATS):
        raise UnsupportedModelError(
            f"tensor {spec.name!r} is {kind}, this engine unpacks only "
            f"{', '.join((*BLOCK_TYPES, *FLOATS))}"
        )
    elif spec.dtype not in FLOATS.values():
        raise UnsupportedModelError(
            f"tensor {spec.name!r} has dtype {spec.dtype}, not a plain float"
        )
    if found != shape:
        raise UnsupportedModelError(
            f"tensor {spec.name!r} has shape {list(found)}, the config says {list(shape)}"
        )


def read_values(spec: TensorSpec) -> torch.Tensor:
    """A small tensor's values, read from its file."""
    with open(spec.path, "rb") as file:
        file.seek(spec.offset)
        content = bytearray(file.read(spec.nbytes))
    if len(content) < spec.nbytes:
        raise UnsupportedModelError(f"{spec.path}: ends within tensor {spec.name!r}")
    if not content:
        return torch.empty(0, dtype=torch.float32, device="cpu")
    return torch.frombuffer(content, dtype=spec.dtype)


class Mapped:
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


def equal_values(one: TensorSpec, other: TensorSpec) -> bool:
    """True for two tensors that hold the same bytes; reads until a difference is found."""
    if (one.dtype, one.shape, one.ggml_type) != (other.dtype, other.shape, other.ggml_type):
        return False
    with open(one.path, "rb") as first, open(other.path, "rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for start in range(0, one.nbytes, COMPARED_NBYTES):
            count = min(COMPARED_NBYTES, one.nbytes - start)
            if first.read(count) != second.read(count):
                return False
    return True
