"""How fast the processor multiplies what a model's layers are made of, beside copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import NamedTuple

import torch

from layer_streamer import Manifest, ProductRate, TensorSpec, product_rates

from ..host_kernels.library import library
from ..host_kernels.products import multiplies, prepare
from ..models.config import ModelConfig
from ..models.modules import expert_of
from ..models.names import WeightNames
from ..weights.arithmetic import project
from ..weights.dequant import Unpacker, Widest
from ..weights.packed import Packed
from ..weights.stored import Stored

CPU = torch.device("cpu")
TORCH = "torch"
LARGE_BITS = 23
"""Of the number of weights, from which on all matrices of a format count as one."""
FILLED = 0x3C
"""Every byte of what is multiplied: numbers of ordinary size in each format. Denormal ones would
slow a processor down."""
MOST_MATRICES = 4096
"""That are multiplied in turn."""

Tensors = Mapping[str, torch.Tensor]


class Rates(NamedTuple):
    """Bytes a second of one token's products, and of copies meanwhile."""

    products: float
    """Of all bytes that layers have: a token is multiplied by few of a mixture's."""
    links: tuple[float, ...]
    """By device."""
    kinds: Mapping[str, float]
    """By format, as it is said: "Q4_K", or "Q4_K by torch" where no kernel of ours serves."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Matrices of one format, which are multiplied alike."""

    stored: Stored
    """The largest of them."""
    specs: Mapping[str, TensorSpec]
    """Its tensors, by their keys."""
    cast: torch.dtype | None
    """What the streamer makes of its floats where it hands them out; None: what they are."""
    weights: float
    """That a token is multiplied by, in all layers."""

    @property
    def label(self) -> str:
        """Such as "Q4_K"; "F16 as bfloat16" of floats that are cast."""
        cast = "" if self.cast is None else f" as {str(self.cast).removeprefix('torch.')}"
        return self.stored.format + cast

    @property
    def multiplier(self) -> str:
        """TORCH, or what our kernels are known by: compiled otherwise, they are others."""
        x_TD = torch.empty(1, self.stored.width, dtype=torch.float32, device=CPU)
        found = library()
        if found is None or not multiplies(self.packed(self.tensors(filled=False)), x_TD):
            return TORCH
        return found.name

    @property
    def size(self) -> str:
        """Said of small matrices, where the call counts as well as what it does."""
        bits = _size(self.stored).bit_length()
        return f" of 2^{bits} weights" if bits < LARGE_BITS else ""

    @property
    def said(self) -> str:
        """For people."""
        return self.label + (f" by {TORCH}" if self.multiplier == TORCH else "")

    @property
    def nbytes(self) -> int:
        """Of that matrix as it is stored."""
        every = sum(spec.nbytes for spec in self.specs.values())
        first = next(iter(self.specs.values()))
        count = 1 if self.stored.expert is None else first.shape[0]
        return every // (count * self.stored.step)

    def tensors(self, *, filled: bool = True) -> Tensors:
        """Made-up ones of its shapes and dtypes; ``filled``: each byte has memory of its own."""
        found = {}
        for key, spec in self.specs.items():
            shape = spec.shape if self.stored.expert is None else spec.shape[1:]
            found[key] = torch.empty(shape, dtype=spec.dtype, device=CPU)
            if filled:
                is_index = key == self.stored.keys.get("g_idx")
                found[key].view(-1).view(torch.uint8).fill_(0 if is_index else FILLED)
        return found

    def packed(self, tensors: Tensors) -> Packed:
        """The matrix, as a pass makes it of what it is handed."""
        if self.cast is not None:
            tensors = {key: tensor.to(self.cast) for key, tensor in tensors.items()}
        return replace(self.stored, expert=None).packed(tensors)


def measure_rates(
    names: WeightNames,
    manifest: Manifest,
    config: ModelConfig,
    devices: Sequence[torch.device],
    cast: torch.dtype | None,
) -> Rates:
    """Of a model's layers, by the kernels that passes have for them, or by plain torch: as it is on
    the machine's record, or measured, once. Errors are those of ``product_rates``."""
    kinds = kinds_of(names, manifest, config, cast)
    prepare()
    named = {f"{kind.label} by {kind.multiplier}{kind.size}": kind for kind in kinds}
    found = product_rates(devices, {name: _ready(kind) for name, kind in named.items()})
    seconds = {name: _seconds(kind, found[name]) for name, kind in named.items()}
    total, nbytes = sum(seconds.values()), 0
    for layer in manifest.layers:
        nbytes += sum(spec.nbytes for spec in layer.tensors.values())
    links = tuple(
        sum(seconds[name] * rates[number].copies for name, rates in found.items()) / total
        for number in range(len(devices))
    )
    return Rates(
        nbytes / total, links, {kind.said: _slowest(found[name]) for name, kind in named.items()}
    )


def kinds_of(
    names: WeightNames, manifest: Manifest, config: ModelConfig, cast: torch.dtype | None
) -> list[Kind]:
    """What a token is multiplied by in all layers, by format."""
    found: dict[str, Kind] = {}
    experts = config.experts
    for layer, matrices in zip(manifest.layers, names.layers, strict=True):
        for module, stored in matrices.items():
            weights = float(stored.rows * stored.width)
            if experts is not None and expert_of(module) is not None:
                weights *= experts.per_token / experts.count
            known = found.get(stored.format)
            weights += 0.0 if known is None else known.weights
            if known is None or _size(known.stored) < _size(stored):
                specs = {key: layer.tensors[key] for key in stored.keys.values()}
                known = Kind(stored, specs, None if stored.dtype in (None, cast) else cast, weights)
            found[stored.format] = replace(known, weights=weights)
    return list(found.values())


def _size(stored: Stored) -> int:
    return stored.rows * stored.width


def _slowest(rates: Sequence[ProductRate]) -> float:
    return min(rate.bytes_per_s for rate in rates)


def _seconds(kind: Kind, rates: Sequence[ProductRate]) -> float:
    """Of a token, in all layers."""
    return kind.weights * kind.nbytes / _size(kind.stored) / _slowest(rates)


def _ready(kind: Kind) -> Callable[[int], Callable[[], int]]:
    """For ``product_rates``: its matrices, and their products with a token."""

    def prepare_products(nbytes: int) -> Callable[[], int]:
        count = max(1, min(nbytes // kind.nbytes, MOST_MATRICES))
        matrices = cycle([kind.tensors() for _ in range(count)])
        stored = kind.stored
        widest = Widest.of([(stored.format, stored.width, stored.ordered)])
        unpacker = Unpacker(CPU, torch.float32, widest)
        x_TD = torch.ones(1, stored.width, dtype=torch.float32, device=CPU)

        def multiply() -> int:
            project(x_TD, kind.packed(next(matrices)), unpacker)
            return kind.nbytes

        return multiply

    return prepare_products
