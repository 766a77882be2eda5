"""What is outside the blocks: loaded once, on the first device for as long as the model lives."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch
from torch import nn

from ..errors import CheckpointError
from ..streamer import LayerStreamer
from .blocks import Block, find_ties
from .naming.names import Names
from .naming.recipe import Recipe
from .unbound import as_parameter

LISTED = 3
"""Names that an error lists."""


def outside_of(model: nn.Module, names: Names, blocks: Sequence[Block]) -> list[str]:
    """Parameters and persistent buffers with a source that are in no block, or in several: what
    blocks share with one another, or with what is outside, is theirs all the time."""
    shared = {
        name for tie in find_ties(model, blocks) if not tie.within_one_block for name in tie.names
    }
    known = {block.name for block in blocks}
    for name, source in names.tied.items():
        if block_of(name, known) != block_of(source, known):
            shared.add(source)
    return [n for n in names.recipes if n in shared or block_of(n, known) is None]


def block_of(name: str, blocks: Container[str]) -> str | None:
    """The block that a parameter is in, by their names."""
    while name:
        name = name.rpartition(".")[0]
        if name in blocks:
            return name
    return None


def check_complete(names: Names, path: object) -> None:
    """CheckpointError for parameters that the checkpoint has no tensors for."""
    if names.missing:
        listed = ", ".join(map(repr, names.missing[:LISTED]))
        more = f" and {len(names.missing) - LISTED} more" if len(names.missing) > LISTED else ""
        other = f"; it has no place for {names.unused[0]!r}" if names.unused else ""
        raise CheckpointError(f"{path}: no tensors for parameters {listed}{more}{other}")


def take_dtypes(model: nn.Module, recipes: Mapping[str, Recipe]) -> None:
    """Have the parameters, which are on meta, be of the dtypes that their recipes give: of a model
    in half precision some may stay in float32."""
    for name, recipe in recipes.items():
        dtype = recipe.convert.dtype if recipe.convert is not None else recipe.dtype
        place = _get(model, name)
        if place.dtype != dtype:
            _put(model, name, torch.empty_like(place, dtype=dtype), place)


def load_outside(
    model: nn.Module, streamer: LayerStreamer, recipes: Mapping[str, Recipe], outside: Sequence[str]
) -> None:
    """Load them, through the streamer's own loader, and put them into their modules."""
    for name in outside:
        recipe, place = recipes[name], _get(model, name)
        if recipe.convert is None:
            tensor = streamer.load_static(name)
        else:  # what it is made of is not kept
            stored = streamer.host_tensor(name).to(streamer.device)
            tensor = recipe.convert(stored).contiguous()
        _put(model, name, tensor, place)


def share_tied(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Names that share another's tensor get it. Of blocks the binder does that."""
    for name, source in tied.items():
        found = _get(model, source)
        if not found.is_meta:
            _put(model, name, found, _get(model, name), same=True)


def _get(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    found = module._parameters.get(leaf)
    return found if found is not None else module._buffers[leaf]  # type: ignore[return-value]


def _put(
    model: nn.Module, name: str, tensor: torch.Tensor, place: torch.Tensor, *, same: bool = False
) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf not in module._parameters:
        module._buffers[leaf] = tensor
        return
    parameter = tensor if same else as_parameter(tensor, type(place), vars(place))
    module._parameters[leaf] = parameter  # type: ignore[assignment]
