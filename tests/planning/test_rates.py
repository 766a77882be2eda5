"""Predictions and limits by the way that bytes are really moved, and none where it is not known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.planning.placement import Rates, StepSize
from layer_streamer.planning.plan import CACHED, Machine, Plan
from layer_streamer.planning.planner import make_plan
from layer_streamer.planning.settings import Settings

GIB = 1 << 30
STEP = StepSize(GIB, GIB, GIB, GIB, GIB)
DISK, COLD, CACHE, LINK, SLOW = 2.0 * GIB, 1.0 * GIB, 8.0 * GIB, 16.0 * GIB, 4.0 * GIB
RATES = Rates(DISK, (LINK,), cold=COLD, cached=CACHE, pageable=(SLOW,))
GPU = Machine(
    devices=("cuda:0",), unified=False, maps_files=True, device_free=(10 * GIB,),
    host_available=64 * GIB, rates=RATES,
)  # fmt: skip
CPU = replace(GPU, devices=("cpu",), unified=True, maps_files=False)


def plan(machine: Machine, cached: float = 1.0, **options: Any) -> Plan:
    """Of eight steps of a GiB, files of which ``cached`` is in the page cache."""
    return make_plan([STEP] * 8, 0, machine, Settings(**options), lambda: cached)


@pytest.mark.parametrize(
    ("machine", "options", "cached", "seconds", "limits"),
    [
        # Past the page cache, whatever it has.
        (CPU, {"read_mode": "direct"}, 1.0, 8 / 2, {"read": DISK}),
        (GPU, {"read_mode": "direct"}, 0.0, 8 / 2, {"read": DISK, "copy": LINK}),
        # From the page cache: how fast that is at most nobody knows.
        (CPU, {}, 1.0, 8 / 8, {}),
        (CPU, {}, CACHED, 8 / 8, {}),
        (CPU, {}, 0.0, 8 / 1, {}),
        (CPU, {"read_mode": "buffered"}, 0.5, 4 / 8 + 4 / 1, {}),
        (GPU, {"n_cpu_pinned": 2}, 1.0, 8 / 8, {"copy": LINK}),
        (GPU, {"n_cpu_pinned": 2}, 0.0, 8 / 1, {"copy": LINK}),
        # Mapped: a link copies from the pages; how fast a CPU takes them in nobody measured.
        (GPU, {}, 0.0, 8 / 16, {"copy": LINK}),
        (GPU, {"read_mode": "mapped"}, 1.0, 8 / 16, {"copy": LINK}),
        (CPU, {"read_mode": "mapped"}, 1.0, None, {}),
        # From pageable memory, unless a pinned pool comes behind it.
        (GPU, {"n_cpu": 2, "n_cpu_pinned": 0}, 1.0, 8 / 4, {"copy": SLOW}),
        (GPU, {"n_cpu": 2, "n_cpu_pinned": 2}, 1.0, 8 / 8, {"copy": LINK}),
        # Part of it from pinned memory, part of it from pageable.
        (GPU, {"n_cpu": 1, "n_cpu_pinned": 0, "host_budget": "7GiB"}, 1.0, None, {"read": DISK}),
        # Nothing is read, or nothing moves.
        (GPU, {"device_budget": "9GiB"}, 0.0, 0.0, {"copy": LINK}),
        (CPU, {"device_budget": "9GiB"}, 0.0, 0.0, {}),
    ],
)
def test_a_plan_predicts_by_the_way_it_has_chosen(
    machine: Machine, options: Any, cached: float, seconds: float | None, limits: dict[str, float]
) -> None:
    made = plan(machine, cached, **options)
    assert made.predicted_seconds == (seconds if seconds is None else pytest.approx(seconds))
    if "disk" in made.tiers or "read" in limits:
        assert made.limits == limits
    assert made.limits.get("copy") == limits.get("copy")


@pytest.mark.parametrize(
    ("unknown", "options", "cached"),
    [
        ({"cached": None}, {}, 1.0),
        ({"cached": None}, {}, 0.5),
        ({"cold": None}, {}, 0.0),
        ({"cold": None}, {}, 0.5),
        ({"cold": None, "cached": None}, {}, 1.0),
        ({"read": None, "cold": None}, {"read_mode": "direct"}, 1.0),
    ],
)
def test_a_rate_of_another_way_is_never_taken_instead(
    unknown: dict[str, None], options: dict[str, Any], cached: float
) -> None:
    made = plan(replace(CPU, rates=replace(RATES, **unknown)), cached, **options)
    assert made.predicted is made.predicted_seconds is None
    assert made.limits == {}
    assert "layer-streamer probe" in str(made)


def test_what_is_not_needed_may_be_unknown() -> None:
    assert (
        plan(replace(CPU, rates=replace(RATES, cold=None, read=None)), 1.0).predicted_seconds == 1
    )
    assert plan(replace(CPU, rates=replace(RATES, cached=None)), 0.0).predicted_seconds == 8


def test_where_direct_reads_were_refused_the_cold_ones_count_but_bound_nothing() -> None:
    made = plan(replace(CPU, rates=replace(RATES, read=None)), read_mode="direct")
    assert made.predicted_seconds == 8
    assert made.limits == {}


def test_a_machine_on_which_nothing_was_measured_does_not_look_at_the_page_cache() -> None:
    unknown = replace(CPU, rates=Rates(None, (None,)))
    make_plan([STEP] * 8, 0, unknown, Settings(), lambda: pytest.fail("asked"))


def test_several_links_from_pageable_memory_are_not_guessed() -> None:
    two = replace(GPU, devices=("cuda:0", "cuda:1"), device_free=(10 * GIB,) * 2,
                  rates=replace(RATES, copy=(LINK, LINK), pageable=(SLOW, SLOW)))  # fmt: skip
    made = plan(two, n_cpu=2, n_cpu_pinned=0)
    assert made.predicted is None
    assert "copy" not in made.limits


@pytest.mark.parametrize(
    ("cached", "text"), [(1.0, "1.0000 s with 100% of the files"), (0.5, "4.5000 s with 50% of")]
)
def test_the_table_says_what_the_page_cache_had(cached: float, text: str) -> None:
    assert f"(read {text}" in str(plan(CPU, cached))
    assert "page cache, copy" not in str(plan(CPU, cached, read_mode="direct"))


def test_for_a_cpu_that_maps_files_no_probe_is_promised() -> None:
    made = plan(CPU, read_mode="mapped")
    assert "no prediction: how fast a CPU takes pages in" in str(made)
    assert "probe" not in str(made)


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_in_the_page_cache_never_takes_longer(one: float, other: float) -> None:
    less, more = sorted((one, other))
    slow, fast = plan(CPU, less).predicted_seconds, plan(CPU, more).predicted_seconds
    assert slow is not None and fast is not None
    assert 8 / 8 <= fast <= slow <= 8 / 1 + 1e-9
