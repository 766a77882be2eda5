"""The large matrices outside the blocks: tables that rows are looked up in, and the output head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

from torch import nn

from ..blocks import Block
from ..naming.names import Names, is_hub_model
from ..outside import block_of


class Matrix(NamedTuple):
    """A matrix outside the blocks of which all that compute with it need some rows at a time."""

    name: str
    """Of the parameter."""
    nbytes: int
    """What it takes on a device."""
    tables: tuple[nn.Embedding, ...]
    """Those that look rows up in it: they can take them from host memory."""
    head: Block | None
    """The linear module that computes with all of its rows: they can be streamed."""


class Ends(NamedTuple):
    """The matrices of a model that need not be on the device."""

    tables: tuple[Matrix, ...]
    """Without a head, in the model's order."""
    head: Matrix | None
    """With the output head: what transformers says is that, else the largest there is."""


def find_ends(
    model: nn.Module, names: Names, outside: Iterable[str], blocks: Sequence[Block]
) -> Ends:
    """The matrices of a model, of its parameters ``outside`` the blocks; its tree is read only.

    One whose rows are not those of a tensor of the checkpoint is none, nor one that anything else
    shares: a module of another kind, or one within a block.
    """
    parts = [part for part in model.modules() if is_hub_model(part)]
    inputs = [_ask(part, "get_input_embeddings") for part in parts]
    outputs = [_ask(part, "get_output_embeddings") for part in parts]
    within = {block.name for block in blocks}
    tables, heads = list[Matrix](), list[tuple[bool, int, Matrix]]()
    for name in outside:
        recipe = names.recipes[name]
        alike = [name, *(other for other, source in names.tied.items() if source == name)]
        if not recipe.has_rows or any(block_of(one, within) for one in alike):
            continue
        owners = _owners(model, alike)
        lookups = tuple(m for m in owners.values() if _looks_up(m, inputs))
        linear = [Block(n, m) for n, m in owners.items() if _is_linear(m, outputs)]
        if len(lookups) + len(linear) < len(owners) or len(linear) > 1:
            continue
        nbytes = recipe.made_nbytes
        if not linear:
            tables.append(Matrix(name, nbytes, lookups, None))
            continue
        (head,) = linear
        is_output = any(head.module is some for some in outputs)
        heads.append((is_output, nbytes, Matrix(name, nbytes, lookups, head)))
    best = max(heads, key=lambda head: head[:2], default=None)
    return Ends(tuple(tables), best[-1] if best is not None else None)


def _owners(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules whose ``weight`` has these names, each once, by its first; a module that has it
    under another name than that is no table and no head."""
    owners: dict[str, nn.Module] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner) if leaf == "weight" else nn.Identity()
        if all(module is not other for other in owners.values()):
            owners[owner] = module
    return owners


def _looks_up(module: nn.Module, inputs: Sequence[nn.Module | None]) -> TypeGuard[nn.Embedding]:
    """Its forward takes first the ids that it looks up, and its weight is not changed by that."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    plain = type(module).forward is nn.Embedding.forward
    return plain or any(module is some for some in inputs)


def _is_linear(module: nn.Module, outputs: Sequence[nn.Module | None]) -> bool:
    """It computes with its weight when it is called, and nothing else does: of a class that is
    derived from linear ones (attention has one) that is known of outputs alone."""
    plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    return plain and (type(module) is nn.Linear or any(module is some for some in outputs))


def _ask(part: Any, name: str) -> nn.Module | None:
    """What a transformers model says its tokens are looked up in, or its logits are made by."""
    try:
        found: nn.Module | None = getattr(part, name)()
    except (AttributeError, NotImplementedError):
        return None
    return found
