"""Tokens of a row that change their places in it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rows import Row, Span


@dataclass(frozen=True, slots=True)
class Move:
    """A row's tokens to its places from ``first`` on, one after the other."""

    row: Row
    first: int
    origins: tuple[int, ...]
    """Where in the row they are: each behind the one before it, and none before its goal."""


def moved_places(moves: Sequence[Move], span: Span) -> tuple[list[int], list[int]]:
    """(from, to): the places in a span of what moves, of all rows together."""
    origins, goals = list[int](), list[int]()
    for move in moves:
        row = move.row
        origins += [row.place(span, origin) for origin in move.origins]
        goals += [row.place(span, move.first + i) for i in range(len(move.origins))]
    return origins, goals
