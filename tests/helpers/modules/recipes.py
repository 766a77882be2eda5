"""Recipes made true on the CPU, without any streaming: what they say, byte for byte."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from layer_streamer.checkpoint.manifest import FrozenMapping, Manifest, TensorSpec
from layer_streamer.checkpoint.safetensors import read_safetensors
from layer_streamer.modules.naming.names import Names
from layer_streamer.modules.naming.recipe import Recipe


def manifest_of(folder: Path) -> Manifest:
    """All tensors of a folder's safetensors files, none of them in a layer."""
    contents = read_safetensors(sorted(folder.glob("*.safetensors")))
    static = FrozenMapping(contents.tensors)
    return Manifest(folder, "safetensors", (), static, contents.files)


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Manifest:
    """A checkpoint of these tensors, in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    return manifest_of(folder)


def read(spec: TensorSpec) -> bytes:
    """The bytes of a piece."""
    with open(spec.path, "rb") as file:
        file.seek(spec.offset)
        return file.read(spec.nbytes)


def made(recipe: Recipe) -> torch.Tensor:
    """The parameter: extents read, laid end to end, seen as the recipe says, converted."""
    data = bytearray(b"".join(read(piece) for piece in recipe.pieces))
    laid = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    seen = laid.view(recipe.dtype).view(recipe.shape)
    if recipe.convert is None:
        return seen
    converted = recipe.convert(seen)
    assert (converted.dtype, converted.shape) == (recipe.convert.dtype, recipe.convert.shape)
    return converted


def made_all(names: Names) -> dict[str, torch.Tensor]:
    """All parameters, tied ones too."""
    found = {name: made(recipe) for name, recipe in names.recipes.items()}
    return found | {name: found[source] for name, source in names.tied.items()}


def differences(got: Mapping[str, torch.Tensor], module: nn.Module, *without: str) -> list[str]:
    """Names of what is not the same in the module's own state, bit for bit, and what one lacks."""
    want = {name: t for name, t in module.state_dict().items() if name not in without}
    return sorted(
        name for name in {*got, *want} if name not in got or name not in want
        or got[name].dtype != want[name].dtype or not torch.equal(got[name], want[name])
    )  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """What transformers says of deliberately odd checkpoints is not looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def loaded(auto: Any, folder: Path, **options: Any) -> Any:
    """What transformers itself loads."""
    with quiet():
        return auto.from_pretrained(folder, **options)
