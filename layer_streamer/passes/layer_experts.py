"""What is handed out of a layer whose experts are brought on demand."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from ..errors import ConfigError, StreamerError
from ..transport.weights import Weights
from .expert_store import ExpertStore

Ids = Sequence[int] | torch.Tensor
"""Experts of a layer, in any order, each as often as one likes."""


class LayerWeights(Weights):
    """A layer's tensors without those of experts, and these, if it has some."""

    __slots__ = ("dense", "experts")

    def __init__(self, weights: Weights, experts: LayerExperts | None) -> None:
        super().__init__(weights)
        self.dense = weights
        """The same tensors, as the object that they are whenever their memory is handed out."""
        self.experts = experts


class LayerExperts:
    """``weights.experts``: the experts of the layer that is handed out, for as long as it is."""

    __slots__ = ("_layer_idx", "_over", "_store", "where")

    def __init__(self, store: ExpertStore, layer_idx: int) -> None:
        self._store, self._layer_idx, self._over = store, layer_idx, False
        self.where: Mapping[int, int] = {}
        """By expert, the slot of what the last load brought: numbers, for whom a tensor on the
        device would have to be waited for."""

    def __len__(self) -> int:
        """How many there are."""
        return self._store.layers[self._layer_idx].num_experts

    @property
    def num_slots(self) -> int:
        """How many can be loaded at once."""
        return len(self._store.pools[self._layer_idx])

    def load(self, ids: Ids) -> torch.Tensor:
        """Bring experts to slots: (n,) of int64, the slot of each of ``ids``, on the device.

        Ids that are on a device are waited for. Work on the current stream waits for the copies;
        slots hold until the next load, or the end of the hand-out. Raises ConfigError for an expert
        that there is not, and for more than ``num_slots`` different ones (then ``parts`` helps),
        StreamerError after the hand-out or a write to a bank, what reads raise.
        """
        asked = _numbers(ids)
        where = self.bring(asked)
        # Not from any memory: the host would wait until all experts on their way have been copied.
        return self._store.pools[self._layer_idx].numbers.send([where[expert] for expert in asked])

    def bring(self, ids: Sequence[int]) -> Mapping[int, int]:
        """As ``load``, for who needs numbers: the slot of each of ``ids``, also as ``where``."""
        self._check_handed_out()
        experts = sorted(set(ids))
        found = dict(zip(experts, self._store.load(self._layer_idx, experts), strict=True))
        self.where = found
        return found

    def all_there(self) -> torch.Tensor | None:
        """The slots of all the layer's experts, (n,) of int64 on the device; None: not all experts
        of the model have a slot of their own.

        They are brought, if they are not there, and stay for good, as does the tensor: so ids that
        are on the device choose slots that nobody has to wait for. These passes do not know who was
        asked for. After the hand-out, too, as long as the streamer's ``experts_stay``. Errors as of
        ``load``.
        """
        if self._over and not self._store.all_filled:
            self._check_handed_out()
        found = self._store.all_there(self._layer_idx)
        if found is None:
            return None
        table, slots = found
        self.where = dict(enumerate(slots))
        return table

    def load_on_device(self, ids: torch.Tensor) -> torch.Tensor | None:
        """As ``load``, but the host is not asked: slots of ids (n,) of int64 that are on the
        device, where kernels look them up, choose who goes and bring what is missing. All of it is
        enqueued on the current stream, and may be captured in a CUDA graph. To be called in the
        streamer's ``experts_on_device``, for ``most_on_device`` ids at most; None elsewhere. Ids
        have to be of experts that there are: nobody hears of others, whose slots are any.
        """
        return self._store.load_on_device(self._layer_idx, ids)

    def hint(self, ids: Ids, layer: int) -> int:
        """Bring experts of a ``layer`` (its number in the checkpoint) that may be asked for soon,
        while this one is computed: as many as half of the slots that are not in use, those named
        first first. How many are on their way; what is there already is not. With gradients, what
        was loaded before counts as overwritten.

        Errors as of ``load``; ConfigError for a layer without experts.
        """
        self._check_handed_out()
        if layer not in self._store.layers:
            raise ConfigError(f"layer={layer}: has no experts")
        return self._store.hint(layer, list(dict.fromkeys(_numbers(ids))))

    def hint_next(self) -> int:
        """``hint`` of all experts of the next layer that has some; 0: there is none."""
        later = [i for i in self._store.layers if i > self._layer_idx]
        return self.hint(range(len(self)), min(later)) if later else 0

    def bank(self, name: str) -> torch.Tensor:
        """One tensor of all slots, (num_slots, ...), by the name that experts share without their
        numbers ("mlp.experts.up_proj.weight"). KeyError, with those that there are."""
        banks = self._store.pools[self._layer_idx].banks
        if name not in banks:
            raise KeyError(f"{name!r}: experts have {', '.join(map(repr, banks))}")
        return banks[name]

    @property
    def derived(self) -> dict[Hashable, Any]:
        """For what a caller has made of banks, by a key of its own: the same dictionary for all
        layers that have these banks, for as long as there are slots."""
        return self._store.pools[self._layer_idx].derived

    @property
    def names(self) -> tuple[str, ...]:
        """Of the banks."""
        return tuple(self._store.pools[self._layer_idx].banks)

    def parts(self, ids: Ids) -> Iterator[list[int]]:
        """The different ones of ``ids`` in ascending order, as many at a time as there are slots,
        to be loaded one part after the other."""
        experts = sorted(set(_numbers(ids)))
        for first in range(0, len(experts), self.num_slots):
            yield experts[first : first + self.num_slots]

    def rounds(self, ids: Ids) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The different ones of ``ids`` in ascending order, in slots: as (experts, their slots, as
        ``load`` gives them). All at once if there are as many slots; else as many as half of them
        at a time, and while those that are handed out are computed with, the next are brought to
        the other half. What is handed out holds until the iterator advances. Errors as of ``load``.
        """
        experts = sorted(set(_numbers(ids)))
        many = len(experts) > self.num_slots
        size = max(1, self.num_slots // 2 if many else len(experts))
        parts = [experts[first : first + size] for first in range(0, len(experts), size)]
        for part, following in zip_longest(parts, parts[1:]):
            slots = self.load(part)
            if following is not None and len(part) + len(following) <= self.num_slots:
                self._store.bring_ahead(self._layer_idx, following)
            yield part, slots

    def whole(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """All of the layer's experts, as ``rounds`` of them: for prompts, and batches that ask for
        nearly all."""
        return self.rounds(range(len(self)))

    def end(self) -> None:
        """The hand-out has ended."""
        self._over = True

    def _check_handed_out(self) -> None:
        if self._over:
            raise StreamerError(f"layer {self._layer_idx}: its hand-out has ended")


def apart(weights: Weights) -> tuple[Weights, LayerExperts | None]:
    """A hand-out's tensors, as the object that they are whenever their memory is handed out, and
    its experts."""
    if isinstance(weights, LayerWeights):
        return weights.dense, weights.experts
    return weights, None


def _numbers(ids: Ids) -> list[int]:
    found: list[int] = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
    if isinstance(ids, torch.Tensor) and ids.dim() != 1:
        raise ConfigError(f"ids of shape {list(ids.shape)}: must have one dimension")
    return found
