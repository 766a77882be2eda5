"""A model's own layers in four bits, rounded as a pass hands them out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from layer_streamer import LayerSpec, LayerStreamer, Manifest, TensorSpec

from ..kernels.triton_support import triton_serves
from ..models.names import WeightNames
from ..quantize.codes import code_range, pack_codes
from ..quantize.scales import Rounding
from ..weights.dequant import Unpacker, Widest
from ..weights.stored import Stored
from .held_layers import HeldLayers

BITS, GROUPS = 4, (64, 32)
"""Weights that share a scale: the first that divides a matrix's width."""
AT_A_TIME = 1 << 22
"""Weights that are rounded together, which bounds what that takes."""
MOST = 0.75
"""Of the bytes of the model's own layers, that a rounded copy may take to be worth its while."""


@dataclass(frozen=True, slots=True)
class OwnWeights:
    """What the rounded layers are: the model's names and manifest, with other matrices."""

    names: WeightNames
    manifest: Manifest
    nbytes: tuple[int, ...]
    """Of each layer, on its device."""


def own_weights(manifest: Manifest, names: WeightNames, dtype: torch.dtype) -> OwnWeights:
    """``dtype``: the engine's, which scales have, too. ValueError for a model that would hardly be
    smaller, or has a width that no group divides."""
    matrices, layers, nbytes = [], [], list[int]()
    for spec, stored in zip(manifest.layers, names.layers, strict=True):
        own = {module: _rounded(names.modules[module], one) for module, one in stored.items()}
        vectors = _vectors(spec, stored)
        named = {
            key: spec.tensors[stored[module].key]
            for module, one in own.items()
            for key in one.keys.values()
        }
        matrices.append(own)
        layers.append(replace(spec, tensors=vectors | named))
        rounded_nbytes = sum(_nbytes(one, dtype) for one in own.values())
        kept = sum(math.prod(one.shape) * one.dtype.itemsize for one in vectors.values())
        nbytes.append(rounded_nbytes + kept)
    if sum(nbytes) > MOST * sum(layer.nbytes for layer in manifest.layers):
        kinds = {one.format for layer in names.layers for one in layer.values()}
        raise ValueError(
            f'draft="self": a copy in {BITS} bits would hardly be smaller than the model itself '
            f"({', '.join(sorted(kinds))}): name a smaller model with the same tokenizer"
        )
    rounded = replace(manifest, layers=tuple(layers))
    return OwnWeights(replace(names, layers=tuple(matrices)), rounded, tuple(nbytes))


def round_layers(
    streamer: LayerStreamer, names: WeightNames, own: OwnWeights, dtype: torch.dtype
) -> HeldLayers:
    """The rounded layers, by one pass over the model's, each on the device that has its keys and
    values. ``names``: those of the model."""
    every = (one for layer in names.layers for one in layer.values())
    widest = Widest.of((one.format, one.width, one.ordered) for one in every)
    unpackers = [
        Unpacker(device, dtype, widest, kernels=triton_serves(device))
        for device in streamer.devices
    ]
    found: list[Mapping[str, torch.Tensor]] = []

    def take(_: None, tensors: Mapping[str, torch.Tensor], layer_idx: int) -> None:
        spec, stored = streamer.manifest.layers[layer_idx], names.layers[layer_idx]
        unpacker = unpackers[layer_idx % len(unpackers)]
        made = {key: tensors[key].clone() for key in _vectors(spec, stored)}
        for module, matrix in stored.items():
            made |= _round(tensors, matrix, own.names.layers[layer_idx][module], unpacker)
        found.append(made)

    with torch.inference_mode(False), torch.no_grad():
        streamer.run_pass(None, take, on_host=False)
    if streamer.device.type == "cuda":
        torch.cuda.empty_cache()  # what rounding took is no pass's to find
    return HeldLayers(streamer, own.manifest, found)


def _vectors(spec: LayerSpec, stored: Mapping[str, Stored]) -> dict[str, TensorSpec]:
    """What of a layer is no matrix: norms and biases."""
    matrices = {key for one in stored.values() for key in one.keys.values()}
    return {key: one for key, one in spec.tensors.items() if key not in matrices}


def _rounded(own: str, matrix: Stored) -> Stored:
    """A matrix as it will be."""
    group = next((g for g in GROUPS if matrix.width % g == 0), None)
    if group is None:
        raise ValueError(
            f'draft="self": {own} has width {matrix.width}, which neither of {GROUPS} divides: '
            "name a smaller model with the same tokenizer"
        )
    keys = {"packed": f"{own}.weight_packed", "scale": f"{own}.weight_scale"}
    return Stored(f"ct{BITS}", matrix.rows, matrix.width, keys, "packed", group)


def _nbytes(matrix: Stored, dtype: torch.dtype) -> int:
    codes = matrix.width * BITS // 8
    return matrix.rows * (codes + matrix.width // matrix.group * dtype.itemsize)


def _round(
    tensors: Mapping[str, torch.Tensor], matrix: Stored, own: Stored, unpacker: Unpacker
) -> dict[str, torch.Tensor]:
    """The parts of a rounded matrix, on the device. Scales that clip nothing: searched ones draft
    no better (docs/benchmarks), and take as long as 40 of these."""
    rounding, (_, high) = Rounding(BITS, unpacker.dtype), code_range(BITS)
    width, device = matrix.width, unpacker.device
    words = torch.empty(matrix.rows, width * BITS // 32, dtype=torch.int32, device=device)
    scales = torch.empty(matrix.rows, width // own.group, dtype=unpacker.dtype, device=device)
    at_once = max(1, AT_A_TIME // width)
    for start, end, rows_NK in unpacker.blocks(matrix.packed(tensors)):
        for first in range(start, end, at_once):
            last = min(first + at_once, end)
            groups = rows_NK[first - start : last - start].float().unflatten(1, (-1, own.group))
            each = rounding.stored(groups.abs().amax(-1) / high)
            codes = rounding.codes(groups, each).flatten(1).to(torch.int8)
            words[first:last] = pack_codes(codes, BITS)
            scales[first:last] = each
    return {own.keys["packed"]: words, own.keys["scale"]: scales}
