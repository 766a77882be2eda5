"""How one step's tensors lie in a slot: reads, copies and views. Pure arithmetic.

A *step* is one hand-out of a pass: a layer, or a row range of a tail tensor. Its tensors are merged
into runs of adjacent bytes. A run is one read, placed in the host slot at the file's phase (the
same offset modulo PAGE as in the file), so that page-aligned direct reads need no second move. On
the device a run is one copy as long as every tensor in it lands aligned; any other tensor starts a
copy of its own at an aligned place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import TypeAlias

import torch

from ..checkpoint.manifest import LayerSpec, Manifest, TensorSpec
from ..errors import CheckpointError, ConfigError

PAGE = 4096
"""Alignment of reads and of slots, bytes."""
COPY_ALIGNMENT = 256
"""Where a copy may start on a device, bytes (what CUDA allocations guarantee)."""
TENSOR_ALIGNMENT = 16
"""Alignment on a device that lets kernels use their widest loads, bytes."""
READ_THROUGH = 4096
"""Gaps up to this many bytes are read along rather than split a run."""
MAX_TAIL_STEPS = 1024
"""Steps that one tail tensor is split into at most."""
CASTABLE = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that ``dtype=`` casts; every other one is handed out as stored."""


Step: TypeAlias = LayerSpec
"""What one hand-out of a pass consists of. ``layer_idx`` is the checkpoint's own, not its place in
the pass; tail steps are numbered from the checkpoint's number of layers on."""


@dataclass(frozen=True, slots=True)
class Read:
    """One contiguous read of ``nbytes``: from ``offset`` of a file to ``slot_offset``."""

    path: Path
    offset: int
    slot_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Copy:
    """One contiguous copy from ``src`` in the source slot to ``dst`` in the device slot, bytes."""

    src: int
    dst: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class View:
    """One tensor in the device slot."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the bytes of one step lie, in the host slot and in the device slot."""

    reads: tuple[Read, ...]
    copies: tuple[Copy, ...]
    views: tuple[View, ...]
    casts: tuple[View, ...]
    """The views that are cast, as they lie in the scratch slot (dtype: the one asked for)."""
    host_nbytes: int
    device_nbytes: int
    scratch_nbytes: int

    @property
    def read_nbytes(self) -> int:
        return sum(read.nbytes for read in self.reads)

    @property
    def copy_nbytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies)

    @property
    def is_viewed(self) -> bool:
        """On a unified device: all of it lies in the files as tensors of its dtypes have to."""
        return bool(self.reads) and not self.copies


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` that is at least ``value``."""
    return -(-value // alignment) * alignment


def plan_steps(
    manifest: Manifest, tail: Sequence[str] | None = None, layers: Sequence[int] | None = None
) -> tuple[Step, ...]:
    """The steps of a pass: the chosen ``layers`` (None: all), then the ``tail`` tensors by rows.

    A layer keeps the index that it has in the checkpoint; tail steps are numbered from the
    checkpoint's number of layers on. No tail step is larger than the largest layer of the pass,
    except that one row is never split, nor a tensor into more than MAX_TAIL_STEPS.
    Errors: ConfigError for a layer or a tail name that the checkpoint lacks, a layer named twice,
    no layer at all.
    """
    steps = _choose_layers(manifest, layers)
    limit = max(step.nbytes for step in steps)
    numbers = count(manifest.num_layers)
    for name in tail or ():
        try:
            spec = manifest.tensor(name)
        except CheckpointError as error:
            raise ConfigError(f"tail={name!r}: {error}") from error
        steps += [Step(next(numbers), {name: part}) for part in split_rows(spec, limit)]
    return tuple(steps)


def _choose_layers(manifest: Manifest, layers: Sequence[int] | None) -> list[Step]:
    if layers is None:
        return list(manifest.layers)
    if isinstance(layers, str | bytes) or not isinstance(layers, Sequence):
        raise ConfigError(f"layers={layers!r}: must be a list of layer indices")
    if not layers:
        raise ConfigError(f"layers={layers!r}: must name at least one layer")
    last, seen = manifest.num_layers - 1, set[int]()
    for position, index in enumerate(layers):
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= last:
            raise ConfigError(f"layers[{position}]={index!r}: must be an int from 0 to {last}")
        if index in seen:
            raise ConfigError(f"layers[{position}]={index}: is named twice")
        seen.add(index)
    return [manifest.layers[index] for index in layers]


def split_rows(spec: TensorSpec, limit: int) -> Iterator[TensorSpec]:
    """``spec`` cut into ranges of rows (its first dimension), each at most ``limit`` bytes.

    Of more if that were more than MAX_TAIL_STEPS ranges: where layers are tiny, a table is not.
    """
    if spec.nbytes <= limit or not spec.shape or spec.shape[0] == 0:
        yield spec
        return
    row_nbytes = spec.nbytes // spec.shape[0]
    rows = max(1, limit // row_nbytes, -(-spec.shape[0] // MAX_TAIL_STEPS))
    for first in range(0, spec.shape[0], rows):
        num_rows = min(rows, spec.shape[0] - first)
        shape, offset = (num_rows, *spec.shape[1:]), spec.offset + first * row_nbytes
        yield replace(spec, shape=shape, offset=offset, nbytes=num_rows * row_nbytes)


def lay_out(step: Step, *, unified: bool, dtype: torch.dtype | None = None) -> Layout:
    """The layout of one step.

    ``unified``: host slot and device slot are the same memory, so tensors are viewed where they
    were read and only those misaligned for their dtype are copied, within the slot.
    ``dtype``: cast CASTABLE tensors to it in the scratch slot; None hands all out as stored.
    """
    runs, reads, end = _place_reads(step)
    offsets, device_end = _place_joined(step, end if unified else 0)
    place = _place_unified if unified else _place_copies
    copies, device_end = place(runs, offsets, device_end)
    to_cast = {
        key: spec
        for key, spec in step.tensors.items()
        if cast_dtype(spec.dtype, dtype) != spec.dtype
    }
    casts, scratch_nbytes = lay_out_resident(replace(step, tensors=to_cast), dtype)
    return Layout(
        reads=tuple(reads),
        copies=tuple(copies),
        views=tuple(
            View(key, spec.dtype, spec.shape, offsets.get((key, 0), 0), spec.nbytes)
            for key, spec in step.tensors.items()
        ),
        casts=casts,
        host_nbytes=end,
        device_nbytes=align_up(device_end, COPY_ALIGNMENT),
        scratch_nbytes=scratch_nbytes,
    )


def cast_dtype(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor stored as ``stored`` is handed out as, where ``dtype`` is asked for."""
    return dtype if dtype is not None and stored in CASTABLE else stored


def lay_out_resident(step: Step, dtype: torch.dtype | None) -> tuple[tuple[View, ...], int]:
    """Where a step's tensors, cast to ``dtype``, lie in memory of their own, and its bytes."""
    views, end = list[View](), 0
    for key, spec in step.tensors.items():
        cast = cast_dtype(spec.dtype, dtype)
        nbytes = spec.nbytes // spec.dtype.itemsize * cast.itemsize
        views.append(View(key, cast, spec.shape, end, nbytes))
        end = align_up(end + nbytes, COPY_ALIGNMENT)
    return tuple(views), end


_Piece: TypeAlias = tuple[str, int]
"""A tensor's key, and the byte of the tensor that the piece begins with."""
_Run: TypeAlias = list[tuple[_Piece, TensorSpec, int]]
"""What one read brings: each piece, and its place in the host slot."""
_Offsets: TypeAlias = dict[_Piece, int]
"""Where pieces come to lie in the device slot."""


def _pieces(step: Step) -> Iterator[tuple[_Piece, TensorSpec]]:
    for key, spec in step.tensors.items():
        begin = 0
        for extent in spec.extents:
            yield (key, begin), extent
            begin += extent.nbytes


def _place_reads(step: Step) -> tuple[list[_Run], list[Read], int]:
    """What each read brings, the reads, and where they end: on a page, since direct reads cover
    their last one."""
    runs, reads, end = list[_Run](), list[Read](), 0
    filled = [(piece, spec) for piece, spec in _pieces(step) if spec.nbytes]
    for piece, spec in sorted(filled, key=lambda item: (str(item[1].path), item[1].offset)):
        if not (reads and _adjoins(reads[-1], spec)):
            reads.append(Read(spec.path, spec.offset, end + spec.offset % PAGE, 0))
            runs.append([])
        start = spec.offset - reads[-1].offset
        reads[-1] = replace(reads[-1], nbytes=start + spec.nbytes)
        runs[-1].append((piece, spec, reads[-1].slot_offset + start))
        end = align_up(reads[-1].slot_offset + reads[-1].nbytes, PAGE)
    return runs, reads, end


def _adjoins(read: Read, spec: TensorSpec) -> bool:
    gap = spec.offset - read.offset - read.nbytes
    return read.path == spec.path and 0 <= gap <= READ_THROUGH


def _place_joined(step: Step, end: int) -> tuple[_Offsets, int]:
    """Tensors of several pieces, which are copied to where they lie end to end."""
    offsets = _Offsets()
    for key, spec in step.tensors.items():
        if spec.pieces:
            base = end = align_up(end, COPY_ALIGNMENT)
            for piece in spec.pieces:
                offsets[key, end - base] = end
                end += piece.nbytes
    return offsets, end


def _place_unified(runs: list[_Run], offsets: _Offsets, end: int) -> tuple[Iterable[Copy], int]:
    copies = []
    for piece, spec, offset in chain.from_iterable(runs):
        if piece not in offsets and not offset % spec.dtype.itemsize:
            offsets[piece] = offset
            continue
        if piece not in offsets:
            offsets[piece] = align_up(end, TENSOR_ALIGNMENT)
            end = offsets[piece] + spec.nbytes
        copies.append(Copy(offset, offsets[piece], spec.nbytes))
    return copies, end


def _place_copies(runs: list[_Run], offsets: _Offsets, end: int) -> tuple[Iterable[Copy], int]:
    copies = dict[int, Copy]()
    for run in runs:
        src = dst = -1
        for piece, spec, offset in run:
            if piece in offsets:
                copies[offset] = Copy(offset, offsets[piece], spec.nbytes)
                src = -1
                continue
            if src < 0 or (offset - src) % TENSOR_ALIGNMENT:
                src, dst = offset, align_up(end, COPY_ALIGNMENT)
            offsets[piece] = dst + offset - src
            end = offsets[piece] + spec.nbytes
            copies[src] = Copy(src, dst, end - dst)  # one tensor longer each time
    return copies.values(), end
