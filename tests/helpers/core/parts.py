"""Parts of checks that run in processes of their own, each well inside the hang guard."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import pytest

PART = "CHECKS_PART"
"""In the environment: "2/5" is the second of five parts."""

T = TypeVar("T")


def part_of(items: Sequence[T], part: str) -> list[T]:
    """Every so many-th: all parts together have each item once, whatever is added."""
    number, count = map(int, part.split("/"))
    if not 1 <= number <= count:
        raise ValueError(f"{PART}={part}: not one of its parts")
    return list(items[number - 1 :: count])


def parts(count: int) -> list[str]:
    """Names of that many."""
    return [f"{number}/{count}" for number in range(1, count + 1)]


def keep_own_part(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of what was collected, only the part that the environment names, if any."""
    if not (part := os.environ.get(PART)):
        return
    kept = part_of(items, part)
    chosen = set(map(id, kept))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = kept
