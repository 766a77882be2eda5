"""What a hand-out is: one layer's tensors by key."""

from __future__ import annotations

from difflib import get_close_matches
from operator import attrgetter
from typing import Any, NoReturn

import torch

# There is no public name of it: this is the one by which torch's documentation registers types.
from torch.utils._pytree import MappingKey, register_pytree_node

from ..checkpoint.manifest import FrozenMapping

KEYS_NAMED = 8
"""How many of a layer's keys an error names."""

_to_register: list[None] = [None]
"""Who takes it out registers Weights. No lock: an interrupt, or a fork, could leave that taken."""
_wants_grad = attrgetter("requires_grad")


class NoTensorError(KeyError):
    """A layer has no tensor of that key; says which it has, those that look like it first."""

    def __init__(self, key: object, keys: tuple[str, ...]) -> None:
        super().__init__(key)
        self._keys = keys

    def __str__(self) -> str:
        key = self.args[0]
        close = get_close_matches(key, self._keys, KEYS_NAMED) if isinstance(key, str) else []
        named = [*close, *(k for k in self._keys if k not in close)][:KEYS_NAMED]
        more = f" and {len(self._keys) - len(named)} more" if len(named) < len(self._keys) else ""
        return f"{key!r}: the layer has {', '.join(map(repr, named)) or 'no tensors'}{more}"


class Weights(FrozenMapping[str, torch.Tensor]):
    """One layer's tensors by key, read-only. Views of a slot: gone when the hand-out ends.

    ``dict(weights)``, which is also what torch.func.functional_call takes, and ``copy()`` are plain
    dicts of the same tensors; deep copies and pickles hold the tensors' values. torch's pytree sees
    into it, and what tree_map makes of it is read-only as well.
    """

    __slots__ = ()

    def __getitem__(self, key: str) -> torch.Tensor:
        try:
            return self._items[key]
        except KeyError:
            raise NoTensorError(key, tuple(self._items)) from None

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def wants_grad(self) -> bool:
        """True if gradients of one of the tensors are asked for."""
        return any(map(_wants_grad, self._items.values()))

    def without_grad(self) -> Weights:
        """The same, as new tensors of which no gradients are asked for."""
        with torch.inference_mode(False):
            return Weights({key: tensor.detach() for key, tensor in self._items.items()})

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a layer's weights are read-only; change a dict(weights)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def copy(self) -> dict[str, torch.Tensor]:
        """A dict of the same tensors."""
        return dict(self.items())

    __copy__ = copy

    def __deepcopy__(self, memo: object) -> dict[str, torch.Tensor]:
        # Of the views alone: a tensor's own deep copy is one of the slot, or of a mapped file.
        return {key: tensor.clone() for key, tensor in self.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.__deepcopy__(None),)


def show_weights_to_pytree() -> None:
    """Have torch's pytree see into Weights. Once a process, as its first streamer is opened."""
    try:
        _to_register.pop()
        register_pytree_node(
            Weights,
            lambda weights: (list(weights.values()), list(weights)),
            lambda tensors, keys: Weights(dict(zip(keys, tensors, strict=True))),
            serialized_type_name="layer_streamer.Weights",
            flatten_with_keys_fn=lambda weights: (
                [(MappingKey(key), tensor) for key, tensor in weights.items()],
                list(weights),
            ),
        )
    except (IndexError, ValueError):
        # Somebody has it in hand; or it is registered, and only what came after was interrupted.
        return
    except BaseException:
        _to_register.append(None)
        raise
