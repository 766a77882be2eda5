"""Which expert is in which slot of a pool. Pure: what fills the slots asks this first."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from ..errors import ConfigError
from .policies import Key, MayGo, Policy, SegmentedLRU


@dataclass(frozen=True, slots=True)
class Placing:
    """Where experts are, or will be once their slots are filled."""

    slots: tuple[int, ...]
    """Of each expert that was asked for, in order."""
    missing: tuple[int, ...]
    """Places in that order of those whose slots are yet to be filled; the others are hits."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a table with a ``SegmentedLRU`` knows: who is in which slot, and who goes first."""

    free: tuple[int, ...]
    """Slots that nobody is in, in the order in which they are given."""
    once: Mapping[Key, int]
    """Slots of those asked for once, longest ago first."""
    again: Mapping[Key, int]


class SlotTable:
    """The slots of one pool, by expert. For one thread.

    Nothing counts as being in its slot that may not be: what was placed is there from
    :meth:`settle` on. Where an error or an interrupt, at whatever bytecode, has kept that from
    being called, or has left the table between two states, the next call finds all slots empty.
    """

    def __init__(self, count: int, policy: Policy) -> None:
        self._count, self._policy = count, policy
        self._settled, self._departures = False, 0
        self.clear()

    @property
    def departures(self) -> int:
        """As long as this is the same, and not below 0, whatever was in its slot still is."""
        return self._departures if self._settled else -1

    def __len__(self) -> int:
        """How many slots there are."""
        return self._count

    def __contains__(self, key: Key) -> bool:
        return self._settled and key in self._slots

    def there(self, keys: Iterable[Key]) -> dict[Key, int]:
        """Those that are in slots, and in which; it counts as no use of them."""
        held = self._slots if self._settled else {}
        return {key: held[key] for key in keys if key in held}

    def place(
        self, keys: Sequence[Key], busy: Collection[int] = (), *, asked: bool = True
    ) -> Placing:
        """A slot for each of ``keys``, which differ: where it is, else a free one, else that of an
        expert that goes. None of ``keys`` goes, and no slot that is ``busy`` is given anew.

        Not ``asked``: they may be asked for later, and the policy hears of them then. They go after
        all others, but only until more are placed so: then they are as those asked for once.

        ConfigError if that leaves too few slots; then nothing has been placed.
        """
        if not self._settled:
            self.clear()
        needed = set(keys)
        taken = {*busy}.difference(self._slots[key] for key in needed if key in self._slots)
        if len(needed) > self._count - len(taken):
            raise ConfigError(
                f"{len(needed)} experts at once, {self._count} slots, {len(taken)} of them busy"
            )
        self._settled = False
        if not asked:
            self._count_early(taken)

        def may_go(key: Key) -> bool:
            return key not in needed and self._slots[key] not in taken

        missing = [at for at, key in enumerate(keys) if key not in self._slots]
        if asked:
            for key in keys:
                if key not in self._slots:
                    (self._slots[key],) = self._make_room(1, may_go, taken)
                self._early.pop(key, None)
                self._policy.touch(key)
        else:
            coming = [keys[at] for at in missing]
            self._slots.update(
                zip(coming, self._make_room(len(missing), may_go, taken), strict=True)
            )
            self._early.update(dict.fromkeys(coming))
        return Placing(tuple(self._slots[key] for key in keys), tuple(missing))

    def settle(self) -> None:
        """What was placed last is in its slots, or will be before anybody looks."""
        self._settled = True

    def drop(self, key: Key) -> None:
        """What is in the slot of ``key`` is not that expert, as after a read that failed."""
        if key in self._slots:
            settled = self._settled
            self._settled = False
            self._departures += 1
            if key in self._early:
                del self._early[key]
            else:
                self._policy.victims(key.__eq__)
            self._free.append(self._slots.pop(key))
            self._settled = settled

    def clear(self) -> None:
        """Nothing is in any slot."""
        self._settled = False
        self._departures += 1
        self._policy.reset()
        self._slots = dict[Key, int]()
        self._early = dict[Key, None]()
        """Those that nobody has asked for yet."""
        self._free = list(range(self._count))
        self._settled = True

    def lend(self) -> Held | None:
        """What there is to know, for another who goes on with the slots; this table counts as empty
        until it hears by :meth:`take_back`. None: of another policy."""
        if not isinstance(self._policy, SegmentedLRU):
            return None
        if not self._settled:
            self.clear()
        self._settled = False
        self._count_early(())
        once, again = ({k: self._slots[k] for k in keys} for keys in self._policy.order())
        return Held(tuple(self._free), once, again)

    def take_back(self, held: Held) -> None:
        """How it is after the other one's work."""
        assert isinstance(self._policy, SegmentedLRU), "nothing else is lent"
        self._settled = False
        self._departures += 1
        self._policy.follow(held.once, held.again)
        self._slots, self._free = {**held.once, **held.again}, list(held.free)
        self._settled = True

    @property
    def protected(self) -> int | None:
        """How many its ``SegmentedLRU`` keeps apart; None: it has another policy."""
        policy = self._policy
        return policy.protected if isinstance(policy, SegmentedLRU) else None

    def _count_early(self, busy: Collection[int]) -> None:
        """Whoever was placed early, and is not ``busy``, counts as asked for."""
        for key in [key for key in self._early if self._slots[key] not in busy]:
            del self._early[key]
            self._policy.touch(key)

    def _make_room(self, count: int, may_go: MayGo, busy: Collection[int]) -> list[int]:
        """Slots that are free, or of those who go."""
        found = list(islice((slot for slot in self._free if slot not in busy), count))
        for slot in found:
            self._free.remove(slot)
        if len(found) < count:
            self._departures += 1
            gone = self._policy.victims(may_go, count - len(found))
            early = list(islice(filter(may_go, self._early), count - len(found) - len(gone)))
            for key in early:
                del self._early[key]
            found += map(self._slots.pop, (*gone, *early))
        return found
