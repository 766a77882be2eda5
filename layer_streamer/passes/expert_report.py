"""What became of the experts of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """What became of the experts that a pass asked for."""

    asked: int = 0
    """Each once a load."""
    hits: int = 0
    """Were in a slot."""
    copied_bytes: int = 0
    """Of those that were not, and of those that were hinted at."""
    hinted: int = 0
    """Brought because of a hint."""
    needed: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """In order, each layer and the experts that it asked for, in rounds or at once."""
    hints_used: int = 0
    """Of these, now or in an earlier pass, asked for while they were there."""


def more_needed(
    needed: tuple[tuple[int, tuple[int, ...]], ...], layer_idx: int, experts: Sequence[int]
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """What a pass has needed, with these experts of a layer as well."""
    if needed and needed[-1][0] == layer_idx:
        before = needed[-1][1]
        experts = [*before, *(expert for expert in experts if expert not in before)]
        needed = needed[:-1]
    return (*needed, (layer_idx, tuple(experts))) if experts else needed
