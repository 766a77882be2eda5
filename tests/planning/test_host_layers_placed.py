"""Where layers lie that are computed in host memory, and what else then has room."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer import ConfigError
from layer_streamer.planning.budget import MAX_BYTES
from layer_streamer.planning.host_layers import choose_host_layers
from layer_streamer.planning.placement import Budget, StepSize, place

SIZES = st.lists(st.sampled_from([100, 100, 100, 250, 40]), min_size=1, max_size=10)


@given(
    sizes=SIZES,
    chosen=st.sets(st.integers(0, 9)),
    device=st.one_of(st.none(), st.integers(0, 1500), st.just(MAX_BYTES)),
    host=st.one_of(st.none(), st.integers(0, 2000), st.just(MAX_BYTES)),
    devices=st.integers(1, 2),
)
def test_they_are_in_host_memory_whatever_the_budgets_and_a_slot_has_room_for_each(
    sizes: list[int], chosen: set[int], device: int | None, host: int | None, devices: int
) -> None:
    steps = [StepSize(n, n, n, n, n) for n in sizes]
    on_host = frozenset(i for i in chosen if i < len(steps))
    budget = Budget((device,) * devices, host, 2, 1, on_host=on_host)
    try:
        placement = place(steps, budget)
    except ConfigError as error:
        assert "device_budget" in str(error) or "host_budget" in str(error)
        return
    assert placement.on_host == on_host
    assert all(placement.tiers[i] == "host" for i in on_host)
    for i in on_host:
        slots = placement.device_slots[i % devices]
        assert slots.count > 0 and slots.nbytes >= steps[i].slot_nbytes
    assert device is None or max(placement.device_bytes) <= device
    assert host is None or placement.host_bytes <= host


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 3))
def test_a_number_is_spread_over_layers_alone_with_even_gaps(
    count: int, num_layers: int, tail: int
) -> None:
    layers = range(num_layers + tail)
    if count > num_layers:
        with pytest.raises(ConfigError, match=f"a pass has {num_layers} layers"):
            choose_host_layers(count, layers, num_layers)
        return
    places = sorted(choose_host_layers(count, layers, num_layers))
    assert len(places) == count and all(0 <= place < num_layers for place in places)
    around = [*places, *(place + num_layers for place in places[:1])]
    gaps = {after - before for before, after in pairwise(around)}
    assert not gaps or max(gaps) - min(gaps) <= 1
