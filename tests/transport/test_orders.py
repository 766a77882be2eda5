"""The steps of runs whose passes turn: which layer each is, where it lies, what is brought."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.transport.schedule import Orders, SlotUse
from layer_streamer.transport.stage import Heading

PASSES = 6
HEADINGS = st.builds(Heading, st.booleans(), st.booleans())


@st.composite
def made_orders(draw: st.DrawFn) -> tuple[Orders, SlotUse, dict[int, int]]:
    """Orders of a lane of up to 12 steps, its use of slots, and the parts of what is read."""
    length = draw(st.integers(1, 12))
    used = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1)))
    in_place = draw(st.booleans())
    read = used if in_place else [i for i in used if draw(st.booleans())]
    parts = {i: 1 if in_place else draw(st.integers(0, 3)) for i in read}
    slots = SlotUse(used, draw(st.integers(1, 5)), in_place)
    layouts: Any = [None] * length
    return Orders(layouts, draw(HEADINGS), slots, parts), slots, parts


def heading_of(orders: Orders) -> Heading:
    return orders._heading


def steps(orders: Orders) -> range:
    return range(PASSES * orders.length)


@given(made_orders())
def test_every_pass_comes_to_every_layer_once_and_goes_the_way_that_its_heading_says(
    made: Any,
) -> None:
    orders, *_ = made
    for p in range(PASSES):
        way = [orders.index(p * orders.length + place) for place in range(orders.length)]
        ahead = [*range(orders.length)]
        assert way == (ahead[::-1] if heading_of(orders).goes_back(p) else ahead)


@given(made_orders())
def test_what_is_not_brought_lies_in_its_slot_and_no_slot_is_filled_before_it_is_free(
    made: Any,
) -> None:
    orders, used, _ = made
    lies: dict[int, int] = {}
    last_use: dict[int, int] = {}
    for number in steps(orders):
        n, index = orders.copied.find(number), orders.index(number)
        assert (n is not None) == (index in used.indices)
        if n is None:
            assert not orders.kept(number)
            continue
        slot = orders.slot(n)
        if orders.kept(number):
            assert lies[slot] == index
        else:
            # The one who fills it waits until all but the last slots' steps are given back.
            assert last_use.get(slot, n - used.num_slots) <= n - used.num_slots
        lies[slot], last_use[slot] = index, n


@given(made_orders())
def test_a_turn_spares_as_many_layers_as_there_are_slots(
    made: Any,
) -> None:
    orders, used, _ = made
    count = Counter(number // orders.length for number in steps(orders) if orders.kept(number))
    spared = min(used.num_slots, len(used.indices)) if heading_of(orders).turns else 0
    assert [count[p] for p in range(PASSES)] == [0, *[spared] * (PASSES - 1)]


@given(made_orders())
def test_readers_count_the_parts_of_what_is_brought_in_the_order_of_the_steps(made: Any) -> None:
    orders, used, parts = made
    expected = []
    for number in steps(orders):
        if used.in_place or not orders.kept(number):
            expected += [number] * parts.get(orders.index(number), 0)
    assert all(orders.read.has(k) for k in range(len(expected)))
    assert [orders.read.number(k) for k in range(len(expected))] == expected
    for number in steps(orders):
        before = sum(some < number for some in expected)
        assert orders.read.before(number) == before
        assert orders.read.find(number) == (before if number in expected else None)
    ends = {sum(some < p * orders.length for some in expected) for p in range(PASSES + 1)}
    assert {done for done in range(len(expected)) if orders.read.ends(done)} == {
        done for done in ends if done < len(expected)
    }
    if orders.read.count == 0:
        assert not orders.read.has(len(expected))
