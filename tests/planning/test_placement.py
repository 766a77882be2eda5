"""Which step lives where: against every choice there is, and against what even spread promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.errors import ConfigError
from layer_streamer.planning.placement import (
    Budget,
    Placement,
    Slots,
    StepSize,
    place,
)
from layer_streamer.planning.residency import spread_evenly

LAYER = StepSize(*[100] * 5)
NO_LIMIT = Budget(device=(None,), host=None, device_slots=3, host_slots=5)
UNIFIED = replace(NO_LIMIT, host_slots=0, shared=True)


def sized(nbytes: int) -> StepSize:
    return StepSize(*[nbytes] * 5)


def chosen(placement: Placement, *tiers: str) -> list[int]:
    return [i for i, tier in enumerate(placement.tiers) if tier in tiers]


def subsets(steps: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    for mask in range(1 << len(steps)):
        kept = [i for bit, i in enumerate(steps) if mask >> bit & 1]
        yield kept, [i for bit, i in enumerate(steps) if not mask >> bit & 1]


def device_cost(
    sizes: Sequence[StepSize], budget: Budget, kept: list[int], streamed: list[int]
) -> int:
    cost = sum(sizes[i].device_nbytes for i in kept)
    if streamed:
        slot = max(sizes[i].slot_nbytes for i in streamed)
        cost += min(budget.device_slots, len(streamed)) * slot + budget.scratch_nbytes
    return cost


def host_cost(
    sizes: Sequence[StepSize], budget: Budget, num_devices: int, kept: list[int], read: list[int]
) -> int:
    slot = max((sizes[i].host_nbytes for i in read), default=0)
    slots = budget.host_slots * len({i % num_devices for i in read})
    return sum(sizes[i].host_nbytes for i in kept) + slots * slot


SMALL = st.integers(0, 12)
SIZES = st.one_of(
    st.builds(StepSize, SMALL, SMALL, SMALL, SMALL, SMALL),
    SMALL.map(sized),
    # A cast that widens: resident, it takes more than the slot it is streamed through.
    st.builds(StepSize, st.just(12), st.just(6), st.just(6), st.just(6), st.just(6)),
)
STEPS = st.lists(SIZES, min_size=1, max_size=4).flatmap(
    lambda kinds: st.lists(st.sampled_from(kinds), min_size=1, max_size=10)
)


@st.composite
def budgets(draw: st.DrawFn, num_devices: int) -> Budget:
    return Budget(
        device=tuple(draw(st.integers(0, 70)) for _ in range(num_devices)),
        host=draw(st.integers(0, 120)),
        device_slots=draw(st.integers(1, 4)),
        host_slots=draw(st.integers(1, 4)),
        scratch_nbytes=draw(st.sampled_from([0, 5])),
    )


@settings(deadline=None, max_examples=200)
@given(sizes=STEPS, num_devices=st.integers(1, 3), data=st.data())
def test_no_other_choice_on_a_device_spares_more_copies_or_needs_less(
    sizes: list[StepSize], num_devices: int, data: st.DataObject
) -> None:
    budget = replace(data.draw(budgets(num_devices)), host=None)
    choices = [
        [(device_cost(sizes, budget, *c), c[0]) for c in subsets(range(d, len(sizes), num_devices))]
        for d in range(num_devices)
    ]
    least = [min(cost for cost, _ in found) for found in choices]
    short = [d for d, limit in enumerate(budget.device) if least[d] > limit]
    if short:
        with pytest.raises(ConfigError, match=f"needs at least {least[short[0]]} bytes"):
            place(sizes, budget)
        return
    placement = place(sizes, budget)
    for device, (limit, found) in enumerate(zip(budget.device, choices, strict=True)):
        held = [i for i in chosen(placement, "device") if i % num_devices == device]
        spared = max(sum(sizes[i].copy_nbytes for i in k) for cost, k in found if cost <= limit)
        assert sum(sizes[i].copy_nbytes for i in held) == spared
        assert (placement.device_bytes[device], held) in found
        assert placement.device_bytes[device] <= limit


@settings(deadline=None, max_examples=200)
@given(sizes=STEPS, num_devices=st.integers(1, 3), data=st.data())
def test_no_other_choice_in_host_memory_spares_more_reads_or_needs_less(
    sizes: list[StepSize], num_devices: int, data: st.DataObject
) -> None:
    budget = data.draw(budgets(num_devices))
    # Large enough for all slots, or no residents at all.
    device = tuple(n + 53 if n < 50 else None for n in budget.device)
    budget = replace(budget, device=device)
    first = place(sizes, replace(budget, host=None))
    choices = [
        (host_cost(sizes, budget, num_devices, *c), c[0]) for c in subsets(chosen(first, "disk"))
    ]
    least = min(cost for cost, _ in choices)
    if least > budget.host:
        with pytest.raises(ConfigError, match=f"needs at least {least} bytes"):
            place(sizes, budget)
        return
    spared = max(sum(sizes[i].read_nbytes for i in k) for cost, k in choices if cost <= budget.host)
    placement = place(sizes, budget)
    kept = chosen(placement, "host")
    assert chosen(placement, "device") == chosen(first, "device")
    assert sum(sizes[i].read_nbytes for i in kept) == spared
    assert (placement.host_bytes, kept) in choices
    assert placement.host_bytes <= budget.host


@settings(deadline=None)
@given(sizes=STEPS, num_devices=st.integers(1, 3), data=st.data())
def test_on_a_unified_device_residents_spare_reads_and_share_one_budget(
    sizes: list[StepSize], num_devices: int, data: st.DataObject
) -> None:
    drawn = data.draw(budgets(1))
    (limit,) = drawn.device
    budget = replace(drawn, device=(None,) * num_devices, host=limit, host_slots=0, shared=True)
    try:
        placement = place(sizes, budget)
    except ConfigError:
        total = sum(size.device_nbytes for size in sizes)
        slots = num_devices * (12 * budget.device_slots + budget.scratch_nbytes)
        assert limit < min(total, slots)
        return
    assert sum(placement.device_bytes) <= limit
    assert placement.host_bytes == 0
    assert not chosen(placement, "host")
    assert all(slots.count == 0 for slots in placement.host_slots)
    if num_devices == 1:
        steps = range(len(sizes))
        spared = [sum(sizes[i].read_nbytes for i in chosen(placement, "device"))]
        for kept, streamed in subsets(steps):
            if device_cost(sizes, budget, kept, streamed) <= limit:
                spared.append(sum(sizes[i].read_nbytes for i in kept))
        assert spared[0] == max(spared)


def test_on_a_unified_device_the_step_with_more_to_read_is_resident() -> None:
    sizes = [replace(LAYER, read_nbytes=n, copy_nbytes=200 - n) for n in (50, 150, 50)]
    budget = replace(UNIFIED, host=200, device_slots=1)
    assert chosen(place(sizes, budget), "device") == [1]


def test_unified_devices_have_slots_of_one_size_and_a_cast_slot_each() -> None:
    sizes = [sized(100), sized(300)] * 4
    least = 2 * (300 + 50)
    budget = replace(UNIFIED, device=(None, None), host=least, device_slots=1, scratch_nbytes=50)
    placement = place(sizes, budget)
    assert placement.device_slots == (Slots(1, 300), Slots(1, 300))
    assert placement.device_bytes == (350, 350)
    with pytest.raises(ConfigError, match=f"needs at least {least} bytes"):
        place(sizes, replace(budget, host=least - 1))


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_of_28_equal_layers_less_than_one_fits_into_what_is_left(num_devices: int) -> None:
    for nbytes in range(300, 2900, 10):
        budget = Budget((nbytes,) * num_devices, None, device_slots=3, host_slots=5)
        placement = place([LAYER] * 28, budget)
        for device, used in enumerate(placement.device_bytes):
            steps = range(device, 28, num_devices)
            assert used == 100 * len(steps) or nbytes - 100 < used <= nbytes
    for nbytes in range(500 * num_devices, 2900, 10):
        budget = Budget((None,) * num_devices, nbytes, device_slots=3, host_slots=5)
        placement = place([LAYER] * 28, budget)
        assert placement.host_bytes == 2800 or nbytes - 100 < placement.host_bytes <= nbytes


@settings(deadline=None)
@given(
    nbytes=st.lists(st.integers(1, 10**6), min_size=30, max_size=60),
    share=st.floats(0, 1),
    num_devices=st.integers(1, 3),
)
def test_of_many_sizes_the_smallest_one_streamed_does_not_fit_into_what_is_left(
    nbytes: list[int], share: float, num_devices: int
) -> None:
    sizes = [sized(n) for n in nbytes]
    limit = 3 * num_devices * max(nbytes) + int(share * sum(nbytes))
    budget = Budget((limit,) * num_devices, None, device_slots=3, host_slots=5)
    placement = place(sizes, budget)
    for device, used in enumerate(placement.device_bytes):
        streamed = [nbytes[i] for i in chosen(placement, "disk") if i % num_devices == device]
        assert used <= limit
        assert limit - used < min(streamed, default=limit + 1)


def cyclic_gaps(positions: Sequence[int], total: int) -> set[int]:
    return {b - a for a, b in pairwise([*positions, positions[0] + total])}


@settings(deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))))
def test_gaps_differ_by_one_at_most_and_nothing_is_bunched_at_an_end(
    count_and_total: tuple[int, int],
) -> None:
    count, total = count_and_total
    kept = sorted(spread_evenly(count, total))
    left_out = sorted(set(range(total)) - set(kept))
    assert len(kept) == count
    assert kept[0] >= 0
    assert kept[-1] < total
    for positions in (kept, left_out):
        gaps = cyclic_gaps(positions, total) if positions else {0}
        assert max(gaps) - min(gaps) <= 1
    assert abs(kept[0] - (total - 1 - kept[-1])) <= 1


@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("held", range(1, 7))
def test_each_devices_residents_are_spread_evenly_over_its_steps(
    num_devices: int, held: int
) -> None:
    budget = Budget((300 + 100 * held,) * num_devices, None, device_slots=3, host_slots=5)
    placement = place([LAYER] * 56, budget)
    for device in range(num_devices):
        tiers = placement.tiers[device::num_devices]
        positions = [i for i, tier in enumerate(tiers) if tier == "device"]
        gaps = cyclic_gaps(positions, len(tiers))
        assert len(positions) == held
        assert max(gaps) - min(gaps) <= 1


def test_layers_that_differ_by_a_page_are_spread_as_equal_ones() -> None:
    first, second = replace(LAYER, host_nbytes=101), replace(LAYER, host_nbytes=100)
    budget = Budget((None,), 5 * 101 + 14 * 101, device_slots=3, host_slots=5)
    placement = place([first] * 14 + [second] * 14, budget)
    gaps = cyclic_gaps(chosen(placement, "host"), 28)
    assert len(chosen(placement, "host")) == 14
    assert max(gaps) - min(gaps) <= 1


def test_forty_devices_share_host_memory() -> None:
    # So many that not every set of them can be looked at.
    sizes = [sized(100 + i % 3) for i in range(40 * 7)]
    budget = Budget((None,) * 40, 25_000, device_slots=3, host_slots=5)
    placement = place(sizes, budget)
    assert 25_000 - 100 < placement.host_bytes <= 25_000


def test_where_everything_fits_on_the_device_no_slot_is_needed() -> None:
    budget = Budget((2800,), 0, device_slots=3, host_slots=5, scratch_nbytes=50)
    placement = place([LAYER] * 28, budget)
    assert set(placement.tiers) == {"device"}
    assert placement.device_bytes == (2800,)
    assert placement.host_bytes == 0
    assert placement.device_slots == placement.host_slots == (Slots(0, 0),)


def test_where_all_that_is_streamed_fits_in_host_memory_no_host_slot_is_needed() -> None:
    budget = Budget((1350,), 1800, device_slots=3, host_slots=5, scratch_nbytes=50)
    placement = place([LAYER] * 28, budget)
    assert (len(chosen(placement, "device")), len(chosen(placement, "host"))) == (10, 18)
    assert placement.device_slots == (Slots(3, 100),)
    assert placement.device_bytes == (10 * 100 + 3 * 100 + 50,)
    assert placement.host_slots == (Slots(0, 0),)
    assert placement.host_bytes == 1800


def test_host_slots_of_a_second_device_are_not_paid_if_its_steps_can_stay() -> None:
    budget = Budget((None, None), 24 * 100, device_slots=3, host_slots=5)
    placement = place([LAYER] * 28, budget)
    assert [slots.count for slots in placement.host_slots].count(0) == 1
    assert len(chosen(placement, "host")) == 24 - 5


def test_without_budgets_there_are_slots_and_nothing_else() -> None:
    budget = replace(NO_LIMIT, device=(None, None), scratch_nbytes=7)
    placement = place([LAYER] * 5, budget)
    assert set(placement.tiers) == {"disk"}
    assert placement.device_slots == (Slots(3, 100), Slots(2, 100))
    assert placement.device_bytes == (307, 207)
    assert (placement.copy_bytes, placement.read_bytes) == ((300, 200), 500)
    assert placement.host_bytes == 2 * 5 * 100
    assert place([LAYER] * 5, UNIFIED).host_bytes == 0


def refused(budget: Budget, sizes: Sequence[StepSize]) -> str:
    with pytest.raises(ConfigError) as caught:
        place(sizes, budget)
    assert "\n" not in str(caught.value)
    return str(caught.value)


GIB = 1 << 30
LAYERS = [sized(2 * GIB)] * 28


@pytest.mark.parametrize(
    ("least", "make", "message"),
    [
        (6 * GIB, lambda n: replace(NO_LIMIT, device=(n,)), "the device {}: 3 slots of 2.00 GiB"),
        (
            8 * GIB,
            lambda n: replace(NO_LIMIT, host=n, host_slots=4),
            "the host {}: 4 slots of 2.00 GiB",
        ),
        (
            8 * GIB,
            lambda n: replace(NO_LIMIT, device=(None, n), reserve=(GIB, GIB), scratch_nbytes=GIB),
            "device 1 {}: 3 slots of 2.00 GiB, 1.00 GiB for casts, 1.00 GiB reserved",
        ),
    ],
)
def test_exactly_the_slots_are_enough_and_a_byte_less_is_refused_with_the_bound(
    least: int, make: Callable[[int], Budget], message: str
) -> None:
    enough, short = make(least), make(least - 1)
    tiers = place(LAYERS, enough).tiers
    assert set(tiers) == {"disk"}
    name = "host_budget" if short.host is not None else "device_budget"
    human = f"{least // GIB}.00 GiB"
    bound = message.format(f"needs at least {least} bytes ({human})")
    assert refused(short, LAYERS) == f"{name}={least - 1} ({human}): {bound}"


def test_a_large_step_is_resident_where_slots_of_its_size_would_not_fit() -> None:
    sizes = [LAYER] * 9 + [sized(300)]
    budget = replace(NO_LIMIT, device=(600,))
    placement = place(sizes, budget)
    assert chosen(placement, "device") == [9]
    assert placement.device_slots == (Slots(3, 100),)
    message = refused(replace(budget, device=(599,)), sizes)
    assert "least 600 bytes (600 B): 3 slots of 100 B, 300 B of resident steps" in message


def test_a_reserve_beyond_the_budget_is_refused_even_with_nothing_to_place() -> None:
    budget = replace(NO_LIMIT, device=(None, 10), reserve=(11, 11))
    assert "device 1 needs at least 11 bytes" in refused(budget, [LAYER])


@pytest.mark.parametrize(
    ("free", "limit"),
    [
        (NO_LIMIT, lambda n: replace(NO_LIMIT, device=(n,))),
        (UNIFIED, lambda n: replace(UNIFIED, host=n)),
    ],
)
def test_a_single_step_is_resident_or_has_one_slot(
    free: Budget, limit: Callable[[int], Budget]
) -> None:
    held = place([LAYER], limit(100))
    assert (held.tiers, held.device_slots) == (("device",), (Slots(0, 0),))
    streamed = place([LAYER], free)
    assert (streamed.tiers, streamed.device_slots) == (("disk",), (Slots(1, 100),))
    assert "least 100 bytes" in refused(limit(99), [LAYER])


def test_steps_without_bytes_are_resident_for_nothing() -> None:
    sizes = [LAYER, sized(0)] * 4
    placement = place(sizes, replace(NO_LIMIT, device=(300,), host=500))
    assert chosen(placement, "device") == [1, 3, 5, 7]
    assert place([sized(0)] * 3, replace(NO_LIMIT, device=(0,))).host_bytes == 0


def test_no_steps_take_no_memory() -> None:
    placement = place([], replace(NO_LIMIT, device=(0, None), host=0))
    assert (placement.tiers, placement.device_bytes, placement.host_bytes) == ((), (0, 0), 0)
