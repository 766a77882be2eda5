"""Which modules of a model hold experts that can be brought on demand, and which cannot, and why.

transformers has classes of experts computed by whichever implementation a configuration names. Such
a class is told by what its decorator leaves on each module; nothing of transformers is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ...checkpoint.experts import split_experts
from ...checkpoint.manifest import LayerSpec, Manifest
from ...errors import ConfigError
from ...planning.options import Options
from ..blocks import Block
from ..naming.recipe import Recipe

_MARKS = {"config", "has_gate", "has_bias", "is_transposed"}
"""Attributes of a module whose class goes through the interface."""


class Place(NamedTuple):
    """A module of experts."""

    name: str
    """Within its block: "mlp.experts"."""
    module: nn.Module

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the parameters that experts have: what goes up, what goes down, biases."""
        up = "gate_up_proj" if self.module.has_gate else "up_proj"
        weights = (up, "down_proj")
        biases = tuple(f"{leaf}_bias" for leaf in weights) if self.module.has_bias else ()
        return weights + biases

    @property
    def keys(self) -> tuple[str, ...]:
        """The same, named within the block."""
        return tuple(f"{self.name}.{leaf}" for leaf in self.leaves)


def find_places(block: nn.Module) -> list[Place]:
    """The modules of experts within a block that transformers' interface computes."""
    return [
        Place(name, module)
        for name, module in block.named_modules()
        if vars(module).keys() >= _MARKS and hasattr(module.config, "_experts_implementation")
    ]


def on_demand(options: Options) -> bool:
    """Experts are to be brought on demand."""
    return options.get("experts") == "demand"


def all_whole(options: Options) -> Options:
    """The same, for what has no experts."""
    return Options(**{**options, "experts": None, "expert_slots": None})


def check_has_experts(model: nn.Module, blocks: Iterable[Block], options: Options) -> None:
    """ConfigError if experts are to be brought on demand, and no block has some."""
    if on_demand(options) and not any(find_places(block.module) for block in blocks):
        raise ConfigError(
            f"experts='demand': {type(model).__name__} has no experts that go through "
            "transformers' ExpertsInterface: experts='whole' streams it"
        )


def options_of(
    options: Options,
    blocks: Sequence[Block],
    manifest: Manifest,
    recipes: Mapping[str, Recipe],
) -> Options:
    """The options of a sequence's streamer, which has the blocks as ``manifest``'s layers: without
    those of experts, if it has none.

    ConfigError, with the parameter's name, for experts that cannot be brought on demand.
    """
    if not on_demand(options):
        return options
    found = False
    for block, layer in zip(blocks, manifest.layers, strict=True):
        places = find_places(block.module)
        found = found or bool(places)
        _check_as_stored(block, places, recipes)
        _check_told_apart(block, places, layer)
    return options if found else all_whole(options)


def _check_as_stored(block: Block, places: Sequence[Place], recipes: Mapping[str, Recipe]) -> None:
    """The checkpoint's bytes are the parameters, in some order."""
    for name in (f"{block.name}.{key}" for place in places for key in place.keys):
        recipe = recipes.get(name)
        if recipe is None or recipe.convert is None:
            continue
        raise ConfigError(
            f"experts='demand': {name} is made of the checkpoint's tensors by arithmetic "
            f"({recipe.convert.name}), which experts='whole' does"
        )


def _check_told_apart(block: Block, places: Sequence[Place], layer: LayerSpec) -> None:
    """What looks like experts in the layer is what its module of experts has."""
    if len(places) > 1:
        names = ", ".join(place.name for place in places)
        raise ConfigError(
            f"experts='demand': {block.name} has experts in {len(places)} places ({names}): "
            "experts='whole' streams them"
        )
    _, experts = split_experts(layer)
    known = {key for place in places for key in place.keys}
    looks = set(experts.banks) if experts is not None else set[str]()
    other, lacks = sorted(looks - known), sorted(known - looks)
    if other and not places:
        owner = block.module.get_submodule(other[0].rpartition(".")[0])
        raise ConfigError(
            f"experts='demand': {block.name}.{other[0]}: {type(owner).__name__} does not go "
            "through transformers' ExpertsInterface: experts='whole' streams it"
        )
    if other or lacks:
        what = "is nothing that the interface computes with" if other else "is no experts' tensor"
        raise ConfigError(
            f"experts='demand': {block.name}.{(other or lacks)[0]} {what}: experts='whole' "
            "streams it"
        )
