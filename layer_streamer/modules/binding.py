"""Gives a block its weights: its modules' parameters become those of a slot, by dict stores alone.

One Parameter a slot and layout, made once, so that a compiled block, or whoever looks at the
parameters, sees the same objects again. The model's functions and classes are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import is_grad_enabled, nn

from ..errors import ConfigError, StreamerError
from ..transport.weights import Weights
from .blocks import Block
from .entry import Entry, entry_of
from .holders import Holder, find_empty, find_tensor, places_of
from .unbound import as_parameter, as_unbound, is_wanted, without_name

Convert: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

_wants_grad = attrgetter("requires_grad")
_values = dict.values
_UNKNOWN = nn.Identity()
"""A child that no block has."""


class Source(Protocol):
    """The part of a recipe that a binder needs."""

    @property
    def convert(self) -> Convert | None:
        """From the streamed tensor to the parameter; None where it is the parameter."""


_Form: TypeAlias = tuple[Entry, ...]


class _Known(NamedTuple):
    """One key of a block, wherever its places are."""

    entry: Entry
    unbound: torch.Tensor
    convert: Convert | None


@dataclass(slots=True)
class _Bound:
    """Where a block's tensors go, in the order of its form. It does not hold the block itself."""

    name: str
    form: _Form
    stores: tuple[tuple[Holder, Any], ...]
    """Who holds it, and under which name or number."""
    unbound: tuple[torch.Tensor, ...]
    """What is there while the block has no weights."""
    conversions: tuple[tuple[int, str, Convert], ...]
    """Place in the form, key, and what makes the parameter."""
    tree: tuple[dict[str, nn.Module | None], ...]
    """Children by name, of the block and of all within it that had some when the stores were
    found."""
    children: list[nn.Module | None]
    """Those children then."""
    leaves: tuple[dict[str, nn.Module | None], ...]
    """The same of those that had none."""
    current: tuple[torch.Tensor, ...]
    """What was bound last."""


@dataclass(slots=True)
class _Made:
    """What has been made of one hand-out's tensors; kept for when the slot holds these again."""

    weights: Weights
    """Held, so that no other can take its place as the key."""
    by_form: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    by_entry: dict[Entry, torch.Tensor] = field(default_factory=dict)


class Binder:
    """Puts the weights of a hand-out into blocks, and takes them out again.

    A layer's keys are names of parameters or persistent buffers relative to its block. Parameters
    have no gradients. Where a parameter has several names within its block, all of them get it.
    What has no key, such as a LoRA adapter, stays as it is. Places are looked for when the binder
    is made, and again when the module tree of a block has changed.

    Thread rules: one thread at a time, the one that runs the forward. Every method may be
    interrupted anywhere, and called again.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        keys: Sequence[Sequence[str]],
        sources: Mapping[str, Source] | None = None,
        devices: Sequence[torch.device] = (),
    ) -> None:
        """``keys``: of each block, those that will be handed out. ``sources``: by full name of a
        parameter (the block's name, a dot, the key), whether it is made by arithmetic. ``devices``:
        where layers are handed out, in turn.

        From here on the blocks' parameters are on meta. ConfigError for a key without a place.
        """
        self._sources = sources or {}
        self._forms: dict[_Form, _Form] = {}
        self._made: dict[int, _Made] = {}
        self._converted: dict[tuple[torch.device, Entry], torch.Tensor] = {}
        self._blocks = []
        for i, (block, some) in enumerate(zip(blocks, keys, strict=True)):
            device = devices[i % len(devices)] if devices else None
            self._blocks.append(self._open(block, some, device))
        for i in range(len(self._blocks)):
            self.unbind(i)

    @property
    def made_nbytes(self) -> int:
        """Bytes of memory for parameters that are made by arithmetic, on each device in use.

        Once for all blocks that are alike: one block at a time has weights.
        """
        return sum(entry.made_nbytes for entry in {e for form in self._forms for e in form})

    def tensor_ids(self) -> set[int]:
        """``id`` of every tensor that blocks hold for what is streamed. Any thread."""
        held = [bound.current + bound.unbound for bound in tuple(self._blocks)]
        held += [tuple(made.by_entry.values()) for made in tuple(self._made.values())]
        return {id(tensor) for some in held for tensor in some}

    def bind(self, i: int, module: nn.Module, weights: Weights) -> None:
        """Give block ``i``, which is ``module``, the weights of a hand-out.

        They are there until the hand-out ends. StreamerError if the block has no place for one of
        them, or it has another shape there.
        """
        bound = self._blocks[i]
        if any(bound.leaves) or [*chain.from_iterable(map(_values, bound.tree))] != bound.children:
            bound = self._blocks[i] = self._find_again(bound, module)
        values = self._values_of(bound, weights)
        if is_grad_enabled() and True in map(_wants_grad, values):
            # Gradients of what another layer was computed with are not to be added to these.
            self._made.pop(id(weights))
            values = self._values_of(bound, weights)
        for place, key, convert in bound.conversions:
            values[place].copy_(convert(weights[key]))
        bound.current = values
        for (holder, leaf), value in zip(bound.stores, values, strict=True):
            holder[leaf] = value

    def bound(self, i: int) -> tuple[torch.Tensor, ...]:
        """What block ``i`` has now."""
        return self._blocks[i].current

    def check_frozen(self, i: int) -> None:
        """StreamerError, with its name, for a parameter of block ``i`` that is to be trained."""
        bound = self._blocks[i]
        for entry, *some in zip(bound.form, bound.unbound, bound.current, strict=True):
            if True in map(is_wanted, some):
                raise StreamerError(
                    f"{bound.name}.{entry.key}: gradients are asked for (requires_grad), but its "
                    "weights stream and cannot be trained: train adapters, such as LoRA"
                )

    def unbind(self, i: int) -> None:
        """Take block ``i``'s weights out again: to compute with one is a StreamerError with its
        name."""
        bound = self._blocks[i]
        bound.current = bound.unbound
        for (holder, leaf), value in zip(bound.stores, bound.unbound, strict=True):
            holder[leaf] = value

    def release(self, *, but: int | None = None) -> None:
        """Take all blocks' weights out, ``but`` one's, and forget all that was made of them.

        The blocks' parameters are plain ones on meta.
        """
        for i, bound in enumerate(self._blocks):
            if i != but:
                bound.unbound = tuple(map(without_name, bound.unbound))
                self.unbind(i)
        self._made.clear()
        self._converted.clear()

    def _open(self, block: Block, keys: Sequence[str], device: torch.device | None) -> _Bound:
        """A block as it is when the binder is made: its keys are looked for by name."""
        wanted, known = dict[int, str](), dict[str, _Known]()
        for key in keys:
            tensor = find_tensor(block.module, key)
            name = f"{block.name}.{key}"
            if tensor is None:
                raise ConfigError(
                    f"{name}: {type(block.module).__name__} has no such parameter or persistent "
                    "buffer"
                )
            source = self._sources.get(name)
            convert = source.convert if source is not None else None
            entry = entry_of(key, without_name(tensor), made=convert is not None)
            known[key] = _Known(entry, as_unbound(tensor, name, device), convert)
            wanted[id(tensor)] = key
        bound = self._locate(block, wanted, known)
        # Looked for again when it is bound first: whoever has changed it by then, or left a part of
        # it on meta, is to know.
        bound.children = [_UNKNOWN]
        return bound

    def _find_again(self, bound: _Bound, module: nn.Module) -> _Bound:
        """A block whose modules have changed: its tensors are looked for, wherever they are."""
        convert = {key: convert for _, key, convert in bound.conversions}
        wanted, known = dict[int, str](), dict[str, _Known]()
        for entry, now, unbound in zip(bound.form, bound.current, bound.unbound, strict=True):
            wanted[id(now)] = wanted[id(unbound)] = entry.key
            known[entry.key] = _Known(entry, unbound, convert.get(entry.key))
        for made in self._made.values():
            # An interrupted binding leaves some of what was there before.
            wanted |= {id(t): some.key for some, t in made.by_entry.items() if some.key in known}
        found = self._locate(Block(bound.name, module), wanted, known)
        missing = known.keys() - {entry.key for entry in found.form}
        if missing:
            raise StreamerError(
                f"{bound.name}: its modules were changed, and none of them holds the streamed "
                f"{', '.join(sorted(missing))} any more: change them before the model streams"
            )
        empty = find_empty(module, found.stores)
        if empty is not None:
            raise StreamerError(
                f"{bound.name}.{empty} is on meta, and nothing of it streams: it has no values"
            )
        return found

    def _locate(
        self, block: Block, wanted: Mapping[int, str], known: Mapping[str, _Known]
    ) -> _Bound:
        """All places within the block that hold one of the ``wanted`` tensors, by their ids."""
        stores, keys = list[tuple[Holder, Any]](), list[str]()
        for holder, leaf, tensor in places_of(block.module):
            if id(tensor) in wanted:
                stores.append((holder, leaf))
                keys.append(wanted[id(tensor)])
        form = tuple(known[key].entry for key in keys)
        unbound = tuple(known[key].unbound for key in keys)
        every = [module._modules for module in block.module.modules()]
        tree = tuple(filter(None, every))
        return _Bound(
            name=block.name,
            form=self._forms.setdefault(form, form),
            stores=tuple(stores),
            unbound=unbound,
            conversions=tuple(
                (keys.index(key), key, convert)
                for key, (_, _, convert) in known.items()
                if convert is not None and key in keys
            ),
            tree=tree,
            children=[*chain.from_iterable(map(_values, tree))],
            leaves=tuple(children for children in every if not children),
            current=unbound,
        )

    def _values_of(self, bound: _Bound, weights: Weights) -> tuple[torch.Tensor, ...]:
        """The tensors of a block's form over a hand-out's memory; made once."""
        made = self._made.get(id(weights))
        if made is None:
            made = self._made[id(weights)] = _Made(weights)
        values = made.by_form.get(id(bound.form))
        if values is None:
            some = zip(bound.form, bound.unbound, strict=True)
            values = tuple(self._value(bound.name, made, *each) for each in some)
            made.by_form[id(bound.form)] = values
        return values

    def _value(self, block: str, made: _Made, entry: Entry, unbound: torch.Tensor) -> torch.Tensor:
        if entry in made.by_entry:
            return made.by_entry[entry]
        tensor = made.weights[entry.key]
        if entry.made is not None:
            tensor = self._memory_of(entry, tensor.device)
        elif tensor.shape != entry.shape:
            raise StreamerError(
                f"{block}.{entry.key}: expected shape {list(entry.shape)}, got {list(tensor.shape)}"
            )
        if entry.kind is not torch.Tensor:
            tensor = as_parameter(tensor, entry.kind, vars(without_name(unbound)))
        made.by_entry[entry] = tensor
        return tensor

    def _memory_of(self, entry: Entry, device: torch.device) -> torch.Tensor:
        """Where an entry is made. Whoever used it last has been ordered before the hand-out."""
        if (device, entry) not in self._converted:
            with torch.inference_mode(False):
                memory = torch.empty(entry.shape, dtype=entry.made, device=device)
            self._converted[device, entry] = memory
        return self._converted[device, entry]
