"""Experts of a mixture: which tensors of a layer are theirs, and where each one's bytes lie. Pure.

Three layouts are known, by names and shapes alone:

* each expert by itself, ``mlp.experts.17.w1.weight``: the bank is ``mlp.experts.w1.weight``;
* stacked, ``mlp.experts.up_proj`` of shape (experts, ...): expert 17 is a slice of it;
* stacked in GGUF, ``ffn_up_exps.weight``, likewise.

What all experts share stays in the layer: routers, their corrections, shared experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TypeAlias

import torch

from ..errors import CheckpointError, ConfigError
from .manifest import FrozenMapping, LayerSpec, TensorSpec
from .summary import kind

MAX_EXPERTS = 4096
"""Of a layer; the largest published mixtures have 512."""

_BY_ITSELF = re.compile(r"((?:.+\.)?experts\.)(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_STACKED = re.compile(r"((?:.+\.)?experts\.)(.+)", re.DOTALL)
_STACKED_GGUF = re.compile(r"((?:.+\.)?ffn_)(?:gate|up|down|gate_up)_exps\..+", re.DOTALL)
# Also where a module of experts has its router within.
_ROUTER = re.compile(r"(?:.+\.)?(?:router|gate|e_score_correction_bias)(?:\..+)?", re.DOTALL)

_Kind: TypeAlias = tuple[torch.dtype, tuple[int, ...], str | None]


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer. All of them have the same banks, of equal dtypes and shapes."""

    layer_idx: int
    """The layer's number in the checkpoint."""
    num_experts: int
    banks: Mapping[str, tuple[TensorSpec, ...]]
    """By name, sorted: the tensor of each expert, in order. Of stacked ones each has the name of
    the whole, and a place of its own."""

    @property
    def expert_nbytes(self) -> int:
        """Payload bytes of one expert."""
        return sum(bank[0].nbytes for bank in self.banks.values())

    @property
    def nbytes(self) -> int:
        """Payload bytes of all experts."""
        return self.num_experts * self.expert_nbytes

    def expert(self, index: int) -> LayerSpec:
        """One expert's tensors by bank, as a layer that has nothing else. ConfigError for an index
        that there is not."""
        if not 0 <= index < self.num_experts:
            bound = f"from 0 to {self.num_experts - 1} in layer {self.layer_idx}"
            raise ConfigError(f"expert={index}: must be {bound}")
        tensors = {name: bank[index] for name, bank in self.banks.items()}
        return LayerSpec(self.layer_idx, FrozenMapping(tensors))


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file that lie at a stretch."""

    path: Path
    offset: int
    nbytes: int


def split_experts(layer: LayerSpec) -> tuple[LayerSpec, ExpertLayer | None]:
    """The layer without the tensors of its experts, and these; None if it has none.

    CheckpointError, naming file, tensor, layer and expert, for an expert that lacks a tensor which
    others have, or whose tensor has another dtype or shape; for tensors stacked of another number
    of experts; for more than MAX_EXPERTS; for experts in more than one place of the layer.
    """
    groups = _find_groups(layer)
    if not groups:
        return layer, None
    if len(groups) > 1:
        first, second = (groups[place].first for place in sorted(groups)[:2])
        raise CheckpointError(
            f"{first.path}: layer {layer.layer_idx}: experts in {len(groups)} places, such as "
            f"tensors {first.name!r} and {second.name!r}"
        )
    (group,) = groups.values()
    banks = {name: group.bank(name) for name in sorted({*group.alone, *group.stacked})}
    rest = {key: spec for key, spec in layer.tensors.items() if key not in group.keys}
    experts = ExpertLayer(layer.layer_idx, group.count, FrozenMapping(banks))
    return LayerSpec(layer.layer_idx, FrozenMapping(rest)), experts


def expert_extents(experts: ExpertLayer, index: int) -> tuple[Extent, ...]:
    """What has to be read for one expert, by file and offset: tensors whose bytes lie next to each
    other are one extent. ConfigError for an index that there is not."""
    specs = [s for spec in experts.expert(index).tensors.values() for s in spec.extents if s.nbytes]
    extents = list[Extent]()
    for spec in sorted(specs, key=lambda spec: (str(spec.path), spec.offset)):
        last = extents[-1] if extents else None
        if last and last.path == spec.path and last.offset + last.nbytes == spec.offset:
            extents[-1] = replace(last, nbytes=last.nbytes + spec.nbytes)
        else:
            extents.append(Extent(spec.path, spec.offset, spec.nbytes))
    return tuple(extents)


@dataclass(slots=True)
class _Group:
    """Tensors that look like experts', all in one place of the layer."""

    layer_idx: int
    keys: set[str] = field(default_factory=set)
    alone: dict[str, dict[int, TensorSpec]] = field(default_factory=dict)
    """By bank and expert."""
    stacked: dict[str, TensorSpec] = field(default_factory=dict)
    count: int = 0

    @property
    def first(self) -> TensorSpec:
        if self.stacked:
            return next(iter(self.stacked.values()))
        return next(iter(next(iter(self.alone.values())).values()))

    def settle(self) -> bool:
        """Find how many experts there are, and leave out what is no bank; False if nothing is."""
        if self.alone:
            self.count = 1 + max(max(bank) for bank in self.alone.values())
        else:
            # Matrices alone tell: the first dimension of a flat one can be many experts' rows.
            counts = Counter(s.shape[0] for s in self.stacked.values() if len(s.shape) > 2)
            self.count = max(counts, key=lambda count: (counts[count], -count), default=0)
        for key, spec in list(self.stacked.items()):
            if not self.count or (len(spec.shape) < 2 and spec.shape[:1] != (self.count,)):
                del self.stacked[key]
                self.keys.remove(key)
        return bool(self.keys)

    def bank(self, name: str) -> tuple[TensorSpec, ...]:
        """Each expert's tensor of a bank."""
        spec = self.stacked.get(name)
        if spec is None:
            return self._gather(name, self.alone[name])
        if self.count > MAX_EXPERTS:
            self._fail(spec, f"{self.count} experts, more than {MAX_EXPERTS}")
        if spec.shape[0] != self.count:
            self._fail(spec, f"expected {self.count} experts, got {spec.shape[0]} {_said(spec)}")
        return tuple(_slices(spec, self.count))

    def _gather(self, name: str, found: Mapping[int, TensorSpec]) -> tuple[TensorSpec, ...]:
        """Of tensors that each expert has by itself."""
        if self.count > MAX_EXPERTS:
            last = max(found)
            self._fail(found[last], f"expert {last}, more than {MAX_EXPERTS} experts")
        kinds = Counter(_kind(found[index]) for index in sorted(found))
        usual = max(kinds, key=lambda kind: kinds[kind])
        one = next(spec for spec in found.values() if _kind(spec) == usual)
        for index in range(self.count):
            spec = found.get(index)
            if spec is None:
                there = f"{len(found)} of {self.count} experts have it"
                self._fail(one, f"expert {index} lacks {name!r}: {there}, such as this")
            if _kind(spec) != usual:
                self._fail(spec, f"expert {index}: expected {_said(one)}, got {_said(spec)}")
        return tuple(found[index] for index in range(self.count))

    def _fail(self, spec: TensorSpec, fault: str) -> NoReturn:
        raise CheckpointError(f"{spec.path}: layer {self.layer_idx}: tensor {spec.name!r}: {fault}")


def _find_groups(layer: LayerSpec) -> dict[str, _Group]:
    """By what their keys begin with."""
    groups: dict[str, _Group] = {}
    for key, spec in layer.tensors.items():
        match = _BY_ITSELF.fullmatch(key) or _STACKED_GGUF.fullmatch(key)
        if match is None:
            match = _STACKED.fullmatch(key)
            if match is None or (len(spec.shape) < 3 and _ROUTER.fullmatch(match[2])):
                continue
        place = match[1]
        group = groups.setdefault(place, _Group(layer.layer_idx))
        group.keys.add(key)
        if match.re is _BY_ITSELF:
            group.alone.setdefault(place + match[3], {})[int(match[2])] = spec
        else:
            group.stacked[key] = spec
    return {place: group for place, group in groups.items() if group.settle()}


def _slices(spec: TensorSpec, count: int) -> Iterator[TensorSpec]:
    """A stacked tensor cut into its experts', whatever it is made of."""
    nbytes, shape = spec.nbytes // count, spec.shape[1:]
    if not spec.pieces or not nbytes:
        for index in range(count):
            yield replace(spec, shape=shape, offset=spec.offset + index * nbytes, nbytes=nbytes)
        return
    for pieces in _cut(spec.pieces, nbytes):
        first, *more = pieces
        yield replace(
            spec, shape=shape, path=first.path, offset=first.offset, nbytes=nbytes,
            pieces=tuple(pieces) if more else (),
        )  # fmt: skip


def _cut(pieces: Sequence[TensorSpec], nbytes: int) -> Iterator[list[TensorSpec]]:
    """Pieces laid end to end, cut after each ``nbytes``."""
    taken, room = list[TensorSpec](), nbytes
    for piece in pieces:
        begin = 0
        while begin < piece.nbytes:
            part = min(room, piece.nbytes - begin)
            taken.append(piece if part == piece.nbytes else _bytes_of(piece, begin, part))
            begin, room = begin + part, room - part
            if not room:
                yield taken
                taken, room = [], nbytes


def _bytes_of(piece: TensorSpec, begin: int, nbytes: int) -> TensorSpec:
    offset = piece.offset + begin
    return replace(piece, dtype=torch.uint8, shape=(nbytes,), offset=offset, nbytes=nbytes)


def _kind(spec: TensorSpec) -> _Kind:
    return spec.dtype, spec.shape, spec.ggml_type


def _said(spec: TensorSpec) -> str:
    return f"{kind(spec)} of shape {list(spec.shape)}"
