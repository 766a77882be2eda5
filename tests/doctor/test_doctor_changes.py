"""What a checkup says would shorten a pass, against the plan that comes of doing so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from layer_streamer import ConfigError, parse_bytes, plan_checkpoint, read_manifest
from layer_streamer.assembly import draw_plan
from layer_streamer.devices.accelerator import open_devices
from layer_streamer.doctor.changes import (
    MOST_CHANGES,
    WORTH,
    Change,
    changes_of,
    spell,
)
from layer_streamer.planning.placement import Rates, StepSize
from layer_streamer.planning.plan import Machine, Plan
from layer_streamer.planning.planner import make_plan, usable
from layer_streamer.planning.settings import Settings

GIB, MIB = 1 << 30, 1 << 20
GPU = Machine(
    devices=("cuda:0",), unified=False, maps_files=True, device_free=(23 * GIB,),
    host_available=64 * GIB, rates=Rates(2e9, (25e9,)),
)  # fmt: skip
SMALL_HOST = replace(GPU, host_available=6 * GIB)
CPU = replace(
    GPU, devices=("cpu",), unified=True, maps_files=False, device_free=(64 * GIB,),
    rates=Rates(2e9, (None,)),
)  # fmt: skip


def step(nbytes: int) -> StepSize:
    return StepSize(nbytes, nbytes, nbytes, nbytes, nbytes)


def planned(sizes: Sequence[StepSize], machine: Machine, **options: Any) -> Plan:
    return make_plan(sizes, 0, machine, Settings(**options), lambda: 0.0)


def changes(sizes: Sequence[StepSize], machine: Machine, **options: Any) -> tuple[Change, ...]:
    return changes_of(planned(sizes, machine, **options), Settings(**options), 0.0)


def moved(plan: Plan) -> tuple[float, float]:
    """GB that are read and copied."""
    pairs = list(zip(plan.sizes, plan.tiers, strict=True))
    read = sum(size.read_nbytes for size, tier in pairs if tier == "disk")
    return read / 1e9, sum(size.copy_nbytes for size, tier in pairs if tier != "device") / 1e9


def check_true(change: Change, plan: Plan, other: Plan) -> None:
    """The line says what the plan with that option gives."""
    if change.unit == "s":
        assert (change.now, change.then) == (plan.predicted_seconds, other.predicted_seconds)
    else:
        assert (change.now, change.then) in list(zip(moved(plan), moved(other), strict=True))
    assert change.then <= (1 - WORTH) * change.now
    assert change.more_layers == other.tiers.count(change.tier) - plan.tiers.count(change.tier)
    said = re.fullmatch(r"--([a-z-]+) (\S+) (.+): (\S+) instead of (\S+) (.+)", change.text)
    assert said is not None, change.text
    assert said[1].replace("-", "_") == change.option
    if change.option.endswith("budget"):
        assert parse_bytes(change.option, said[2]) == change.value
    else:
        assert said[2] == str(change.value)
    count = re.search(r"keeps (\d+) more", said[3])
    assert count is None or int(count[1]) == change.more_layers
    assert "keeps all" not in said[3] or set(other.tiers) == {change.tier}
    assert float(said[5]) == pytest.approx(change.now, rel=0.06)
    then = 0.0 if said[4] == "nothing" else float(said[4])
    assert then < float(said[5])
    assert then == pytest.approx(change.then, abs=0.06 * change.now)
    assert (said[4] == "nothing") == (change.then == 0)


BUDGETS = st.sampled_from([None, "auto", "3GiB", "7GiB", "20GiB"])
SIZES = st.lists(st.sampled_from([200, 900, 1024]), min_size=1, max_size=24)
RATES = st.sampled_from([Rates(2e9, (25e9,)), Rates(None, (25e9,)), Rates(None, (None,))])


@settings(deadline=None, max_examples=60)
@given(SIZES, st.sampled_from([GPU, SMALL_HOST, CPU]), RATES, BUDGETS, BUDGETS)
def test_every_change_is_what_the_plan_with_it_gives(
    mebibytes: list[int], machine: Machine, rates: Rates, device: Any, host: Any
) -> None:
    sizes, machine = [step(n * MIB) for n in mebibytes], replace(machine, rates=rates)
    options = {"device_budget": device, "host_budget": host}
    try:
        plan = planned(sizes, machine, **options)
    except ConfigError:
        return
    found = changes(sizes, machine, **options)
    assert len(found) <= MOST_CHANGES
    for change in found:
        other = planned(sizes, machine, **options | {change.option: change.value})
        check_true(change, plan, other)
        if change.option.endswith("budget"):
            free = machine.host_available if change.option[0] == "h" else machine.device_free[0]
            assert int(change.value) <= usable(free)


def test_it_is_said_as_people_say_it() -> None:
    found = changes([step(GIB)] * 20, GPU, device_budget="6GiB")
    assert found[0].text == "--device-budget 20GiB keeps all 20 layers in device memory: " + (
        "nothing instead of 0.73 s"
    )
    assert found[-1].text == "--device-budget 7GiB keeps 1 more layer in device memory: " + (
        "0.69 instead of 0.73 s"
    )


def test_where_rates_are_unknown_bytes_are_compared() -> None:
    machine = replace(SMALL_HOST, rates=Rates(None, (None,)))
    texts = [change.text for change in changes([step(GIB)] * 20, machine)]
    # What the device leaves is then in the page cache, from which it is copied.
    assert texts[0] == (
        "--device-budget 18GiB keeps 15 more layers in device memory: "
        "nothing instead of 21.47 GB read a pass"
    )
    copied = [
        change.text for change in changes([step(GIB)] * 20, replace(GPU, rates=machine.rates))
    ]
    assert copied[0] == (
        "--device-budget 20GiB keeps all 20 layers in device memory: "
        "nothing instead of 21.47 GB copied a pass"
    )


def test_of_changes_that_help_equally_the_smallest_budget_is_named() -> None:
    found = changes([step(GIB)] * 4, GPU, device_budget="3GiB")
    assert [change.value for change in found if change.option == "device_budget"] == [4 * GIB]


def test_where_nothing_moves_nothing_helps() -> None:
    assert changes([step(GIB)] * 4, GPU, device_budget="8GiB") == ()


def test_what_is_not_free_is_not_proposed() -> None:
    full = replace(GPU, device_free=(256 * MIB,))
    assert changes([step(GIB // 64)] * 20, full) == ()


def test_on_the_cpu_the_budget_that_is_named_is_the_one_to_change() -> None:
    for option in ("device_budget", "host_budget"):
        found = changes([step(GIB)] * 20, CPU, **{option: "9GiB"})
        assert {change.option for change in found} == {option}


def test_a_budget_of_auto_is_the_most_there_is() -> None:
    found = changes([step(GIB)] * 40, SMALL_HOST, device_budget="auto", host_budget="auto")
    assert not any(change.option.endswith("budget") for change in found)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(7 * GIB, "7GiB"), (5376 * MIB, "5.25GiB"), (17 * MIB, "17MiB"), (4096, "4KiB"), (17, "17")],
)
def test_budgets_are_spelled_without_rounding(nbytes: int, text: str) -> None:
    assert spell(nbytes) == text
    assert parse_bytes("device_budget", text) == nbytes


@pytest.mark.parametrize("options", [{}, {"host_budget": "1200KiB"}, {"n_gpu": 0}])
def test_changes_of_a_real_checkpoint_are_those_of_the_streamer(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    tiny_checkpoint(tmp_path, 30, hidden=64)
    asked: dict[str, Any] = {"device": "cpu", **options}
    plan = draw_plan(read_manifest(tmp_path), open_devices("cpu"), Settings(**asked), {"read": 1e6})
    found = changes_of(plan, Settings(**asked), 0.0)
    assert found
    for change in found:
        other = plan_checkpoint(tmp_path, **asked | {change.option: change.value})
        read = moved(other)[0] * 1e9
        assert change.then == pytest.approx(read / 1e6)
        assert change.more_layers == other.tiers.count("device") - plan.tiers.count("device")
