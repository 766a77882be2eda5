"""Plans as a table: tiers, read mode and its reason, from sizes, settings and a machine."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from disks import warnings_of

from layer_streamer import ConfigError
from layer_streamer.planning.placement import Rates, StepSize
from layer_streamer.planning.plan import Machine, Plan
from layer_streamer.planning.planner import make_plan, usable
from layer_streamer.planning.settings import Settings

GIB = 1 << 30
STEP = StepSize(GIB, GIB, GIB, GIB, GIB)
UNKNOWN = Rates(None, (None,))
GPU = Machine(
    devices=("cuda:0",), unified=False, maps_files=True, device_free=(10 * GIB,),
    host_available=64 * GIB, rates=UNKNOWN,
)  # fmt: skip
CPU = Machine(
    devices=("cpu",), unified=True, maps_files=False, device_free=(64 * GIB,),
    host_available=64 * GIB, rates=UNKNOWN,
)  # fmt: skip
TIGHT = replace(GPU, host_available=8 * GIB)


def plan(machine: Machine, steps: int = 8, *, cached: float = 0.0, **options: Any) -> Plan:
    """The plan for equal steps of a GiB; by default slots take 3 of the device."""
    return make_plan([STEP] * steps, 0, machine, Settings(**options), lambda: cached)


HOLDS, CAN_HOLD, LESS = "host memory holds it", "the page cache can hold 8.00 GiB", "has room for"
BUDGET, ASKED = "the page cache is not part of host_budget", "as asked"


@pytest.mark.parametrize(
    ("machine", "options", "mode", "reason", "tiers"),
    [
        # An accelerator: the page cache itself, if it holds what the device does not.
        (GPU, {}, "mapped", HOLDS, {"host": 8}),
        (GPU, {"n_gpu": 1}, "mapped", HOLDS, {"host": 8}),
        (GPU, {"device_budget": "6GiB"}, "mapped", HOLDS, {"host": 5, "device": 3}),
        (GPU, {"host_budget": "8GiB"}, "mapped", HOLDS, {"host": 8}),
        (GPU, {"host_budget": "auto"}, "mapped", HOLDS, {"host": 8}),
        (TIGHT, {"host_budget": "8GiB"}, "mapped", HOLDS, {"host": 8}),
        (TIGHT, {"device_budget": "6GiB"}, "mapped", HOLDS, {"host": 5, "device": 3}),
        # It does not: streamed, through the page cache or past it.
        (TIGHT, {}, "direct", LESS, {"disk": 8}),
        (TIGHT, {"n_cpu_pinned": 1, "device_budget": "6GiB"}, "buffered", "5.00 GiB",
         {"disk": 5, "device": 3}),
        (GPU, {"host_budget": "7GiB"}, "direct", BUDGET, {"disk": 2, "host": 6}),
        (TIGHT, {"host_budget": "auto"}, "direct", BUDGET, {"disk": 1, "host": 7}),
        # Host pools of a certain size were asked for, or the device cannot map.
        (GPU, {"n_cpu_pinned": 4}, "buffered", CAN_HOLD, {"disk": 8}),
        (GPU, {"n_cpu_pinned": 0}, "buffered", CAN_HOLD, {"disk": 8}),
        (GPU, {"n_cpu": 1}, "buffered", CAN_HOLD, {"disk": 8}),
        (replace(GPU, maps_files=False), {}, "buffered", CAN_HOLD, {"disk": 8}),
        (GPU, {"n_cpu_pinned": 4, "host_budget": "7GiB"}, "direct", BUDGET,
         {"disk": 6, "host": 2}),
        (GPU, {"n_cpu_pinned": 1, "host_budget": "5GiB"}, "direct", BUDGET,
         {"disk": 5, "host": 3}),
        # What is asked for.
        (GPU, {"read_mode": "direct"}, "direct", ASKED, {"disk": 8}),
        (TIGHT, {"read_mode": "buffered"}, "buffered", ASKED, {"disk": 8}),
        (GPU, {"read_mode": "mapped", "n_cpu_pinned": 4}, "mapped", HOLDS, {"host": 8}),
        # The CPU: one memory; mapped only if asked for.
        (CPU, {}, "buffered", CAN_HOLD, {"disk": 8}),
        (replace(CPU, host_available=9 * GIB), {}, "direct", LESS, {"disk": 8}),
        (CPU, {"read_mode": "mapped"}, "mapped", ASKED, {"disk": 8}),
        (CPU, {"read_mode": "direct"}, "direct", ASKED, {"disk": 8}),
        (CPU, {"host_budget": "7GiB"}, "direct", BUDGET, {"disk": 8}),
        (CPU, {"n_gpu": 0, "n_cpu_pinned": 1, "host_budget": "5GiB"}, "direct", BUDGET,
         {"disk": 5, "device": 3}),
        (CPU, {"n_gpu": 0, "n_cpu_pinned": 1, "device_budget": "5GiB"}, "buffered", "5.00 GiB",
         {"disk": 5, "device": 3}),
    ],
)  # fmt: skip
def test_tiers_and_read_mode_follow_from_memory_and_settings(
    machine: Machine, options: dict[str, Any], mode: str, reason: str, tiers: dict[str, int]
) -> None:
    made = plan(machine, **options)
    assert (made.read_mode, Counter(made.tiers)) == (mode, tiers)
    assert reason in made.reason


@pytest.mark.parametrize(
    ("machine", "options"),
    [
        (GPU, {"device_budget": "8GiB"}),
        (GPU, {"host_budget": "8GiB", "n_cpu_pinned": 1}),
        (CPU, {"device_budget": "8GiB"}),
        (CPU, {"host_budget": "8GiB"}),
    ],
)
@pytest.mark.parametrize(("cached", "mode"), [(0.0, "direct"), (0.89, "direct"), (0.9, "buffered")])
def test_what_is_loaded_once_comes_from_the_page_cache_if_it_is_there(
    machine: Machine, options: dict[str, Any], cached: float, mode: str
) -> None:
    made = plan(machine, cached=cached, **options)
    assert "disk" not in made.tiers
    assert (made.read_mode, made.reason.startswith("read once")) == (mode, True)
    assert made.placement.host_slots[0].count == 0


@pytest.mark.parametrize(("machine", "options"), [(GPU, {}), (TIGHT, {}), (CPU, {})])
def test_the_page_cache_is_asked_about_only_where_it_matters(
    machine: Machine, options: dict[str, Any]
) -> None:
    make_plan([STEP] * 8, 0, machine, Settings(**options), lambda: pytest.fail("asked"))


@pytest.mark.parametrize(
    ("machine", "options", "usable"),
    [(TIGHT, {}, "7.20 GiB"), (GPU, {"host_budget": "7GiB"}, "7.00 GiB")],
)
def test_mapped_files_that_do_not_fit_are_refused_with_both_numbers(
    machine: Machine, options: dict[str, Any], usable: str
) -> None:
    with pytest.raises(ConfigError, match=rf"read_mode='mapped'.* 8\.00 GiB .*{usable}"):
        plan(machine, read_mode="mapped", **options)


def test_a_device_that_cannot_map_is_said_to_and_the_rest_is_as_under_auto(caplog: Any) -> None:
    made = plan(replace(GPU, maps_files=False), read_mode="mapped")
    assert (made.read_mode, Counter(made.tiers)) == ("buffered", {"disk": 8})
    (warning,) = warnings_of(caplog)
    assert "cannot copy from mapped files" in warning


@pytest.mark.parametrize(
    ("budgets", "total"),
    [
        ({"device_budget": "9GiB", "host_budget": "100GiB"}, 9),
        ({"device_budget": "100GiB", "host_budget": "9GiB"}, 9),
        ({"device_budget": "9GiB", "host_budget": "auto"}, 9),
        ({"device_budget": "auto", "host_budget": "auto"}, 20),
    ],
)
def test_on_the_cpu_both_budgets_mean_one_memory_and_the_smaller_holds(
    budgets: dict[str, str], total: int
) -> None:
    made = plan(CPU, 20, **budgets)
    assert sum(made.placement.device_bytes) == total * GIB
    assert (made.placement.host_bytes, made.placement.host_slots[0].count) == (0, 0)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 3),
        ({"device_budget": "3GiB"}, 3),
        ({"device_budget": "2.9GiB"}, 2),
        ({"device_budget": "2GiB"}, 2),
        ({"device_budget": "5GiB", "reserve_bytes": "3GiB"}, 2),
        ({"n_gpu": 0, "device_budget": "1GiB"}, 1),
        ({"n_gpu": 5}, 6),
    ],
)
def test_device_slots_become_fewer_only_where_the_budget_has_no_room(
    options: dict[str, Any], count: int
) -> None:
    assert plan(GPU, **options).placement.device_slots[0].count == count


@pytest.mark.parametrize(
    "options",
    [
        {"device_budget": "1.9GiB"},
        {"n_gpu": 2, "device_budget": "2GiB"},
        {"n_gpu": 1, "device_budget": "1.9GiB"},
        {"device_budget": "3GiB", "reserve_bytes": "2GiB"},
    ],
)
def test_a_device_budget_below_its_slots_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="device_budget"):
        plan(GPU, **options)


@pytest.mark.parametrize("machine", [GPU, CPU])
def test_host_slots_that_exceed_the_free_memory_are_refused_with_both_numbers(
    machine: Machine,
) -> None:
    with pytest.raises(ConfigError, match=r"n_cpu_pinned=99, .*10\d GiB.* 64\.0 GiB .*host_budget"):
        plan(machine, 200, n_cpu_pinned=99)


@pytest.mark.parametrize(
    ("machine", "name"), [(GPU, "host_budget"), (CPU, "host_budget"), (CPU, "device_budget")]
)
def test_a_host_budget_overrides_the_check_of_free_memory_with_a_warning(
    machine: Machine, name: str, caplog: Any
) -> None:
    made = plan(machine, 200, n_cpu_pinned=4, **{name: "70GiB"})
    assert {"disk"} < set(made.tiers)
    (warning,) = warnings_of(caplog)
    assert "70.0 GiB of host memory be used, 64.0 GiB is free" in warning


@pytest.mark.parametrize("free", [2 * GIB, 10 * GIB, 100 * GIB])
def test_auto_leaves_a_tenth_and_half_a_gib_at_least(free: int) -> None:
    assert usable(free) == free - max(free // 10, GIB // 2)


@pytest.mark.parametrize("free", [4, 10, 40])
def test_auto_budgets_use_what_is_free_less_the_margin(free: int) -> None:
    machine = replace(GPU, device_free=(free * GIB,), host_available=free * GIB)
    options = {"device_budget": "auto", "host_budget": "auto", "n_gpu": 0, "n_cpu_pinned": 1}
    placement = plan(machine, 200, **options).placement
    most = usable(free * GIB)
    assert most - GIB < placement.device_bytes[0] <= most
    assert most - GIB < placement.host_bytes <= most


def test_with_next_to_nothing_free_an_auto_budget_is_refused_and_not_negative() -> None:
    with pytest.raises(ConfigError, match="device_budget"):
        plan(replace(GPU, device_free=(1000,)), device_budget="auto")


def test_each_device_has_its_own_budget_and_its_own_free_memory() -> None:
    two = replace(
        GPU, devices=("cuda:0", "cuda:1"), device_free=(4 * GIB, 8 * GIB),
        rates=Rates(None, (None, None)),
    )  # fmt: skip
    made = plan(two, 20, device_budget="auto", n_gpu=0)
    held = [sum(tier == "device" for tier in made.tiers[i::2]) for i in range(2)]
    assert held == [2, 6]


@pytest.mark.parametrize(
    ("machine", "rates", "options", "seconds", "bound_by"),
    [
        (TIGHT, Rates(GIB, (2 * GIB,)), {}, 8.0, "read"),
        (TIGHT, Rates(4 * GIB, (GIB,)), {}, 8.0, "copy"),
        (GPU, Rates(None, (2 * GIB,)), {}, 4.0, "copy"),
        (GPU, Rates(None, (None,)), {"device_budget": "8GiB"}, 0.0, "resident"),
        (CPU, Rates(None, (None,), cold=2 * GIB), {}, 4.0, "read"),
        (CPU, Rates(GIB, (GIB,), cold=2 * GIB), {}, 4.0, "read"),
    ],
)
def test_the_prediction_is_of_what_moves(
    machine: Machine, rates: Rates, options: dict[str, Any], seconds: float, bound_by: str
) -> None:
    made = plan(replace(machine, rates=rates), **options)
    assert made.predicted is not None
    assert (made.predicted_seconds, made.predicted.bound_by) == (seconds, bound_by)
    assert f"predicted: {seconds:.4f} s a pass, bound by {bound_by}" in str(made)
    assert json.loads(json.dumps(made.document()))["predicted"]["seconds"] == seconds


@pytest.mark.parametrize("machine", [TIGHT, GPU, CPU])
def test_without_rates_there_is_no_prediction_and_it_says_how_to_get_one(machine: Machine) -> None:
    made = plan(machine)
    assert made.predicted is made.predicted_seconds is None
    assert "layer-streamer probe" in str(made)
    assert made.document()["predicted"] is None


def test_the_table_names_every_tier_its_layers_and_bytes() -> None:
    machine = replace(GPU, host_available=20 * GIB)
    made = plan(machine, 16, device_budget="7GiB", host_budget="7GiB", n_cpu_pinned=4)
    lines = str(made).splitlines()
    rows = {line.split("  ")[1].strip(): line for line in lines[1:4]}
    assert set(rows) == {"resident on the device", "resident in host memory", "on disk"}
    for name, tier in (("resident on the device", "device"), ("on disk", "disk")):
        of_tier = [i for i, placed in enumerate(made.tiers) if placed == tier]
        numbers = rows[name].removeprefix(f"  {name}").split()
        assert int(numbers[0]) == len(of_tier)
        assert float(numbers[1]) == pytest.approx(len(of_tier) * GIB / 1e9, abs=1e-3)
        assert float(numbers[2]) == (float(numbers[1]) if tier == "disk" else 0.0)
        assert float(numbers[3]) == (float(numbers[1]) if tier == "disk" else 0.0)
        assert " ".join(numbers[4:]) == ", ".join(map(str, of_tier))
    assert "  memory on cuda:0: 7.00 GiB" in lines
    assert "  host memory: 7.00 GiB" in lines
    assert f"  reads: direct: {BUDGET}" in lines


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({}, (16, 1 << 20)),
        ({"read_threads": 3}, (6, 1 << 20)),
        ({"read_mode": "buffered"}, (16, 8 << 20)),
        ({"read_chunk": 10_000}, (16, 8192)),
        ({"read_chunk": 4096, "n_cpu": 0, "n_cpu_pinned": 0}, (16, 4096)),
        ({"n_cpu_pinned": 1}, (2, GIB)),
        ({"n_cpu": 1}, (7, GIB)),
        # No more than holds all there is to stream.
        ({"read_threads": 256, "read_chunk": GIB}, (8, GIB)),
    ],
)
def test_without_host_pools_the_host_holds_a_ring_of_two_slots_a_reader(
    options: dict[str, Any], slots: tuple[int, int]
) -> None:
    (host,) = plan(TIGHT, **options).placement.host_slots
    assert (host.count, host.nbytes) == slots


def test_a_ring_is_no_larger_than_the_steps() -> None:
    small = StepSize(8192, 8192, 8192, 8192, 8192)
    made = make_plan([small] * 5, 0, TIGHT, Settings(read_mode="direct"), lambda: 0.0)
    (host,) = made.placement.host_slots
    assert (host.count, host.nbytes) == (5, 8192)


def test_the_ring_that_is_planned_for_a_budget_is_the_one_that_is_measured_to_be_fastest() -> None:
    machine = replace(TIGHT, readers={"direct": (4, 1 << 25)})
    made = plan(machine, host_budget="3GiB")
    assert made.placement.host_bytes == 2 * GIB + 8 * (1 << 25)


def test_the_document_holds_the_table() -> None:
    made = plan(GPU, device_budget="6GiB")
    assert json.loads(json.dumps(made.document())) == {
        "devices": ["cuda:0"],
        "layers": [0, 1, 2, 3, 4, 5, 6, 7],
        "tiers": list(made.tiers),
        "host_layers": [],
        "device_bytes": [6 * GIB],
        "host_bytes": 5 * GIB,
        "static_bytes": {},
        "expert_slots": 0,
        "expert_bytes": 0,
        "expert_tiers": None,
        "read_mode": "mapped",
        "read_threads": 8,
        "read_chunk": 8 << 20,
        "reason": made.reason,
        "predicted": None,
        "predicted_on_host": None,
    }
    assert "host memory: 5.00 GiB (the page cache itself)" in str(made)


def test_a_plan_without_its_mapping_reads_buffered_and_says_why() -> None:
    made = plan(GPU).unmapped("page-locking was refused")
    assert (made.read_mode, made.reason) == ("buffered", "page-locking was refused")
    assert "page cache itself" not in str(made)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (4, 1 << 20)),
        ({"read_mode": "buffered"}, (8, 8 << 20)),
        ({"read_threads": 3}, (3, 1 << 20)),
        ({"read_threads": 3, "n_cpu_pinned": 1}, (3, 8 << 20)),
        ({"read_chunk": 8192}, (8, 8192)),
    ],
)
def test_direct_reads_go_as_they_were_measured_to_be_fastest_unless_told_otherwise(
    options: dict[str, Any], expected: tuple[int, int]
) -> None:
    planned = plan(replace(TIGHT, readers={"direct": (4, 1 << 20)}), **options)
    assert (planned.read_threads, planned.read_chunk) == expected
