"""The lines of a file of requests, and which of them are whose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

MOST_BYTES = 8 << 20
"""Of a line."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The lines of one of several machines: each line is one's, whoever else there is."""

    part: int = 1
    of: int = 1

    @classmethod
    def read(cls, text: str) -> Shard:
        """``3/10`` is the third of ten. ValueError for what is none."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"{text[:40]!r}: must be such as 3/10, from 1/10 to 10/10")
        return cls(int(found[1]), int(found[2]))

    def has(self, number: int) -> bool:
        """Lines are counted from 1: the first is of the first part."""
        return (number - 1) % self.of == self.part - 1


def lines_of(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number (from 1) and bytes of every line that is not blank; None of one that is longer than
    MOST_BYTES, of which no more is held at a time."""
    number, goes_on = 1, False
    with open(path, "rb") as file:
        for part in iter(partial(file.readline, MOST_BYTES), b""):
            ends = part.endswith(b"\n")
            too_long = not ends and len(part) == MOST_BYTES
            if not goes_on and (too_long or part.strip()):
                yield number, None if too_long else part
            number, goes_on = number + ends, not ends
