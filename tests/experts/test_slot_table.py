"""The slots of a pool: whoever is asked for has one of its own, and keeps it while it is needed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interrupter import Interrupt, Interrupter

from layer_streamer.errors import ConfigError
from layer_streamer.experts.policies import POLICIES, Key, PolicyName, make_policy
from layer_streamer.experts.slots import Placing, SlotTable

KEYS = [(layer, expert) for layer in range(2) for expert in range(6)]
STEPS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(KEYS), max_size=6, unique=True),
        st.frozensets(st.integers(0, 5), max_size=4),
        st.booleans(),
    ),
    max_size=20,
)


@given(steps=STEPS, name=st.sampled_from(POLICIES), data=st.data())
def test_every_expert_has_a_slot_of_its_own_and_only_a_hit_needs_no_filling(
    steps: list[Any], name: PolicyName, data: st.DataObject
) -> None:
    table, inside = SlotTable(6, make_policy(name, 6, 2)), dict[int, Key]()
    for keys, busy, asked in steps:
        before = dict(inside)
        try:
            placed = table.place(keys, busy, asked=asked)
        except ConfigError:
            assert len(keys) > 6 - len(busy - {s for s, key in before.items() if key in keys})
        else:
            assert len(set(placed.slots)) == len(keys) == len(placed.slots)
            for at, (key, slot) in enumerate(zip(keys, placed.slots, strict=True)):
                assert (before.get(slot) == key) == (at not in placed.missing)
                assert slot not in busy or at not in placed.missing
                inside[slot] = key
            table.settle()
        if data.draw(st.booleans()) and inside:
            slot = data.draw(st.sampled_from(sorted(inside)))
            table.drop(inside.pop(slot))
        assert {key for key in KEYS if key in table} == set(inside.values())


def place(table: SlotTable, keys: list[Key], busy: Any = ()) -> Placing:
    placed = table.place(keys, busy)
    table.settle()
    return placed


@given(
    steps=st.lists(st.sets(st.sampled_from(KEYS), min_size=1, max_size=4)),
    data=st.data(),
    name=st.sampled_from(POLICIES[:2]),
)
def test_bringing_early_what_is_asked_for_next_counts_as_nothing(
    steps: list[set[Key]], data: st.DataObject, name: PolicyName
) -> None:
    # Of "segmented", too, where no more are kept apart than there are slots.
    plain, early = (SlotTable(8, make_policy(name, 10, 2)) for _ in range(2))
    for step in steps:
        keys = sorted(step)
        there = early.there(keys)
        missing = [key for key in keys if key not in there]
        some = data.draw(st.integers(0, len(missing)))
        early.place(missing[:some], there.values(), asked=False)
        early.settle()
        place(plain, keys)
        place(early, keys)
        assert [key in plain for key in KEYS] == [key in early for key in KEYS]


def test_going_through_all_of_them_early_leaves_those_that_were_asked_for_again() -> None:
    table = SlotTable(10, make_policy("segmented", 10, 2))
    favourites = KEYS[:6]
    place(table, favourites)
    place(table, favourites)
    for key in KEYS[6:] * 3:
        table.place([key], asked=False)
        table.settle()
        place(table, [key])
    assert place(table, favourites).missing == ()


def test_what_is_early_and_never_asked_for_goes_in_its_turn() -> None:
    table = SlotTable(3, make_policy("lru", 3, 2))
    for early, asked in ((KEYS[0], KEYS[1]), (KEYS[2], KEYS[3]), (KEYS[4], KEYS[5])):
        table.place([early], asked=False)
        table.settle()
        place(table, [asked])
    assert [KEYS.index(key) for key in KEYS if key in table] == [2, 4, 5]


def test_what_is_early_gives_way_to_what_is_asked_for_when_nobody_else_can() -> None:
    table = SlotTable(2, make_policy("segmented", 2, 2))
    table.place(KEYS[:2], asked=False)
    table.settle()
    assert place(table, KEYS[2:3], busy={1}).slots == (0,)
    assert place(table, KEYS[3:4], busy={0}).slots == (1,)


def test_more_experts_at_once_than_slots_change_nothing() -> None:
    table = SlotTable(3, make_policy("lru", 3, 2))
    place(table, KEYS[:3])
    with pytest.raises(ConfigError, match="3 experts at once, 3 slots, 1 of them busy"):
        table.place(KEYS[2:5], busy={0})
    with pytest.raises(ConfigError, match="4 experts at once, 3 slots, 0 of them busy"):
        table.place(KEYS[:4])
    assert place(table, KEYS[:3]).missing == ()


def test_a_dropped_expert_is_missing_when_it_is_asked_for_again() -> None:
    table = SlotTable(3, make_policy("segmented", 3, 2))
    first = place(table, KEYS[:3]).slots
    table.drop(KEYS[1])
    table.drop(KEYS[1])
    again = place(table, KEYS[:3])
    assert (again.slots, again.missing) == (first, (1,))


def test_a_cleared_table_is_as_a_new_one() -> None:
    table = SlotTable(4, make_policy("lfu", 4, 2))
    first = [place(table, KEYS[at : at + 3]) for at in range(5)]
    table.clear()
    assert not any(key in table for key in KEYS)
    assert [place(table, KEYS[at : at + 3]) for at in range(5)] == first


def test_what_was_placed_and_never_settled_is_in_no_slot() -> None:
    """Its copies may not have been begun."""
    table = SlotTable(4, make_policy("lru", 4, 2))
    place(table, KEYS[:2])
    table.place(KEYS[1:3])
    assert not any(key in table for key in KEYS)
    assert place(table, KEYS[:3]).missing == (0, 1, 2)
    table.place(KEYS[2:5])
    table.drop(KEYS[3])
    assert place(table, KEYS[:3]).missing == (0, 1, 2)


@pytest.mark.parametrize(
    "name", [POLICIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in POLICIES[1:])]
)
def test_an_interrupt_at_any_bytecode_leaves_no_hit_that_is_none(name: PolicyName) -> None:
    steps = [KEYS[0:3], KEYS[2:5], KEYS[0:3], [KEYS[5], KEYS[0]], KEYS[6:9], KEYS[9:12]]

    def use(table: SlotTable, inside: dict[int, Key]) -> None:
        """As whoever fills the slots does; what is in a slot was written there."""
        for keys in steps:
            placed = table.place(keys)
            for at, (key, slot) in enumerate(zip(keys, placed.slots, strict=True)):
                if at in placed.missing:
                    inside[slot] = key
                assert inside[slot] == key
            assert len(set(placed.slots)) == len(keys)
            table.settle()
        table.drop(KEYS[10])
        del inside[next(slot for slot, key in inside.items() if key == KEYS[10])]
        table.clear()

    number, fired = 0, True
    while fired:
        table = SlotTable(5, make_policy(name, 5, 2))
        inside = dict[int, Key]()
        try:
            with Interrupter(number, "opcode") as interrupter:
                use(table, inside)
        except Interrupt:
            pass
        fired = interrupter.fired
        use(table, inside)
        number += 1
    assert number > 500
