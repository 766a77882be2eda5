"""Where the ending of a text has occurred before."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

APART = -1
"""Stands before the first token, and between texts: no token is equal to it."""
FIELD = 32
"""Bits of a token in a key."""
MOST_LENGTH = 256
"""Of a match; of two that are at least as long, neither is the longer one."""
MOST_LOOKED_AT = 1024
"""Of the places where the last tokens have occurred, the newest."""


class Occurrences:
    """Tokens, and where each run of ``least`` of them was before.

    A run's key is its tokens side by side in one number: equal keys are equal tokens, nothing is
    hashed away. ``_latest`` has the newest place of a run, ``_before`` at each place the one before
    it of the same run. So one token more, and one less at either end, are O(1) each.
    Memory: 12 bytes a token, and at most 140 for each run that differs from the others.

    A place is the number of tokens before what follows a run, counted from the first that there
    ever was.
    """

    def __init__(self, least: int) -> None:
        """``least`` >= 2."""
        self._least, self._mask = least, (1 << FIELD * least) - 1
        self._tokens = array("i", [APART])
        self._before = array("q", [-1])
        self._latest: dict[int, int] = {}
        self._dropped = 0

    def __len__(self) -> int:
        """Tokens, with what keeps texts apart."""
        return len(self._tokens)

    @property
    def last(self) -> int:
        """The token at the end."""
        return self._tokens[-1]

    def extend(self, ids: Sequence[int]) -> None:
        """Tokens at the end. OverflowError for one of more than 31 bits: none of them is added."""
        new = array("i", ids)
        key, mask = self._key(self._tokens[1 - self._least :]), self._mask
        latest, before = self._latest, self._before
        first = self._dropped + len(self._tokens) + 1
        self._tokens += new
        for place, token in enumerate(new, first):
            key = (key << FIELD | token) & mask
            before.append(latest.get(key, -1))
            latest[key] = place

    def cut(self, size: int) -> None:
        """Leave the first ``size`` tokens, of :func:`len`, at least one."""
        for i in range(len(self._tokens) - 1, size - 1, -1):
            if self._before[i] > self._dropped:
                self._latest[self._key_at(i)] = self._before[i]
            else:
                del self._latest[self._key_at(i)]
        del self._tokens[size:], self._before[size:]

    def drop(self, count: int) -> None:
        """Drop the first ``count`` tokens; what is then first keeps texts apart."""
        for i in range(count):
            if self._latest.get(self._key_at(i)) == self._dropped + i + 1:
                del self._latest[self._key_at(i)]
        del self._tokens[:count], self._before[:count]
        self._dropped += count

    def ending(self, most: int = MOST_LENGTH) -> array[int]:
        """The last tokens, those of the last text alone."""
        last = self._tokens[max(0, len(self._tokens) - most) :]
        return last if APART not in last else last[last.index(APART) + 1 :]

    def common(self, ids: Sequence[int]) -> int:
        """How many tokens at the beginning are those of ``ids``, plus one."""
        size = 1
        for mine, token in zip(self._tokens[1:], ids, strict=False):
            if mine != token:
                break
            size += 1
        return size

    def longest(self, ending: array[int]) -> tuple[int, int]:
        """How many of the last tokens of ``ending`` stand somewhere before others of the same text,
        as many as possible, and where that was last. (0, 0) where fewer than ``least`` do."""
        length, found, size, tokens = self._least - 1, 0, len(ending), self._tokens
        wanted = ending[max(0, size - length - 1) :]
        for at in self._places(self._key(wanted)):
            longer = tokens[max(0, at - length - 1) : at] == wanted
            if not longer or at == len(tokens) or tokens[at] == APART:
                continue
            length, found = length + 1, at
            while length < size and tokens[at - length - 1] == ending[size - length - 1]:
                length += 1
            if length == size:
                break
            wanted = ending[size - length - 1 :]
        return (length, found) if found else (0, 0)

    def follow(self, at: int, most: int) -> list[int]:
        """``most`` tokens from there on: fewer where a text ends. Behind the last token of all
        stands what was followed so far, again and again."""
        run = self._tokens[at : at + most]
        if APART in run:
            return run[: run.index(APART)].tolist()
        while len(run) < most:
            run += run[: most - len(run)]
        return run.tolist()

    def _places(self, key: int) -> Iterator[int]:
        """Where a run was, the newest first, as places in ``_tokens``."""
        place, dropped = self._latest.get(key, -1), self._dropped
        for _ in range(MOST_LOOKED_AT):
            if place <= dropped:
                return
            yield place - dropped
            place = self._before[place - dropped - 1]

    def _key_at(self, i: int) -> int:
        """The key of the run whose last token is ``_tokens[i]``."""
        return self._key(self._tokens[max(0, i + 1 - self._least) : i + 1])

    def _key(self, run: array[int]) -> int:
        """The key of ``least`` tokens; what keeps texts apart leaves nothing of those before it."""
        key = 0
        for token in run:
            key = (key << FIELD | token) & self._mask
        return key
