"""Where in a fixed number of token places the next row may lie. Pure."""

from __future__ import annotations

from collections.abc import Iterable

BLOCK = 256
"""Tokens; regions begin and end at multiples of it, and host memory grows by it."""


def round_up(count: int, unit: int = BLOCK) -> int:
    """The next multiple of ``unit``, at least one."""
    return max(-(-count // unit), 1) * unit


def first_fit(taken: Iterable[tuple[int, int]], capacity: int, size: int) -> int | None:
    """Start of the first gap of ``size`` places between the (start, size) that are taken."""
    start = 0
    for first, count in [*sorted(taken), (capacity, 0)]:
        if first - start >= size:
            return start
        start = first + count
    return None
