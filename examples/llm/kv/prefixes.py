"""Which blocks hold the beginning of which text. Pure.

A block of a text that begins in the same way holds the same keys and values, so any number of rows
may have it, and it is worth keeping after the last of them has ended. Only whole blocks are known:
a row writes to its own last one.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from hashlib import blake2b

from .blocks import BLOCK

DIGEST_NBYTES = 16


class Prefixes:
    """Blocks by the text up to their ends.

    A text is known by a digest of all its ids, and of a salt: texts of two salts have nothing in
    common. Thread rules: one thread; an interrupt leaves it as it was or as it was to be.
    """

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        """Those that were of no use for longest come first."""

    @property
    def blocks(self) -> set[int]:
        """All that are known."""
        return set(self._blocks.values())

    def find(self, ids: Sequence[int], salt: bytes = b"") -> tuple[int, ...]:
        """The blocks of as much of the text as is known, from its first token on."""
        found: dict[bytes, int] = {}
        for digest in _digests(ids, salt):
            block = self._blocks.get(digest)
            if block is None:
                break
            found[digest] = block
        # The last one goes first: it is of no use without those before it.
        last = dict(reversed(found.items()))
        self._blocks = {d: b for d, b in self._blocks.items() if d not in found} | last
        return tuple(found.values())

    def note(self, ids: Sequence[int], blocks: Sequence[int], salt: bytes = b"") -> None:
        """``blocks`` hold a text's ids, of whole blocks. Where others do, these stay known."""
        known = {d: b for d, b in zip(_digests(ids, salt), blocks, strict=False)}
        used = {d: self._blocks.get(d, b) for d, b in reversed(known.items())}
        self._blocks = {d: b for d, b in self._blocks.items() if d not in used} | used

    def forget(self, blocks: Collection[int]) -> None:
        """They hold something else from now on."""
        self._blocks = {d: b for d, b in self._blocks.items() if b not in blocks}

    def oldest(self, kept: Collection[int]) -> Iterator[int]:
        """Blocks that may go, but for those that are ``kept``; the first should go first."""
        return (block for block in self._blocks.values() if block not in kept)


def _digests(ids: Sequence[int], salt: bytes) -> Iterator[bytes]:
    """Of the text up to the end of each whole block."""
    text = blake2b(len(salt).to_bytes(8, "little") + salt, digest_size=DIGEST_NBYTES)
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        text.update(array("q", ids[end - BLOCK : end]))
        yield text.digest()
