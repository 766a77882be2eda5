"""Which expert gives up its slot: the policies of a pool of slots. Pure.

A pool has a policy of its own. It is told of every expert that is asked for, in order, and says who
goes when a slot is needed: in next to no time, however many slots there are. None of them holds
more than a few numbers for each slot, or for each touch of :data:`HALVE_TOKENS` tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain, islice
from typing import Literal, Protocol, TypeAlias, get_args

Key: TypeAlias = tuple[int, int]
"""An expert: the index of its layer, its own in the layer."""
MayGo: TypeAlias = Callable[[Key], bool]
"""Whether an expert may give up its slot now: not if it is needed in the same step."""
PolicyName: TypeAlias = Literal["segmented", "lru", "lfu", "fixed"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
"""Names of all policies; the first is the default."""

PROTECTED_SHARE = 0.8
"""Of the slots, what those asked for again may take before they make room for each other. Over
made-up traces (favourites that stay or change, experts that come back soon) no share from a quarter
to nine tenths was best throughout; this one lost 3 % of all that was asked for to the best at most.
"""
KEPT_SHARE = 0.5
"""Of the slots, what a fixed set takes; the rest is for what it lacks."""
HALVE_TOKENS = 256
"""After so many tokens, what was counted before is worth half."""


class Policy(Protocol):
    """Who is in a pool, and who goes next. For one thread."""

    def touch(self, key: Key) -> None:
        """``key`` is asked for. If it was not in the pool, it is now."""

    def victims(self, may_go: MayGo, count: int = 1) -> list[Key]:
        """Take so many out of the pool, of those that ``may_go`` says True of, the worst first;
        fewer if there are fewer.

        It is asked of one after the other, the worst first, until so many may go.
        """

    def reset(self) -> None:
        """Nobody is in the pool, and nothing is known of what was asked for."""


class LRU:
    """The one that was asked for longest ago goes."""

    def __init__(self) -> None:
        self._held = OrderedDict[Key, None]()

    def touch(self, key: Key) -> None:
        self._held[key] = None
        self._held.move_to_end(key)

    def victims(self, may_go: MayGo, count: int = 1) -> list[Key]:
        return _take(may_go, count, self._held)

    def reset(self) -> None:
        self._held.clear()


class SegmentedLRU:
    """As LRU, but those asked for once only go before those asked for again while they were there.

    At most ``protected`` of the latter are kept apart; beyond that the one of them that was asked
    for longest ago is again among the others, as their latest.
    """

    def __init__(self, protected: int) -> None:
        self.protected = protected
        self._once, self._again = OrderedDict[Key, None](), OrderedDict[Key, None]()

    def touch(self, key: Key) -> None:
        if key in self._again:
            self._again.move_to_end(key)
        elif key in self._once:
            del self._once[key]
            self._again[key] = None
            if len(self._again) > self.protected:
                last, _ = self._again.popitem(last=False)
                self._once[last] = None
        else:
            self._once[key] = None

    def victims(self, may_go: MayGo, count: int = 1) -> list[Key]:
        return _take(may_go, count, self._once, self._again)

    def reset(self) -> None:
        self._once.clear()
        self._again.clear()

    def order(self) -> tuple[list[Key], list[Key]]:
        """Those asked for once, and those asked for again, each longest ago first."""
        return list(self._once), list(self._again)

    def follow(self, once: Iterable[Key], again: Iterable[Key]) -> None:
        """What :meth:`order` says, of another who went by this policy."""
        self._once, self._again = OrderedDict.fromkeys(once), OrderedDict.fromkeys(again)


class DecayedLFU:
    """The one that was asked for least often goes; of several, the one longest ago.

    Counts are of all that was asked for, in the pool or not, and all are halved, rounded down,
    after each ``halve_every`` touches. So their sum stays below twice that.
    """

    def __init__(self, halve_every: int) -> None:
        self._halve_every = halve_every
        self._touches = 0
        self._counts = dict[Key, int]()
        self._held = OrderedDict[Key, None]()
        # By count: each was touched when it came there, so those touched longest ago stand first.
        self._by_count = dict[int, OrderedDict[Key, None]]()

    def touch(self, key: Key) -> None:
        count = self._counts.get(key, 0)
        if key in self._held:
            self._leave(key, count)
        self._counts[key] = count + 1
        self._by_count.setdefault(count + 1, OrderedDict())[key] = None
        self._held[key] = None
        self._held.move_to_end(key)
        self._touches += 1
        if self._touches == self._halve_every:
            self._halve()

    def victims(self, may_go: MayGo, count: int = 1) -> list[Key]:
        ranked = chain.from_iterable(map(self._by_count.__getitem__, sorted(self._by_count)))
        found = list(islice(filter(may_go, ranked), count))
        for key in found:
            self._leave(key, self._counts.get(key, 0))
            del self._held[key]
        return found

    def reset(self) -> None:
        self._touches = 0
        for table in (self._counts, self._held, self._by_count):
            table.clear()

    def _leave(self, key: Key, count: int) -> None:
        equals = self._by_count[count]
        del equals[key]
        if not equals:
            del self._by_count[count]

    def _halve(self) -> None:
        self._touches = 0
        self._counts = {key: count // 2 for key, count in self._counts.items() if count > 1}
        self._by_count = {}
        for key in self._held:
            self._by_count.setdefault(self._counts.get(key, 0), OrderedDict())[key] = None


class FixedSet:
    """A set that stays once it is there; of the others, the one asked for longest ago goes.

    One of the set goes only where no other may, longest ago first.
    """

    def __init__(self, kept: Iterable[Key]) -> None:
        self._kept = frozenset(kept)
        self._others, self._there = OrderedDict[Key, None](), OrderedDict[Key, None]()

    def touch(self, key: Key) -> None:
        held = self._there if key in self._kept else self._others
        held[key] = None
        held.move_to_end(key)

    def victims(self, may_go: MayGo, count: int = 1) -> list[Key]:
        return _take(may_go, count, self._others, self._there)

    def reset(self) -> None:
        self._others.clear()
        self._there.clear()


def make_policy(
    name: PolicyName, slots: int, asked_a_token: int, counts: Mapping[Key, int] | None = None
) -> Policy:
    """A policy by its name, for a pool of so many ``slots``.

    ``asked_a_token``: experts that one token asks this pool for. ``counts``: how often experts of
    this pool were asked for in a saved trace, for "fixed"; without, its set is empty.
    """
    if name == "lru":
        return LRU()
    if name == "lfu":
        return DecayedLFU(HALVE_TOKENS * asked_a_token)
    if name == "fixed":
        return FixedSet(most_asked(counts or {}, int(slots * KEPT_SHARE)))
    return SegmentedLRU(int(slots * PROTECTED_SHARE))


def most_asked(counts: Mapping[Key, int], count: int) -> Collection[Key]:
    """The ``count`` experts asked for most often; of equals, the first by layer and index."""
    return sorted(counts, key=lambda key: (-counts[key], key))[:count]


def _take(may_go: MayGo, count: int, *tables: OrderedDict[Key, None]) -> list[Key]:
    """Take out the first that may go."""
    found = list(islice(filter(may_go, chain(*tables)), count))
    for key in found:
        for table in tables:
            table.pop(key, None)
    return found
