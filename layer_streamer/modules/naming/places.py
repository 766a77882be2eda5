"""What a module has places for: parameters and persistent buffers, and what fits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ...checkpoint.manifest import TensorSpec
from ...errors import CheckpointError
from .recipe import CAST, Conversion, Recipe


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter or persistent buffer of a module."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    identity: int
    """Places with the same one are one object, under two names."""


@dataclass(slots=True)
class Draft:
    """Names so far: without ties, and without what may be missing."""

    recipes: dict[str, Recipe] = field(default_factory=dict)
    unplaced: dict[str, str] = field(default_factory=dict)
    """Tensors of the checkpoint that have no place, and the names that were looked for."""


def places_of(module: nn.Module) -> dict[str, Place]:
    """By full dotted name, in the module's order. Non-persistent buffers are no part of it."""
    return {
        name: Place(tuple(tensor.shape), tensor.dtype, id(tensor))
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }


def whole(name: str, place: Place, spec: TensorSpec, dtype: torch.dtype | None) -> Recipe:
    """The recipe of a parameter that is one tensor of the checkpoint, cast to ``dtype``."""
    expect_shape(name, place.shape, spec, spec.shape)
    return cast(Recipe(name, (spec,), spec.dtype, spec.shape), dtype, spec)


def cast(recipe: Recipe, dtype: torch.dtype | None, spec: TensorSpec) -> Recipe:
    """The recipe with a cast of what its pieces are, if the parameter's dtype is another."""
    if dtype is None or dtype == recipe.dtype:
        return recipe
    expect_dtype(recipe.name, dtype, spec)

    def make(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0].to(dtype)

    laid = ((recipe.dtype, recipe.shape),)
    convert = Conversion(CAST, laid, dtype, recipe.shape, make)
    return Recipe(recipe.name, recipe.pieces, recipe.dtype, recipe.shape, convert)


def expect_shape(
    name: str,
    expected: tuple[int, ...],
    spec: TensorSpec,
    got: tuple[int, ...],
    sources: str | None = None,
) -> None:
    """CheckpointError if what ``spec``, or all ``sources``, come to does not fit the parameter."""
    if got != expected:
        raise CheckpointError(
            f"{spec.path}: {sources or f'tensor {spec.name!r}'} (for parameter {name!r}): expected "
            f"shape {shown_shape(expected)}, got {shown_shape(got)}"
        )


def expect_dtype(name: str, expected: torch.dtype, spec: TensorSpec) -> None:
    """CheckpointError if a cast to ``expected`` would not keep what the numbers mean.

    Packed and eight-bit floating-point values are numbers only together with their scales.
    """
    floating = spec.dtype.is_floating_point
    if floating != expected.is_floating_point or (floating and spec.dtype.itemsize == 1):
        raise CheckpointError(
            f"{spec.path}: tensor {spec.name!r} (for parameter {name!r}): expected a dtype that "
            f"can be cast to {expected}, got {spec.dtype}"
        )


def shown_shape(shape: Sequence[int]) -> str:
    """As errors write it: [2, 3]."""
    return str(list(shape))
