"""Which modules of a model stream: found without a list of models, or named by patterns.

transformers and diffusers are never imported: a model of theirs brings its classes with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..errors import ConfigError
from .holders import tensors_of

LISTS_NAMED = 12
"""How many of a model's lists an error names."""
INDEX = "{i}"

_MARKS = {"transformers": ("_no_split_modules",), "diffusers": ("_no_split_modules",
          "_repeated_blocks")}  # fmt: skip
"""By package, the attributes in which its models name the classes of their blocks."""


class Block(NamedTuple):
    """A module that streams: it gets its weights when its ``forward`` begins."""

    name: str
    """Full dotted name in the model: "model.layers.3"."""
    module: nn.Module


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks of one list, in order. A module that the list holds twice is one block."""

    name: str
    """Of the list in the model ("model.layers"), or the pattern as it was given."""
    parent: str
    """Name of the module that has the list; "" is the model itself."""
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Tie:
    """One tensor that has several names, at least one of which is in a block."""

    names: tuple[str, ...]
    """All of them, in the model's order."""
    blocks: tuple[str, ...]
    """The blocks that have it."""

    @property
    def within_one_block(self) -> bool:
        """True if no other block, and nothing outside the blocks, has it: then it can stream."""
        inside = f"{self.blocks[0]}."
        return len(self.blocks) == 1 and all(name.startswith(inside) for name in self.names)


def find_stacks(
    model: nn.Module, patterns: Sequence[str] | None = None, without: Container[str] = ()
) -> tuple[Stack, ...]:
    """The model's stacks, outermost first, in the order in which they were registered.

    ``patterns``: prefixes of the blocks' names with ``{i}`` for the index, "blocks.{i}." and the
    like, or names of single blocks, in the order in which a forward comes to them; for any module.
    None: a ModuleList of several members is a stack if all of them are marked as blocks: in
    transformers a GradientCheckpointingLayer or one of ``_no_split_modules``, in diffusers one of
    ``_no_split_modules`` or ``_repeated_blocks``. A list within a block is none. ``without``: names
    of lists that are not taken for stacks; those within their members may be.

    ConfigError if there are none, or a pattern finds none, or one block is within another; it lists
    the ModuleLists there are. Reads the module tree only, which may be on meta.
    """
    if patterns is None:
        stacks = tuple(_marked_stacks(model, without))
        if not stacks:
            raise ConfigError(
                f"{type(model).__name__}: no ModuleList of blocks was found; name the blocks by "
                f'stacks=["layers.{{i}}."]; {_lists_of(model)}'
            )
        return stacks
    if isinstance(patterns, str) or not patterns:
        raise ConfigError(f"stacks={patterns!r}: a list of patterns such as 'layers.{{i}}.'")
    stacks = tuple(_named_stack(model, pattern) for pattern in patterns)
    _check_apart([block for stack in stacks for block in stack.blocks])
    return stacks


def group_stacks(stacks: Iterable[Stack]) -> tuple[tuple[Block, ...], ...]:
    """The blocks of each sequence: what one pass goes through in order.

    Stacks with the same parent are one sequence (a transformer's double and single blocks), others
    (encoder and decoder, vision and text) are sequences of their own.
    """
    sequences: dict[str, list[Block]] = {}
    for stack in stacks:
        sequences.setdefault(stack.parent, []).extend(stack.blocks)
    return tuple(_unique(blocks) for blocks in sequences.values())


def find_ties(model: nn.Module, blocks: Iterable[Block]) -> tuple[Tie, ...]:
    """Parameters and persistent buffers of blocks that have more than one name in the model.

    By identity: call the model's own ``tie_weights`` before, if it has one. A block that is in its
    list twice is one module, of which there is nothing to tie.
    """
    blocks = tuple(blocks)
    block_names = {id(block.module): block.name for block in blocks}
    names: dict[int, list[str]] = {}
    again: list[str] = []
    for at, module in model.named_modules(remove_duplicate=False):
        if block_names.get(id(module), at) != at:
            again.append(f"{at}.")
        if not f"{at}.".startswith(tuple(again)):
            for leaf, tensor in tensors_of(module):
                names.setdefault(id(tensor), []).append(f"{at}.{leaf}" if at else leaf)
    owners: dict[int, list[str]] = {}
    for block in blocks:
        held = (id(t) for module in block.module.modules() for _, t in tensors_of(module))
        for key in dict.fromkeys(held):
            owners.setdefault(key, []).append(block.name)
    return tuple(
        Tie(tuple(some), tuple(owners[key]))
        for key, some in names.items()
        if len(some) > 1 and key in owners
    )


def _marked_stacks(model: nn.Module, without: Container[str]) -> Iterator[Stack]:
    marked = set(_marked_classes(model))
    outer: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(inside) for inside in outer):
            continue
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or name in without:
            continue
        if all(_is_block(member, marked) for member in module):
            outer.append(f"{name}.")
            blocks = (Block(f"{name}.{i}", member) for i, member in enumerate(module))
            yield Stack(name, name.rpartition(".")[0], _unique(blocks))


def _is_block(module: nn.Module, marked: set[str]) -> bool:
    return type(module).__name__ in marked or any(
        cls.__name__ == "GradientCheckpointingLayer" and _package(cls) == "transformers"
        for cls in type(module).__mro__
    )


def _marked_classes(model: nn.Module) -> Iterator[str]:
    """Names of classes that the model, or a part of it that is a model itself, says are blocks."""
    for module in model.modules():
        for package in {_package(cls) for cls in type(module).__mro__} & _MARKS.keys():
            for mark in _MARKS[package]:
                yield from getattr(module, mark, None) or ()


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _named_stack(model: nn.Module, pattern: str) -> Stack:
    modules = dict(model.named_modules(remove_duplicate=False))
    holds = isinstance(modules.get(pattern.removesuffix(".")), nn.ModuleList | nn.ModuleDict)
    if pattern.count(INDEX) > 1 or holds:
        raise ConfigError(f"stacks={pattern!r}: needs {INDEX} once, for the block's index")
    blocks = []
    for i in range(len(modules) if INDEX in pattern else 1):
        name = pattern.replace(INDEX, str(i)).removesuffix(".")
        if name not in modules:
            break
        blocks.append(Block(name, modules[name]))
    if not blocks:
        raise ConfigError(
            f"stacks={pattern!r}: {type(model).__name__} has no module "
            f"{pattern.replace(INDEX, '0').removesuffix('.')!r}; {_lists_of(model)}"
        )
    holder = pattern.partition(INDEX)[0].removesuffix(".")
    if INDEX not in pattern and holder.rpartition(".")[2].isdecimal():
        holder = holder.rpartition(".")[0]  # one of a list
    return Stack(pattern, holder.rpartition(".")[0], _unique(blocks))


def _unique(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Each module once, where it comes first."""
    found: dict[int, Block] = {}
    for block in blocks:
        found.setdefault(id(block.module), block)
    return tuple(found.values())


def _check_apart(blocks: Sequence[Block]) -> None:
    """ConfigError if one block is a part of another, which could not be handed out beside it."""
    owners = {id(block.module): block.name for block in blocks}
    for block in blocks:
        for name, module in block.module.named_modules():
            if name and id(module) in owners:
                raise ConfigError(
                    f"stacks: {owners[id(module)]!r} is within {block.name!r}: name one of them"
                )


def _lists_of(model: nn.Module) -> str:
    """The ModuleLists that there are, the longest first, numbers in their names as {i}."""
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            classes = " | ".join(dict.fromkeys(type(member).__name__ for member in module))
            shown = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            found[f"{shown} ({len(module)} x {classes})"] = len(module)
    if not found:
        return "it has no ModuleList"
    lists = [text for text, _ in found.most_common(LISTS_NAMED)]
    more = f" and {len(found) - len(lists)} more" if len(found) > len(lists) else ""
    return f"its ModuleLists: {', '.join(lists)}{more}"
