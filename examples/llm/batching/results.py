"""The file of a batch's results, which says what has been answered."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..text.prompt_file import append_to, write_record

BEGINS = b'{"id": "batch_req_'
"""Every line of it does."""
DIGEST = 16
"""Bytes of an id that are held, of whatever length it is."""


def digest(custom_id: str | None) -> bytes:
    """What is held of an id; of what cannot be written, as it is written."""
    if custom_id is None:
        return b""
    return blake2b(custom_id.encode("utf-8", "replace"), digest_size=DIGEST).digest()


class Results:
    """Appends results, each whole, and knows which lines have one. What it holds of each is its
    number and a digest. Thread rules: one thread."""

    def __init__(self, path: Path) -> None:
        """A last line that was cut off is taken away. ValueError for a file of something else, and
        for one that another process appends to."""
        self._path, self._answered = path, dict[int, bytes]()
        self._file = append_to(path, BEGINS, self._note)

    def __contains__(self, number: int) -> bool:
        """True: the line has been answered."""
        return number in self._answered

    def check(self, number: int, custom_id: str | None) -> None:
        """ValueError if what a line was answered for was another request."""
        if self._answered[number] != digest(custom_id):
            raise ValueError(f"{self._path}: has the answer to another line {number}")

    def write(self, found: Mapping[str, Any]) -> None:
        """One more, on disk before this returns."""
        write_record(self._file, found)
        self._note(found)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def _note(self, found: Mapping[str, Any]) -> None:
        self._answered[int(found["line"])] = digest(found["custom_id"])
