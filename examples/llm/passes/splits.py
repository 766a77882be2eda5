"""How decode attention is cut into parts, and what that takes. Pure."""

from __future__ import annotations

import torch

MOST_SPLITS, LEAST_SPLITS = 64, 8
WIDEST_HEAD, MOST_SHARING = 256, 64
"""What a program's registers hold: numbers of a head, query heads of a key-value head."""
STATS = 2
"""Numbers of a part of a head, beside its values."""


def fits_kernels(heads: int, groups: int, width: int) -> bool:
    """True: the kernels take so many query heads over key-value heads of this width."""
    return width <= WIDEST_HEAD and width % 2 == 0 and heads // groups <= MOST_SHARING


def block_of(width: int, dtype: torch.dtype) -> int:
    """Positions whose keys and values a program holds at a time: 16 KiB of each."""
    token_nbytes = width * dtype.itemsize
    return 64 if token_nbytes <= 256 else 32 if token_nbytes <= 512 else 16


def splits_of(positions: int, block: int) -> int:
    """Parts for tokens that see up to so many positions: enough programs to fill a GPU."""
    return min(MOST_SPLITS, -(-positions // block))


def fewer_splits(splits: int, rows: int) -> int:
    """Of these, as many as so many rows that decode together need to fill a GPU."""
    return max(min(splits, LEAST_SPLITS), splits // rows)
