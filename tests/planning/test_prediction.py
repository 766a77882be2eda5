"""The predicted seconds a pass, and that they fall as budgets grow."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer.errors import ConfigError
from layer_streamer.planning.placement import (
    Budget,
    Placement,
    Prediction,
    Rates,
    StepSize,
    Tier,
    account,
    place,
    predict,
)

LAYER = StepSize(
    device_nbytes=100, host_nbytes=110, read_nbytes=80, copy_nbytes=60, slot_nbytes=100
)
SIZES = [replace(LAYER, copy_nbytes=60 + 10 * i) for i in range(4)]
"""Copies of 60 and 80 bytes on device 0, of 70 and 90 on device 1."""


def placed(*tiers: Tier) -> Placement:
    """Four steps on two devices, in these tiers."""
    return account(SIZES, tiers, Budget((None, None), None, 1, 1))


def predicted(placement: Placement, rates: Rates) -> Prediction:
    prediction = predict(placement, rates)
    assert prediction is not None
    return prediction


def test_only_what_is_on_disk_is_read_and_all_but_the_devices_own_is_copied() -> None:
    prediction = predicted(placed("device", "host", "disk", "disk"), Rates(10.0, (10.0, 10.0)))
    assert (prediction.read_bytes, prediction.copy_bytes) == (2 * 80, 70 + 80 + 90)


def test_the_slower_of_reads_and_copies_counts() -> None:
    placement = placed("device", "host", "disk", "host")
    by_read = predicted(placement, Rates(1.0, (2.0, 4.0)))
    assert (by_read.seconds, by_read.bound_by) == (80.0, "read")
    assert (by_read.read_seconds, by_read.copy_seconds) == (80.0, 40.0)
    by_copy = predicted(placement, Rates(4.0, (2.0, 2.0)))
    assert (by_copy.seconds, by_copy.bound_by) == (80.0, "copy")
    assert (by_copy.read_seconds, by_copy.copy_seconds) == (20.0, 80.0)


def test_links_that_slow_each_other_count_in_sum() -> None:
    placement = placed("host", "host", "host", "host")
    alone = predicted(placement, Rates(None, (10.0, 10.0)))
    assert alone.seconds == (70 + 90) / 10
    together = predicted(placement, Rates(None, (10.0, 10.0), copy_together=15.0))
    assert together.seconds == 300 / 15
    assert predicted(placement, Rates(None, (10.0, 10.0), copy_together=20.0)) == alone


def test_where_nothing_moves_a_pass_takes_no_time_whatever_the_rates() -> None:
    prediction = predicted(placed(*["device"] * 4), Rates(None, (None, None)))
    assert prediction == Prediction(0.0, "resident", 0.0, 0.0, 0, 0)


@pytest.mark.parametrize(
    ("tiers", "rates", "is_known"),
    [
        (("host", "host", "host", "host"), Rates(None, (1.0, 1.0)), True),
        (("host", "disk", "host", "host"), Rates(None, (1.0, 1.0)), False),
        (("device", "host", "device", "disk"), Rates(1.0, (None, 1.0)), True),
        (("host", "host", "device", "disk"), Rates(1.0, (None, 1.0), 1.0), False),
    ],
)
def test_a_rate_that_is_needed_and_unknown_leaves_the_time_unknown(
    tiers: tuple[Tier, ...], rates: Rates, is_known: bool
) -> None:
    assert (predict(placed(*tiers), rates) is not None) == is_known


def test_steps_that_need_no_copy_need_no_link() -> None:
    sizes = [replace(LAYER, copy_nbytes=0)] * 3
    placement = place(sizes, Budget((None,), None, 3, 0, shared=True))
    prediction = predict(placement, Rates(8.0, (None,)))
    assert prediction == Prediction(30.0, "read", 30.0, 0.0, 240, 0)


SMALL = st.integers(0, 12)
STEPS = st.lists(
    st.builds(StepSize, SMALL, SMALL, SMALL, SMALL, SMALL), min_size=1, max_size=4
).flatmap(lambda kinds: st.lists(st.sampled_from(kinds), min_size=1, max_size=10))
EQUAL = st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 4), st.integers(1, 6))


@settings(deadline=None)
@given(EQUAL, st.lists(st.integers(0, 3500), min_size=4, max_size=4))
def test_of_equal_steps_more_budget_never_holds_fewer_nor_takes_longer(
    shape: tuple[int, int, int, int], limits: list[int]
) -> None:
    num_devices, num_steps, device_slots, host_slots = shape
    small_device, large_device = sorted(limits[:2])
    small_host, large_host = sorted(limits[2:])
    pairs = [(small_device, small_host), (large_device, small_host), (large_device, large_host)]
    found: list[tuple[Placement, Prediction]] = []
    sizes = [StepSize(*[100] * 5)] * num_steps
    for device, host in pairs:
        budget = Budget((device,) * num_devices, host, device_slots, host_slots)
        try:
            placement = place(sizes, budget)
        except ConfigError:
            assert not found, "more memory was refused where less was enough"
            continue
        prediction = predict(placement, Rates(7.0, (25.0,) * num_devices, 40.0))
        assert prediction is not None
        found.append((placement, prediction))
    for (less, slower), (more, faster) in pairwise(found):
        assert more.tiers.count("device") >= less.tiers.count("device")
        assert more.tiers.count("disk") <= less.tiers.count("disk")
        assert faster.seconds <= slower.seconds


@settings(deadline=None)
@given(STEPS, st.integers(0, 70), st.integers(0, 120), st.integers(0, 50))
def test_more_device_memory_never_copies_more_and_more_host_memory_never_reads_more(
    sizes: list[StepSize], device: int, host: int, more: int
) -> None:
    budget = Budget((device,), host, device_slots=3, host_slots=2, scratch_nbytes=5)
    larger_device = replace(budget, device=(device + more,), host=None)
    larger_host = replace(budget, host=host + more)
    rates = Rates(1.0, (1.0,))
    try:
        before = predict(place(sizes, budget), rates)
    except ConfigError:
        return
    with_device = predict(place(sizes, larger_device), rates)
    with_host = predict(place(sizes, larger_host), rates)
    assert before is not None
    assert with_device is not None
    assert with_host is not None
    assert with_device.copy_bytes <= before.copy_bytes
    assert with_host.read_bytes <= before.read_bytes
    assert with_host.seconds <= before.seconds


@pytest.mark.parametrize(
    ("num_steps", "num_sizes"), [(1_000, 1), (10_000, 1), (10_000, 3), (10_000, 10_000)]
)
def test_a_checkpoint_of_many_steps_keeps_its_budgets_and_fills_them(
    num_steps: int, num_sizes: int
) -> None:
    sizes = [StepSize(*[10_000 + i * 7919 % num_sizes] * 5) for i in range(num_steps)]
    budget = Budget((num_steps * 2500,) * 2, num_steps * 2000, 3, 5)
    placement = place(sizes, budget)
    spare = [budget.device[0] - used for used in placement.device_bytes]
    spare.append(num_steps * 2000 - placement.host_bytes)
    assert min(spare) >= 0
    assert max(spare) < 10_000
    prediction = predict(placement, Rates(1e9, (1e9, 1e9)))
    assert prediction is not None
    assert prediction.read_bytes < prediction.copy_bytes
