"""Hits that are counted: as a plain model counts them, and never more than there can be."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.experts.hits import Belady, count_hits, in_rounds, most_hits
from layer_streamer.experts.policies import POLICIES, Key, PolicyName, make_policy

KEYS = [(0, expert) for expert in range(6)]


def steps_of(most: int, most_steps: int) -> Any:
    one = st.lists(st.sampled_from(KEYS), max_size=most, unique=True)
    return st.lists(one, max_size=most_steps)


def best(steps: list[list[Key]], slots: int) -> int:
    """By trying everything: what may be in the pool after each round, with the most hits so far."""
    states = {frozenset[Key](): 0}
    for keys in in_rounds(steps, slots):
        after = dict[frozenset[Key], int]()
        for held, hits in states.items():
            others = held - {*keys}
            for kept in combinations(others, min(len(others), slots - len(keys))):
                state = frozenset(kept).union(keys)
                after[state] = max(after.get(state, 0), hits + len(held.intersection(keys)))
        states = after
    return max(states.values())


@given(steps=steps_of(4, 12), slots=st.integers(1, 5))
def test_beladys_hits_are_the_most_that_can_be(steps: list[list[Key]], slots: int) -> None:
    assert most_hits(steps, slots) == best(steps, slots)


@pytest.mark.parametrize("name", POLICIES)
@given(steps=steps_of(5, 40), slots=st.integers(1, 8), data=st.data())
def test_no_policy_has_more_hits_than_belady(
    name: PolicyName, steps: list[list[Key]], slots: int, data: st.DataObject
) -> None:
    counts = data.draw(st.dictionaries(st.sampled_from(KEYS), st.integers(0, 9)))
    hits = count_hits(steps, slots, make_policy(name, slots, 2, counts))
    assert 0 <= hits <= most_hits(steps, slots)


@given(steps=steps_of(5, 30), slots=st.integers(1, 8))
def test_hits_of_lru_are_those_of_a_list(steps: list[list[Key]], slots: int) -> None:
    held: list[Key] = []
    hits = 0
    for keys in in_rounds(steps, slots):
        for key in keys:
            hits += key in held
            if key in held:
                held.remove(key)
            elif len(held) == slots:
                held.remove(next(other for other in held if other not in keys))
            held.append(key)
    assert count_hits(steps, slots, make_policy("lru", slots, 2)) == hits


@pytest.mark.parametrize("name", POLICIES)
def test_where_all_experts_have_a_slot_each_is_missed_once(name: PolicyName) -> None:
    steps = [KEYS[at : at + 2] for at in range(4)] * 10
    policy = make_policy(name, len(KEYS), 2)
    assert count_hits(steps, len(KEYS), policy) == 2 * len(steps) - 5


def test_a_cycle_that_is_one_too_long_defeats_lru_and_not_belady() -> None:
    steps = [[key] for key in KEYS] * 20
    assert count_hits(steps, 5, make_policy("lru", 5, 1)) == 0
    # After the first round one of five is missed.
    assert most_hits(steps, 5) > 0.75 * len(steps)


def test_a_step_of_more_experts_than_slots_is_taken_in_rounds() -> None:
    assert list(in_rounds([KEYS[:5], KEYS[:1], []], 2)) == [
        KEYS[:2], KEYS[2:4], KEYS[4:5], KEYS[:1],
    ]  # fmt: skip


def test_belady_begins_anew_after_a_reset() -> None:
    steps = [[key] for key in (KEYS[0], KEYS[1], KEYS[2], KEYS[0])] * 3
    policy = Belady(key for keys in steps for key in keys)
    first = count_hits(steps, 2, policy)
    policy.reset()
    assert count_hits(steps, 2, policy) == first == most_hits(steps, 2)
