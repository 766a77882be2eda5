"""Which steps stay in a memory for good: those that spare the most bytes a pass. Pure arithmetic.

Slots are paid first, and how large they are depends on what is left to stream. So the search goes
over the sizes that slots may have, and over the sets of devices that may stream at all: whatever is
larger than the slots, or belongs to another device, has to be resident, and what else can be is a
knapsack problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from operator import mul

from ..errors import ConfigError
from .budget import format_bytes
from .knapsack import Stock, bound_gain, fill, sum_gain

MAX_TRIED = 50_000
"""How many combinations are tried before the rest is filled greedily (some 50 ms)."""
MAX_OPTIONS = 2_000
"""Up to this many sets of devices times kinds, every set and every slot size is looked at."""
FEW_OPTIONS = 8
"""How many slot sizes are looked at beyond that, those with the smallest slots first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One step, as a candidate for one memory; bytes."""

    nbytes: int
    """What it takes as a resident."""
    spared_nbytes: int
    """What need not be moved each pass if it is one."""
    slot_nbytes: int
    """How large a slot it needs if it is none."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What may be used of one memory, by one device or shared by several; bytes."""

    name: str
    """The setting that limits it, for the message: "host_budget"."""
    owner: str
    """Whose memory it is, for the message: "device 1"."""
    budget: int
    slots: int
    """Slots of each device that streams through it, all as large as the largest step streamed.

    A device that streams fewer steps is charged one slot for each of them.
    """
    scratch_nbytes: int = 0
    """One buffer more for each device that streams through it."""
    reserve: int = 0
    """The part of ``budget`` that is the caller's."""

    @property
    def available(self) -> int:
        return self.budget - self.reserve


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Equal candidates, taken together; the largest slots first."""

    kinds: list[Candidate]
    sizes: list[int]
    """By kind, what a resident takes."""
    gains: list[int]
    """By kind, what one more resident is worth: the bytes, and among equals the number of steps."""
    members: list[list[int]]
    """By kind: its steps, in order."""
    counts: dict[int, list[int]]
    """By device: how many steps of each kind it has."""
    num_devices: int


@dataclass(frozen=True, slots=True)
class _Option:
    """One slot size for one set of devices; every other step is resident."""

    streaming: tuple[int, ...]
    """The devices that may stream."""
    counts: list[int]
    """By kind: how many steps these have."""
    first: int
    """Kinds from this one on may be streamed."""
    own_slots: bool
    """There are fewer steps streamed than slots: each is charged its own."""
    resident_nbytes: int
    """What has to be resident."""
    num_slots: int
    slot_nbytes: int
    scratch_nbytes: int

    @property
    def overhead(self) -> int:
        return self.num_slots * self.slot_nbytes + self.scratch_nbytes

    @property
    def least(self) -> int:
        """Bytes that it takes with no more residents than it must have."""
        return self.resident_nbytes + self.overhead

    def stocks(self, table: _Kinds) -> Iterator[tuple[int, Stock]]:
        """By kind that may be streamed: what one resident of it takes more than streamed."""
        for kind in range(self.first, len(self.counts)):
            nbytes = table.sizes[kind] - self.own_slots * self.slot_nbytes
            if self.counts[kind] and (nbytes > 0 or not self.own_slots):
                yield kind, Stock(nbytes, table.gains[kind], self.counts[kind])


def choose_residents(steps: Mapping[int, Candidate], num_devices: int, memory: Memory) -> set[int]:
    """The steps that are resident, so that the spared bytes are as many as ``memory`` permits.

    ``steps``: the candidates by their numbers; step i is on device i modulo ``num_devices``. Among
    equal steps the residents are spread evenly. Exact for few kinds of steps (at most MAX_TRIED
    combinations); with many, what fits is filled in, largest or most sparing first. Errors:
    ConfigError, naming the setting and the bound, if not even the slots fit.
    """
    total = sum(step.nbytes for step in steps.values())
    if total <= memory.available:
        return set(steps)
    table = _tabulate(steps, num_devices)
    lost, resident = _search(table, memory)
    if lost == math.inf:
        raise _refusal(memory, _options(table, memory), total)
    levelled = _level(steps)
    if levelled != steps:
        levelled_lost, spread = _search(_tabulate(levelled, num_devices), memory)
        if levelled_lost == lost:
            return spread
    return resident


def _level(steps: Mapping[int, Candidate]) -> dict[int, Candidate]:
    """Steps that spare the same are taken to be as large as the largest of them.

    Equal layers differ by a page or so, by how they lie in their file. Where that makes no
    difference to how many fit, they should be spread as what they are: equal.
    """
    largest: dict[int, Candidate] = {}
    for step in steps.values():
        known = largest.setdefault(step.spared_nbytes, step)
        if step.nbytes > known.nbytes or step.slot_nbytes > known.slot_nbytes:
            nbytes = max(step.nbytes, known.nbytes)
            slot_nbytes = max(step.slot_nbytes, known.slot_nbytes)
            largest[step.spared_nbytes] = Candidate(nbytes, step.spared_nbytes, slot_nbytes)
    return {i: largest[step.spared_nbytes] for i, step in steps.items()}


def _tabulate(steps: Mapping[int, Candidate], num_devices: int) -> _Kinds:
    members: dict[Candidate, list[int]] = {}
    for i, step in steps.items():
        members.setdefault(step, []).append(i)
    kinds = sorted(members, key=lambda kind: (kind.slot_nbytes, kind.nbytes), reverse=True)
    counts = {device: [0] * len(kinds) for device in sorted({i % num_devices for i in steps})}
    for k, kind in enumerate(kinds):
        for i in members[kind]:
            counts[i % num_devices][k] += 1
    sizes = [kind.nbytes for kind in kinds]
    gains = [kind.spared_nbytes * (len(steps) + 1) + 1 for kind in kinds]
    return _Kinds(kinds, sizes, gains, [members[kind] for kind in kinds], counts, num_devices)


def _is_small(table: _Kinds) -> bool:
    return len(table.kinds) << len(table.counts) <= MAX_OPTIONS


def _streaming_sets(table: _Kinds) -> Iterator[tuple[int, ...]]:
    """Sets of devices that may stream; of sets with equal steps, one."""
    weights = {device: sum(map(mul, n, table.sizes)) for device, n in table.counts.items()}
    by_weight = sorted(weights, key=weights.__getitem__)
    seen = set()
    for size in range(1, len(by_weight) + 1):
        # With too many sets to try, the devices that are lightest to hold are resident first.
        sets = combinations(by_weight, size) if _is_small(table) else [tuple(by_weight[-size:])]
        for streaming in sets:
            signature = tuple(sorted(tuple(table.counts[device]) for device in streaming))
            if signature not in seen:
                seen.add(signature)
                yield streaming


def _options(table: _Kinds, memory: Memory) -> Iterator[_Option]:
    total = sum(table.sizes[k] * len(members) for k, members in enumerate(table.members))
    for streaming in _streaming_sets(table):
        counts = [sum(column) for column in zip(*(table.counts[d] for d in streaming), strict=True)]
        scratch = memory.scratch_nbytes * len(streaming)
        resident = total - sum(map(mul, counts, table.sizes))
        previous = -1
        for first, kind in enumerate(table.kinds):
            slot = kind.slot_nbytes
            if counts[first] and slot != previous:
                previous = slot
                slots = memory.slots * len(streaming)
                option = _Option(streaming, counts, first, False, resident, slots, slot, scratch)
                yield option
                if _is_small(table):
                    yield from _with_own_slots(option, table)
            resident += counts[first] * kind.nbytes


def _with_own_slots(option: _Option, table: _Kinds) -> Iterator[_Option]:
    """The option for fewer steps than slots, where that can be smaller than holding them all."""
    resident, num_slots = option.resident_nbytes, 0
    for kind in range(option.first, len(table.kinds)):
        if table.sizes[kind] > option.slot_nbytes:
            num_slots += option.counts[kind]
        else:
            resident += option.counts[kind] * table.sizes[kind]
    if num_slots:
        yield replace(option, own_slots=True, resident_nbytes=resident, num_slots=num_slots)


def _search(table: _Kinds, memory: Memory) -> tuple[float, set[int]]:
    """The steps that are resident where the least gain is lost, and how much: infinitely much if no
    option is feasible."""
    feasible = [option for option in _options(table, memory) if option.least <= memory.available]
    feasible.sort(key=lambda option: option.overhead)
    least, resident = math.inf, set[int]()
    tries = MAX_TRIED
    for option in feasible if _is_small(table) else feasible[:FEW_OPTIONS]:
        by_kind = dict(option.stocks(table))
        stocks = list(by_kind.values())
        most = sum(stock.gain * stock.count for stock in stocks)
        left = memory.available - option.least
        if most - bound_gain(stocks, left) >= least:
            continue
        counts, tried = fill(stocks, left, tries)
        tries -= tried
        lost = most - sum_gain(stocks, counts)
        if lost < least:
            least, resident = lost, _spread(table, option, dict(zip(by_kind, counts, strict=True)))
    return least, resident


def _spread(table: _Kinds, option: _Option, counts: dict[int, int]) -> set[int]:
    """The residents: ``counts`` of each kind, spread over the steps that may be streamed."""
    resident = {i for members in table.members for i in members}
    for kind, count in counts.items():
        members = [i for i in table.members[kind] if i % table.num_devices in option.streaming]
        kept = spread_evenly(count, len(members))
        resident.difference_update(i for n, i in enumerate(members) if n not in kept)
    return resident


def spread_evenly(count: int, total: int) -> frozenset[int]:
    """``count`` of the positions 0 to ``total`` - 1, each in the middle of an equal stretch.

    The gaps between them, that from the last one round to the first included, differ by at most
    one: passes follow each other.
    """
    return frozenset((2 * i + 1) * total // (2 * count) for i in range(count))


def _refusal(memory: Memory, options: Iterable[_Option], total: int) -> ConfigError:
    least, parts = total, [f"{format_bytes(total)} with every step resident"]
    option = min(options, key=lambda option: option.least, default=None)
    if option is not None and option.least < total:
        slots = f"{option.num_slots} slot{'s' if option.num_slots > 1 else ''}"
        least, parts = option.least, [f"{slots} of {format_bytes(option.slot_nbytes)}"]
        if option.scratch_nbytes:
            parts.append(f"{format_bytes(option.scratch_nbytes)} for casts")
        if option.resident_nbytes:
            parts.append(f"{format_bytes(option.resident_nbytes)} of resident steps")
    if memory.reserve:
        least += memory.reserve
        parts.append(f"{format_bytes(memory.reserve)} reserved")
    return ConfigError(
        f"{memory.name}={memory.budget} ({format_bytes(memory.budget)}): {memory.owner} needs at "
        f"least {least} bytes ({format_bytes(least)}): {', '.join(parts)}"
    )
