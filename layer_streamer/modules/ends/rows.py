"""Embeddings whose rows are taken from host memory, where the file's own pages are: a token needs
one row, and the whole table would take device memory for as long as the model lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..streamer import LayerStreamer
from .naming.names import Names, is_hub_model
from .naming.recipe import Recipe
from .unbound import as_unbound


def tables_of(model: nn.Module, names: Names, outside: Iterable[str]) -> dict[str, nn.Embedding]:
    """By the name of its weight, each embedding outside the blocks that nothing else shares, that
    is in the checkpoint as it is, and whose forward takes the ids that it looks up first."""
    inputs = [_input_of(part) for part in model.modules() if is_hub_model(part)]
    shared = {*names.tied, *names.tied.values()}
    owners: dict[str, nn.Module] = {
        name: model.get_submodule(name.rpartition(".")[0])
        for name in outside
        if name.endswith("weight") and name not in shared and _is_plain(names.recipes[name])
    }
    return {
        name: owner
        for name, owner in owners.items()
        if isinstance(owner, nn.Embedding)
        and owner.max_norm is None
        and (type(owner).forward is nn.Embedding.forward or any(owner is e for e in inputs))
    }


def take_rows(tables: Mapping[str, nn.Embedding], streamer: LayerStreamer) -> None:
    """Have the embeddings look their rows up in the checkpoint, on the streamer's first device."""
    for name, module in tables.items():
        table = _Table(name, module, streamer.host_tensor(name), streamer.device)
        module.padding_idx = None  # matters to gradients alone, and would have to be a row
        module.register_forward_pre_hook(table.before, with_kwargs=True, prepend=True)
        module.register_forward_hook(table.after, always_call=True)


class _Table:
    """The hooks of one embedding: for its forward, its weight is the rows that are asked for."""

    def __init__(
        self, name: str, module: nn.Embedding, rows: torch.Tensor, device: torch.device
    ) -> None:
        self._rows = rows
        self._device = device
        self._away = as_unbound(module.weight, name, device)
        module._parameters["weight"] = self._away  # type: ignore[assignment]

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        ids = kwargs["input"] if "input" in kwargs else args[0]
        unique, places = ids.cpu().unique(return_inverse=True)
        rows = self._rows.index_select(0, unique).to(self._device, self._away.dtype)
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        places = places.to(self._device)
        if "input" in kwargs:
            return args, {**kwargs, "input": places}
        return (places, *args[1:]), kwargs

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters["weight"] = self._away  # type: ignore[assignment]


def _input_of(part: Any) -> nn.Module | None:
    """The embedding that a transformers model looks its tokens up in; None if it has none."""
    try:
        found: nn.Module | None = part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found


def _is_plain(recipe: Recipe) -> bool:
    return recipe.convert is None and len(recipe.pieces) == 1
