"""Drafts from what was there before: no model."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from .occurrences import APART, Occurrences

LEAST = 2
"""Tokens that have to be equal before what is proposed followed them."""
POOL_TOKENS = 1 << 16
"""Of texts that have ended, of all salts together."""
MOST_SALTS = 1024
"""Of texts that have ended: an index takes 1 KB, however little is in it."""
FRUITLESS = 8
"""Proposals in a row with no token that the model agrees with, before the first pause."""
FIRST_PAUSE, LONGEST_PAUSE = 4, 32
"""Tokens."""


class Lookup:
    """Proposes what followed the last tokens where they occurred before: in the row, or in texts
    of its salt that have ended. How fast a text comes tells nothing of what others have sent.

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
    longer text its end, and the oldest texts leave, of whatever salt. 0 is no pool.

    Thread rules: one thread.
    """

    weighs = False

    def __init__(
        self,
        least: int = LEAST,
        pool_tokens: int = POOL_TOKENS,
        salts: Mapping[int, bytes] | None = None,
    ) -> None:
        """``salts``: of rows by their keys, known when a row is first proposed for; a row without
        one has b"". It is the caller's, who adds and removes them.

        ValueError for fewer than two tokens, or a pool of fewer than none."""
        if least < 2 or pool_tokens < 0:
            raise ValueError(
                f"least={least}, pool_tokens={pool_tokens}: at least 2, and at least 0"
            )
        self._least = least
        self._salts: Mapping[int, bytes] = {} if salts is None else salts
        self._rows: dict[int, _Row] = {}
        self._pools = _Pools(least, pool_tokens)

    def propose(self, key: int, ids: Sequence[int], most: int) -> Sequence[int]:
        """As :class:`Drafter` says. ids of 31 bits; those beyond raise OverflowError.

        ids that differ from the row's last ones in what both have are seen where they are shorter,
        or differ in the last token that was known; then they are read once from the beginning.
        """
        row = self._rows.pop(key, None) or _Row(self._least, self._salts.get(key, b""))
        row.take(ids)  # out of the table meanwhile: what an interrupt leaves half done is not kept
        self._rows[key] = row
        if most < 1 or row.pause.lasts(len(ids)):
            return []
        ending = row.seen.ending()
        length, place = row.seen.longest(ending)
        pool = self._pools.of(row.salt)
        in_pool, pool_place = pool.longest(ending) if pool is not None else (0, 0)
        if pool is not None and in_pool > length:
            return pool.follow(pool_place, most)
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
            pools, self._pools = self._pools, _Pools(self._least, self._pools.most)
            pools.add(row.salt, row.seen.ending(pools.most - 1))
            self._pools = pools  # what an interrupt leaves half done is not kept


class _Row:
    """What is known of a row."""

    def __init__(self, least: int, salt: bytes) -> None:
        self.seen, self.pause, self.salt = Occurrences(least), _Pause(), salt

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


class _Pools:
    """Texts that have ended, by their salts, the oldest of all out first."""

    def __init__(self, least: int, most: int) -> None:
        self.most, self._least, self._tokens = most, least, 0
        self._seen: dict[bytes, Occurrences] = {}
        self._texts: deque[tuple[bytes, int]] = deque()
        self._counts: Counter[bytes] = Counter()
        """Texts of each salt."""

    def __len__(self) -> int:
        """Salts."""
        return len(self._seen)

    def of(self, salt: bytes) -> Occurrences | None:
        """Those of a salt; None: there are none."""
        return self._seen.get(salt)

    def add(self, salt: bytes, text: array[int]) -> None:
        """A text of fewer than ``most`` tokens."""
        if not text:
            return
        text.append(APART)
        while self._tokens + len(text) > self.most or (
            salt not in self._seen and len(self._seen) >= MOST_SALTS
        ):
            self._drop()
        self._seen.setdefault(salt, Occurrences(self._least)).extend(text)
        self._texts.append((salt, len(text)))
        self._counts[salt] += 1
        self._tokens += len(text)

    def _drop(self) -> None:
        """The oldest text leaves."""
        salt, size = self._texts.popleft()
        self._tokens -= size
        self._counts[salt] -= 1
        if self._counts[salt]:
            self._seen[salt].drop(size)
        else:
            del self._seen[salt], self._counts[salt]
