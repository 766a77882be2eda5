"""Settings in all pairs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any


def pairwise(factors: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Rows that together hold every pair of values of every two factors (greedy, seeded)."""
    names, rng = list(factors), random.Random(0)
    pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in factors[a]
        for y in factors[b]
    }
    rows = []
    while pairs:
        tries = [{n: rng.choice(factors[n]) for n in names} for _ in range(60)]
        (a, x), (b, y) = next(iter(sorted(pairs, key=repr)))
        for row in tries:
            row[a], row[b] = x, y
        best = max(tries, key=lambda row: len(pairs & covered(row)))
        rows.append(best)
        pairs -= covered(best)
    return rows


def covered(row: Mapping[str, Any]) -> set[Any]:
    return set(itertools.combinations(row.items(), 2))
