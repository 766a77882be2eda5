"""Packed tensors of GGUF files become numbers, on the device, each time that their block is due.

By the functions that diffusers has for its own GGUF layers; what it has none for is refused.
diffusers is imported when such a tensor is met, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ...checkpoint.ggml_types import GGML_TYPES
from ...checkpoint.manifest import TensorSpec
from ...errors import ConfigError
from .places import Place, expect_shape
from .recipe import Conversion, Recipe

_TYPES = {kind.name: kind for kind in GGML_TYPES.values()}


def is_packed(spec: TensorSpec) -> bool:
    """True for the raw rows of a GGUF file's blocks."""
    return spec.ggml_type is not None and not _TYPES[spec.ggml_type].is_native


def unpacked(recipe: Recipe, place: Place, dtype: torch.dtype) -> Recipe:
    """The recipe of a parameter whose pieces are rows of packed blocks.

    Errors: CheckpointError if they hold another number of numbers; ConfigError for a type that
    diffusers does not unpack, and without diffusers or gguf.
    """
    spec = recipe.pieces[0]
    kind = _TYPES[spec.ggml_type or ""]
    *rows, row = recipe.shape
    shape = (*rows, row // kind.block_bytes * kind.block_elements)
    expect_shape(recipe.name, place.shape, spec, shape)
    try:
        from diffusers.quantizers.gguf.utils import dequantize_functions
    except ImportError as error:
        raise ConfigError(
            f"{spec.path}: {spec.ggml_type} of {spec.name!r} is unpacked by diffusers and gguf: "
            f"{error} (pip install diffusers gguf)"
        ) from error
    known: dict[str, Any] = {some.name: make for some, make in dequantize_functions.items()}
    unpack = known.get(kind.name)
    if unpack is None:
        able = ", ".join(sorted(known))
        raise ConfigError(
            f"{spec.path}: {spec.ggml_type} of {spec.name!r} cannot be streamed: diffusers unpacks "
            f"{able}"
        )

    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        blocks = tensors[0].reshape(-1, kind.block_bytes)
        found = unpack(blocks, kind.block_elements, kind.block_bytes)
        numbers: torch.Tensor = found.reshape(shape).to(dtype)
        return numbers

    laid = ((torch.uint8, recipe.shape),)
    convert = Conversion(f"unpack {kind.name}", laid, dtype, shape, make)
    return replace(recipe, convert=convert)
