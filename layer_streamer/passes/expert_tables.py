"""Slots of all experts of layers, told once, where each has one of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..checkpoint.experts import ExpertLayer
from ..experts.slots import Placing
from .expert_pool import ExpertPool


class ExpertTables:
    """By layer, the slots of all its experts, on the device and as numbers.

    Thread rules: the thread that runs passes.
    """

    def __init__(
        self,
        layers: Mapping[int, ExpertLayer],
        pools: Mapping[int, ExpertPool],
        bring: Callable[[int, Sequence[int]], Placing],
    ) -> None:
        """``bring`` has experts of a layer in slots."""
        self._layers, self._pools, self._bring = layers, pools, bring
        self._known = dict[int, tuple[int, torch.Tensor, tuple[int, ...]]]()
        """The pool's departures, and the slots since."""

    @property
    def all_fit(self) -> bool:
        """True: every expert of every layer has a slot of its own."""
        experts = sum(layer.num_experts for layer in self._layers.values())
        return experts <= sum(map(len, set(self._pools.values())))

    @property
    def filled(self) -> bool:
        """True: :meth:`make` has brought every layer's, and none has left its slot since."""
        told = {i: departures for i, (departures, _, _) in self._known.items()}
        return all(told.get(i) == pool.departures for i, pool in self._pools.items())

    def find(self, layer_idx: int) -> tuple[torch.Tensor, tuple[int, ...]] | None:
        """A layer's, as long as they are where it has been said; the tensor stays where it is."""
        known = self._known.get(layer_idx)
        there = known is not None and known[0] == self._pools[layer_idx].departures
        return known[1:] if there and known is not None else None

    def make(self, layer_idx: int) -> tuple[torch.Tensor, tuple[int, ...], int]:
        """The same once all are there, and how many had to be brought. Raises what reads raise."""
        pool, known = self._pools[layer_idx], self._known.get(layer_idx)
        placing = self._bring(layer_idx, range(self._layers[layer_idx].num_experts))
        slots = torch.tensor(placing.slots, dtype=torch.int64, device="cpu")
        with torch.inference_mode(False):
            table = torch.empty_like(slots, device=pool.slab.device) if known is None else known[1]
            table.copy_(slots)
        self._known[layer_idx] = pool.departures, table, placing.slots
        return table, placing.slots, len(placing.missing)
