"""How many experts there are, and how many of them at a time."""

from __future__ import annotations

from dataclasses import dataclass

from ...passes.expert_store import ExpertStore


@dataclass(frozen=True, slots=True)
class ExpertSlots:
    """Of one sequence of blocks. ``str()`` of it is a line for people."""

    count: int
    """How many experts the device holds."""
    experts: int
    """How many there are, in all layers."""
    layers: int
    """How many layers have some."""

    def __str__(self) -> str:
        slots = "1 slot" if self.count == 1 else f"{self.count:,} slots"
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"{slots} for {self.experts:,} of {layers}"


def slots_of(store: ExpertStore) -> ExpertSlots:
    """Of a store."""
    pools = {id(pool): len(pool) for pool in store.pools.values()}
    experts = sum(layer.num_experts for layer in store.layers.values())
    return ExpertSlots(sum(pools.values()), experts, len(store.layers))
