"""Drafts of what a row's constraint leaves no choice in: of no model, and always right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Held(Protocol):
    """What a row's text is held to."""

    def forced(self) -> Sequence[int]:
        """Tokens that have to follow the row's last one, one after the other."""


class Forced:
    """Proposes what has to follow. Thread rules: one thread."""

    weighs = True

    def __init__(self, held: Mapping[int, Held]) -> None:
        """``held``: what rows are held to, by their keys, and where their texts end now. It is the
        caller's, who adds and removes rows."""
        self._held = held

    def propose(self, key: int, ids: Sequence[int], most: int) -> Sequence[int]:
        """As :class:`.drafter.Drafter` says; nothing for a row that is held to nothing."""
        held = self._held.get(key)
        return [] if held is None else held.forced()[:most]

    def accepted(self, key: int, proposed: int, agreed: int) -> None:
        """Nothing is learned."""

    def forget(self, key: int) -> None:
        """Nothing is kept."""
