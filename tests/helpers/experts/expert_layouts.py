"""Experts written in every layout that checkpoints have, and what is then expected of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoints import random_tensor, tensor_bytes, write_safetensors

from layer_streamer.checkpoint.experts import ExpertLayer
from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.checkpoint.manifest import LayerSpec, TensorSpec

PREFIX = "model.layers.0."


@dataclass(slots=True)
class Written:
    """Tensors of a layer, and by bank the bytes of each expert."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """As they are stored, by key."""
    banks: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    dense: set[str] = field(default_factory=set)
    """Keys that are no expert's."""

    def add_alone(self, place: str, name: str, tensors: list[torch.Tensor]) -> None:
        """A bank of which each expert has its tensor by itself."""
        for expert, tensor in enumerate(tensors):
            self.tensors[f"{place}experts.{expert}.{name}"] = tensor
        self.banks[f"{place}experts.{name}"] = tensors

    def add_stacked(self, key: str, tensors: list[torch.Tensor]) -> None:
        """A bank that is one tensor."""
        self.tensors[key] = torch.stack(tensors)
        self.banks[key] = tensors

    def add_dense(self, key: str, *shape: int) -> None:
        """A tensor of no expert."""
        self.tensors[key] = random_tensor(shape, torch.float32, seed=len(self.tensors))
        self.dense.add(key)


def experts_of(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list:
    """A tensor for each expert, all different."""
    return [random_tensor(shape, dtype, seed=1000 * seed + e) for e in range(count)]


def layer_of(directory: Path, tensors: dict[str, torch.Tensor], files: int = 1) -> LayerSpec:
    """The layer of a real checkpoint with these tensors, by key, in an order of no meaning, dealt
    out to several files."""
    keys = list(tensors)
    random.Random(len(keys)).shuffle(keys)
    for number in range(files):
        some = {PREFIX + key: tensors[key] for key in keys[number::files]}
        write_safetensors(directory / f"model-{number}.safetensors", some, gap=number)
    return read_manifest(directory).layers[0]


def bytes_of(spec: TensorSpec) -> bytes:
    """What lies where a tensor is said to be."""
    read = b""
    for extent in spec.extents:
        with open(extent.path, "rb") as file:
            file.seek(extent.offset)
            read += file.read(extent.nbytes)
    return read


def assert_banks(experts: ExpertLayer | None, banks: dict[str, list[torch.Tensor]]) -> None:
    """Banks, and of each expert dtype, shape and bytes, are those that were written."""
    assert experts is not None
    assert list(experts.banks) == sorted(banks)
    for name, expected in banks.items():
        assert len(experts.banks[name]) == experts.num_experts == len(expected)
        for spec, tensor in zip(experts.banks[name], expected, strict=True):
            assert (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape))
            assert spec.nbytes == tensor.nbytes
            assert bytes_of(spec) == tensor_bytes(tensor)
