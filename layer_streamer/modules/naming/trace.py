"""Where the bytes of a tensor come from: operations run on tensors without memory, and watched.

What only moves whole stretches of bytes (stack, concatenate, split, chunk, select, reshape) need
not be done: the result's bytes can be read in the right order. To know that order, the operations
themselves run on meta tensors, so that nothing here knows which ones a model's code puts together.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...checkpoint.manifest import TensorSpec

MAX_RUNS = 4096
"""A tensor of more stretches than this is not followed: it is quicker made than read."""

_aten = torch.ops.aten
_JOINS = (_aten.cat, _aten.stack)
_COPIES = (_aten.clone, _aten._to_copy)


class Run(NamedTuple):
    """A stretch of bytes of one source."""

    source: int
    """Its number, in the order in which sources were added."""
    begin: int
    """First byte, counted from the source's own."""
    nbytes: int
    """How many."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a storage holds: runs end to end."""

    runs: tuple[Run, ...]
    ends: tuple[int, ...]

    def part(self, begin: int, nbytes: int) -> Iterable[Run]:
        """The runs of so many bytes from ``begin`` on."""
        end = begin + nbytes
        at = bisect_right(self.ends, begin)
        while begin < end:
            run = self.runs[at]
            skipped = begin - (self.ends[at] - run.nbytes)
            size = min(end, self.ends[at]) - begin
            yield Run(run.source, run.begin + skipped, size)
            begin, at = begin + size, at + 1


class Trace(TorchDispatchMode):
    """While it is entered, follows the bytes of its sources through what runs. For one thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._contents: dict[int, _Contents] = {}
        self._sources: list[torch.Tensor] = []
        # A storage is known by its address, so none that is known may go and come again.
        self._kept: list[torch.Tensor] = []

    def source(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """One more source: a meta tensor that stands for it."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        size = tensor.numel() * tensor.element_size()
        self._put(tensor, [Run(len(self._sources), 0, size)] if size else [])
        self._sources.append(tensor)
        return tensor

    def runs(self, tensor: torch.Tensor) -> list[Run] | None:
        """Where the tensor's bytes, in the order of its elements, come from; neighbours are one.

        None where they are no stretches of the sources' bytes, or more than MAX_RUNS of them.
        """
        contents = self._contents.get(_key(tensor))
        if contents is None:
            return None
        if not tensor.numel():
            return []
        block, outer = _blocks(tensor)
        if tensor.numel() // block > MAX_RUNS:
            return None
        found: list[Run] = []
        width = tensor.element_size()
        for index in product(*(range(size) for size, _ in outer)):
            steps = sum(i * stride for i, (_, stride) in zip(index, outer, strict=True))
            begin = (int(tensor.storage_offset()) + steps) * width
            for run in contents.part(begin, block * width):
                _append(found, run)
        return found if len(found) <= MAX_RUNS else None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor):
                    self._contents.pop(_key(tensor), None)
        elif func.overloadpacket in _JOINS:
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            self._join(out, args[0], dim % out.dim())
        elif func.overloadpacket in _COPIES and out.dtype == args[0].dtype and out.is_contiguous():
            self._put(out, self.runs(args[0]))
        return out

    def _join(self, out: torch.Tensor, tensors: Sequence[torch.Tensor], dim: int) -> None:
        """Of a concatenation or a stack: for each index before ``dim``, one part of each."""
        rows = math.prod(tensors[0].shape[:dim])
        parts = [self.runs(tensor) for tensor in tensors if tensor.numel()]
        if any(tensor.dtype != out.dtype for tensor in tensors) or rows * len(parts) > MAX_RUNS:
            return
        if not out.numel():
            self._put(out, [])
            return
        known = [_contents(part) for part in parts if part is not None]
        if len(known) < len(parts):
            return
        joined: list[Run] = []
        for row in range(rows):
            for contents in known:
                size = contents.ends[-1] // rows
                for run in contents.part(row * size, size):
                    _append(joined, run)
        self._put(out, joined)

    def _put(self, tensor: torch.Tensor, runs: list[Run] | None) -> None:
        if runs is not None:
            self._contents[_key(tensor)] = _contents(runs)
            self._kept.append(tensor)


def piece_of(spec: TensorSpec, run: Run) -> TensorSpec:
    """A part of a tensor, as a tensor: rows where it is whole ones, else a flat one."""
    if run.nbytes == spec.nbytes:
        return spec
    row = math.prod(spec.shape[1:]) * spec.dtype.itemsize
    fits = row and run.begin % row == 0 and run.nbytes % row == 0
    shape = (run.nbytes // row, *spec.shape[1:]) if fits else (run.nbytes // spec.dtype.itemsize,)
    return replace(spec, shape=shape, offset=spec.offset + run.begin, nbytes=run.nbytes)


def _contents(runs: Sequence[Run]) -> _Contents:
    return _Contents(tuple(runs), tuple(accumulate(run.nbytes for run in runs)))


def _append(runs: list[Run], run: Run) -> None:
    last = runs[-1] if runs else None
    if last and last.source == run.source and last.begin + last.nbytes == run.begin:
        runs[-1] = Run(run.source, last.begin, last.nbytes + run.nbytes)
    else:
        runs.append(run)


def _key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _blocks(tensor: torch.Tensor) -> tuple[int, list[tuple[int, int]]]:
    """Elements that lie side by side, and (size, stride) of the dimensions around them."""
    dims = [d for d in zip(tensor.shape, tensor.stride(), strict=True) if d[0] != 1]
    block = 1
    while dims and dims[-1][1] == block:
        block *= dims.pop()[0]
    return block, dims
