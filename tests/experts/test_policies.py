"""Policies against plain models of themselves, on any sequence of what may happen to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.experts.hits import Belady
from layer_streamer.experts.policies import (
    HALVE_TOKENS,
    POLICIES,
    DecayedLFU,
    FixedSet,
    Key,
    Policy,
    PolicyName,
    SegmentedLRU,
    make_policy,
    most_asked,
)

KEYS = [(layer, expert) for layer in range(2) for expert in range(5)]
KEPT = frozenset([(0, 1), (1, 3), (1, 4)])
PROTECTED, HALVE_EVERY = 3, 7


class PlainLRU:
    """A list, the latest last."""

    def __init__(self) -> None:
        self.order: list[Key] = []

    def touch(self, key: Key) -> None:
        self.order = [other for other in self.order if other != key] + [key]

    def ranked(self) -> list[Key]:
        """Who goes, in order."""
        return self.order

    def remove(self, key: Key) -> None:
        self.order.remove(key)


class PlainSegmented(PlainLRU):
    """Two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.again: list[Key] = []

    def touch(self, key: Key) -> None:
        if key not in self.order + self.again:
            self.order.append(key)
            return
        self.remove(key)
        self.again.append(key)
        if len(self.again) > PROTECTED:
            self.order.append(self.again.pop(0))

    def ranked(self) -> list[Key]:
        return self.order + self.again

    def remove(self, key: Key) -> None:
        (self.order if key in self.order else self.again).remove(key)


class PlainLFU(PlainLRU):
    """Counts by the rule, over the whole history each time."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Key] = []

    def touch(self, key: Key) -> None:
        super().touch(key)
        self.history.append(key)

    def count(self, key: Key) -> int:
        count = 0
        for at, other in enumerate(self.history, 1):
            count += other == key
            if at % HALVE_EVERY == 0:
                count //= 2
        return count

    def ranked(self) -> list[Key]:
        return sorted(self.order, key=lambda key: (self.count(key), self.order.index(key)))


class PlainFixed(PlainLRU):
    def ranked(self) -> list[Key]:
        return sorted(self.order, key=lambda key: key in KEPT)  # the sort is stable


MODELS: dict[str, tuple[Callable[[], Policy], Callable[[], Any]]] = {
    "lru": (lambda: make_policy("lru", 8, 2), PlainLRU),
    "segmented": (lambda: SegmentedLRU(PROTECTED), PlainSegmented),
    "lfu": (lambda: DecayedLFU(HALVE_EVERY), PlainLFU),
    "fixed": (lambda: FixedSet(KEPT), PlainFixed),
}
TOUCH = st.tuples(st.just("touch"), st.sampled_from(KEYS))
STAYING = st.frozensets(st.sampled_from(KEYS), max_size=3)
VICTIMS = st.tuples(
    st.just("victims"), st.tuples(STAYING.map(lambda some: {*KEYS} - some), st.integers(1, 3))
)
RESET = st.tuples(st.just("reset"), st.just(set[Key]()))
LONG = st.lists(TOUCH | TOUCH | TOUCH | TOUCH | VICTIMS, min_size=20, max_size=40)
EVENTS = st.lists(st.just([]) | LONG | RESET.map(lambda event: [event]), max_size=4).map(
    lambda parts: (
        [event for part in parts for event in part] + [("victims", ({*KEYS}, 1))] * len(KEYS)
    )
)
"""In the end all are taken out: whatever order they were in shows."""


def taken_out(policy: Policy, may_go: set[Key]) -> list[Key]:
    """All that may go, in the order in which they do."""
    taken = []
    while gone := policy.victims(may_go.__contains__):
        taken += gone
    return taken


def test_every_policy_has_a_plain_model() -> None:
    assert set(MODELS) == set(POLICIES)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=40)
@given(events=EVENTS)
def test_a_policy_does_what_its_plain_model_does(name: str, events: list[Any]) -> None:
    make, make_model = MODELS[name]
    policy, model = make(), make_model()
    for what, of in events:
        if what == "touch":
            policy.touch(of)
            model.touch(of)
        elif what == "reset":
            policy.reset()
            model = make_model()
        else:
            may_go, count = of
            expected = [key for key in model.ranked() if key in may_go][:count]
            assert policy.victims(may_go.__contains__, count) == expected
            for key in expected:
                model.remove(key)


@given(touched=st.lists(st.sampled_from(KEYS), max_size=40), staying=STAYING)
def test_all_that_were_touched_and_nobody_else_can_be_taken_out_once(
    touched: list[Key], staying: frozenset[Key]
) -> None:
    makers = [make for make, _ in MODELS.values()]
    for policy in [*(make() for make in makers), Belady(touched)]:
        for key in touched:
            policy.touch(key)
        taken = taken_out(policy, {*KEYS} - staying)
        assert sorted(taken) == sorted({*touched} - staying)
        taken += taken_out(policy, {*KEYS})
        assert sorted(taken) == sorted({*touched})


@pytest.mark.parametrize("name", POLICIES)
def test_only_those_that_must_stay_are_asked_about_in_vain(name: PolicyName) -> None:
    """However many there are: a victim takes no longer in a large pool."""
    policy = make_policy(name, 4000, 8)
    for expert in range(4000):
        policy.touch((0, expert))
    asked: list[Key] = []

    def may_go(key: Key) -> bool:
        asked.append(key)
        return len(asked) > 8

    assert policy.victims(may_go) == asked[-1:]
    assert len(asked) == 9


def test_counts_of_what_is_long_past_are_not_kept() -> None:
    policy = DecayedLFU(10)
    for expert in range(100_000):
        policy.touch((0, expert))
        policy.victims(lambda key: True)
    assert sum(policy._counts.values()) <= 20
    assert len(policy._counts) + len(policy._by_count) + len(policy._held) < 40


def test_an_old_favourite_goes_once_it_has_not_been_asked_for_long_enough() -> None:
    """Which a count that never decays would not see."""
    policy = DecayedLFU(16)
    for _ in range(16):
        policy.touch((0, 0))  # counts 8 once halved
    for _ in range(3):
        for expert in range(1, 5):
            for _ in range(4):
                policy.touch((0, expert))
    assert policy.victims(lambda key: True) == [(0, 0)]


def test_one_scan_of_all_experts_leaves_what_is_asked_for_again_in_place() -> None:
    policy = SegmentedLRU(4)
    for _ in range(2):
        for expert in range(4):
            policy.touch((0, expert))
    gone = []
    for expert in range(100, 200):
        policy.touch((0, expert))
        gone += policy.victims(lambda key: True)
    assert gone == [(0, expert) for expert in range(100, 200)]


@given(counts=st.dictionaries(st.sampled_from(KEYS), st.integers(0, 4)), slots=st.integers(1, 20))
def test_a_fixed_set_is_those_asked_for_most_in_half_of_the_slots(
    counts: dict[Key, int], slots: int
) -> None:
    kept = most_asked(counts, slots // 2)
    assert len(kept) == min(slots // 2, len(counts))
    least = min((counts[key] for key in kept), default=0)
    assert all(counts[key] <= least for key in counts.keys() - {*kept}) or not kept
    policy = make_policy("fixed", slots, 1, counts)
    for key in KEYS:
        policy.touch(key)
    order = taken_out(policy, {*KEYS})
    assert order == [k for k in KEYS if k not in kept] + [k for k in KEYS if k in kept]


def test_frequencies_are_halved_after_so_many_tokens_not_touches() -> None:
    """However many experts a token asks for."""

    def touches(asked_a_token: int) -> int:
        policy = make_policy("lfu", 8, asked_a_token)
        assert isinstance(policy, DecayedLFU)
        for number in range(10**6):
            policy.touch((0, 0))
            if policy._counts[0, 0] != number + 1:
                return number + 1
        return 0

    assert [touches(count) for count in (1, 8)] == [HALVE_TOKENS, 8 * HALVE_TOKENS]


@given(touched=st.lists(st.sampled_from(KEYS), max_size=200), halve_every=st.integers(1, 9))
def test_the_sum_of_all_counts_stays_below_twice_what_they_are_halved_after(
    touched: list[Key], halve_every: int
) -> None:
    policy, most = DecayedLFU(halve_every), Counter[str]()
    for key in touched:
        policy.touch(key)
        most["sum"] = max(most["sum"], sum(policy._counts.values()))
    assert most["sum"] <= 2 * halve_every
