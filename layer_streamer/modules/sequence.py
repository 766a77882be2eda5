"""The checkpoint as one sequence of blocks sees it: block i is layer i, keyed by parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..checkpoint.manifest import FrozenMapping, LayerSpec, Manifest, TensorSpec
from ..errors import ConfigError
from .blocks import Block
from .naming.recipe import Recipe
from .outside import block_of


def by_block(
    blocks: Iterable[Block], recipes: Mapping[str, Recipe]
) -> dict[str, dict[str, Recipe]]:
    """By name of a block, the recipes of the parameters within it, keyed relative to it."""
    found: dict[str, dict[str, Recipe]] = {block.name: {} for block in blocks}
    for name, recipe in recipes.items():
        block = block_of(name, found)
        if block is not None:
            found[block][name.removeprefix(f"{block}.")] = recipe
    return found


def manifest_of(
    manifest: Manifest,
    blocks: Sequence[Block],
    inside: Mapping[str, Mapping[str, Recipe]],
    outside: Mapping[str, Recipe],
) -> Manifest:
    """A manifest with a layer for each block, of what is ``inside`` (:func:`by_block`), and the
    parameters ``outside`` as static tensors. ConfigError for a block that has nothing to stream.
    """
    layers = []
    for i, block in enumerate(blocks):
        tensors = {key: spec_of(recipe) for key, recipe in inside[block.name].items()}
        if not tensors:
            raise ConfigError(f"{block.name}: the checkpoint has no weights of it")
        layers.append(LayerSpec(i, FrozenMapping(tensors)))
    static = {name: spec_of(recipe) for name, recipe in outside.items()}
    used = {
        extent.path
        for spec in (*static.values(), *(s for layer in layers for s in layer.tensors.values()))
        for extent in spec.extents
    }
    files = {path: stamp for path, stamp in manifest.files.items() if path in used}
    return replace(
        manifest,
        layers=tuple(layers),
        static=FrozenMapping(static),
        files=FrozenMapping(files),
        layer_pattern=None,
    )


def nbytes_of(inside: Iterable[Mapping[str, Recipe]]) -> int:
    """Bytes that blocks read."""
    return sum(recipe.nbytes for recipes in inside for recipe in recipes.values())


def made_nbytes(inside: Iterable[Mapping[str, Recipe]]) -> int:
    """Bytes of parameters that are made by arithmetic: once for all blocks that are alike."""
    made = {
        (key, recipe.convert.shape, recipe.convert.dtype): recipe.made_nbytes
        for recipes in inside
        for key, recipe in recipes.items()
        if recipe.convert is not None
    }
    return sum(made.values())


def spec_of(recipe: Recipe) -> TensorSpec:
    """What is streamed for a parameter, under its own name: one tensor, of pieces if need be."""
    first, *more = recipe.pieces
    nbytes = recipe.nbytes
    pieces = recipe.pieces if more else ()
    return replace(
        first,
        name=first.name if not more else recipe.name,
        dtype=recipe.dtype,
        shape=recipe.shape,
        nbytes=nbytes,
        pieces=pieces,
    )
