"""Token places come in blocks, of which a row has any. Pure."""

from __future__ import annotations

from collections.abc import Collection

BLOCK = 256
"""Tokens; host memory grows by it, too."""


def round_up(count: int, unit: int = BLOCK) -> int:
    """The next multiple of ``unit``, at least one."""
    return max(-(-count // unit), 1) * unit


def free_blocks(taken: Collection[int], total: int, count: int) -> tuple[int, ...] | None:
    """So many of the blocks from 0 to ``total`` that are not taken; None: there are too few.

    The first that follow one another, if so many do: keys and values that lie together are copied
    at once, and looked at without being gathered. Else the first of all.
    """
    if not count:
        return ()
    free = [block for block in range(total) if block not in taken]
    for i in range(len(free) - count + 1):
        if free[i + count - 1] - free[i] == count - 1:
            return tuple(free[i : i + count])
    return tuple(free[:count]) if count <= len(free) else None
