"""Drafts from what was there before: no model."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence

from .occurrences import APART, Occurrences

LEAST = 2
"""Tokens that have to be equal before what is proposed followed them."""
POOL_TOKENS = 1 << 16
"""Of texts that have ended."""
FRUITLESS = 8
"""Proposals in a row with no token that the model agrees with, before the first pause."""
FIRST_PAUSE, LONGEST_PAUSE = 4, 32
"""Tokens."""


class Lookup:
    """Proposes what followed the last tokens where they occurred before: in the row, or in texts
    that have ended.

    The longest match wins, of as long ones that of the row, then the newest (what most of 16 such
    places agree on was tried, and is no better). A match in the row goes on through its own end: a
    text that repeats itself is proposed for ever.

    **Pauses.** After FRUITLESS proposals in a row of which nothing was accepted, the row's next
    proposal is FIRST_PAUSE tokens later; after each fruitless one from then on, twice as many
    later, LONGEST_PAUSE at most: 4, 8, 16, 32, 32. One token accepted, or a text cut back, and all
    of this is forgotten. Where it never pays, n tokens see at most 10 + n / 32 proposals.

    **Memory.** 12 bytes a token and at most 140 for each run of ``least`` tokens that differs: 5 MB
    for a row of 32,768 tokens that has not ended, 10 MB for the 65,536 that the pool keeps.
    The pool takes in what a row had at its last proposal, and one token more that ends it; of a
    longer text its end, and the oldest texts leave. 0 is no pool.

    Thread rules: one thread.
    """

    weighs = False

    def __init__(self, least: int = LEAST, pool_tokens: int = POOL_TOKENS) -> None:
        """ValueError for fewer than two tokens, or a pool of fewer than none."""
        if least < 2 or pool_tokens < 0:
            raise ValueError(
                f"least={least}, pool_tokens={pool_tokens}: at least 2, and at least 0"
            )
        self._least = least
        self._rows: dict[int, _Row] = {}
        self._pool = _Pool(least, pool_tokens)

    def propose(self, key: int, ids: Sequence[int], most: int) -> Sequence[int]:
        """As :class:`Drafter` says. ids of 31 bits; those beyond raise OverflowError.

        ids that differ from the row's last ones in what both have are seen where they are shorter,
        or differ in the last token that was known; then they are read once from the beginning.
        """
        row = self._rows.pop(key, None) or _Row(self._least)
        row.take(ids)  # out of the table meanwhile: what an interrupt leaves half done is not kept
        self._rows[key] = row
        if most < 1 or row.pause.lasts(len(ids)):
            return []
        ending = row.seen.ending()
        length, place = row.seen.longest(ending)
        in_pool, pool_place = self._pool.seen.longest(ending)
        if in_pool > length:
            return self._pool.seen.follow(pool_place, most)
        return row.seen.follow(place, most) if length else []

    def accepted(self, key: int, proposed: int, agreed: int) -> None:
        """As :class:`Drafter` says."""
        row = self._rows.get(key)
        if row is not None and proposed > 0:
            row.pause.hear(len(row.seen) - 1, fruitful=agreed > 0)

    def forget(self, key: int) -> None:
        """As :class:`Drafter` says; the text goes to the pool."""
        row = self._rows.pop(key, None)
        if row is not None:
            pool, self._pool = self._pool, _Pool(self._least, self._pool.most)
            pool.add(row.seen.ending(pool.most - 1))
            self._pool = pool


class _Row:
    """What is known of a row."""

    def __init__(self, least: int) -> None:
        self.seen, self.pause = Occurrences(least), _Pause()

    def take(self, ids: Sequence[int]) -> None:
        """Learn the ids that are new."""
        known = len(self.seen) - 1
        if len(ids) < known or (known and ids[known - 1] != self.seen.last):
            self.seen.cut(self.seen.common(ids))
            self.pause, known = _Pause(), len(self.seen) - 1
        self.seen.extend(ids[known:])


class _Pause:
    """When a row is left alone."""

    def __init__(self) -> None:
        self._fruitless = 0
        self._until = 0

    def lasts(self, known: int) -> bool:
        """True: not yet, with that many tokens."""
        return known < self._until

    def hear(self, known: int, *, fruitful: bool) -> None:
        """Of a proposal behind that many tokens."""
        self._fruitless = 0 if fruitful else self._fruitless + 1
        doublings = self._fruitless - FRUITLESS
        if doublings >= 0:
            self._until = known + min(FIRST_PAUSE << min(doublings, 8), LONGEST_PAUSE)


class _Pool:
    """Texts that have ended, the oldest out first."""

    def __init__(self, least: int, most: int) -> None:
        self.seen, self.most = Occurrences(least), most
        self._sizes: deque[int] = deque()

    def add(self, text: array[int]) -> None:
        """A text of fewer than ``most`` tokens."""
        if text:
            while len(self.seen) + len(text) > self.most:
                self.seen.drop(self._sizes.popleft())
            text.append(APART)
            self.seen.extend(text)
            self._sizes.append(len(text))
