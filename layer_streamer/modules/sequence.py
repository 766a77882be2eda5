"""The checkpoint as one sequence of blocks sees it: block i is layer i, keyed by parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..checkpoint.manifest import FrozenMapping, LayerSpec, Manifest, TensorSpec
from ..errors import ConfigError
from .blocks import Block
from .naming.recipe import Recipe


def manifest_of(
    manifest: Manifest,
    blocks: Sequence[Block],
    recipes: Mapping[str, Recipe],
    outside: Mapping[str, Recipe],
) -> Manifest:
    """A manifest with a layer for each block, of the ``recipes`` that are in it, and the parameters
    ``outside`` as static tensors. ConfigError for a block that has nothing to stream.
    """
    layers = []
    for i, block in enumerate(blocks):
        head = f"{block.name}."
        tensors = {
            name.removeprefix(head): spec_of(recipe)
            for name, recipe in recipes.items()
            if name.startswith(head)
        }
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
