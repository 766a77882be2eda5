"""The race: under a cost without noise that its assumption covers, the best is never discarded."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tried import tried
from tuning import NO_COSTS, entry, run_race

from layer_streamer.tuner.search.bounds import COMMON, REACH, SIZES, LowerBounds
from layer_streamer.tuner.search.race import LEAST_TRIALS, Race
from layer_streamer.tuner.trials.record import TrialRecord

VALUES = {
    "n_gpu": (1, 2, 3),
    "n_cpu_pinned": (2, 4),
    "read_mode": ("mapped", "buffered"),
    "read_threads": (2, 4, 8),
}
GRID = [dict(zip(VALUES, row, strict=True)) for row in itertools.product(*VALUES.values())]
seconds = st.floats(1e-3, 1e3)
cost_tables = st.lists(st.tuples(seconds, seconds), min_size=1, max_size=12)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Predicted and true seconds of GRID, as far apart as the assumption allows."""
    keys = [(name, value) for name, values in VALUES.items() for value in values]
    raw = draw(st.lists(st.floats(-1, 1), min_size=len(keys) + 1, max_size=len(keys) + 1))
    length = math.sqrt(sum(x * x for x in raw))
    # Just inside: at the border itself, rounding decides.
    scale = 0.999 * REACH * draw(st.floats(0, 1)) / length if length > 1e-6 else 0.0
    effect = {key: x * scale * SIZES[key[0]] for key, x in zip(keys, raw[1:], strict=True)}
    base = {key: draw(st.floats(0.5, 2)) for key in keys}
    predicted = [math.prod(base[item] for item in row.items()) for row in GRID]
    common = raw[0] * scale * COMMON
    true = [
        guess * math.exp(common + sum(effect[item] for item in row.items()))
        for guess, row in zip(predicted, GRID, strict=True)
    ]
    return predicted, true


def make_race(predicted: list[float], **options: Any) -> Race:
    entries = [entry(row, guess) for row, guess in zip(GRID, predicted, strict=True)]
    return Race(entries, NO_COSTS, **options)


@tried(
    60, 150, world=worlds(), margin=st.sampled_from([None, 0.0, 0.1, 0.5]),
    tolerance=st.sampled_from([0.0, 0.02, 0.1]),
)  # fmt: skip
def test_a_race_ends_with_the_best_to_within_its_tolerance(
    world: tuple[list[float], list[float]], margin: float | None, tolerance: float
) -> None:
    predicted, true = world
    race = make_race(predicted, tolerance=tolerance)
    run_race(race, true, margin)
    assert race.best_seconds is not None
    assert race.best_seconds <= min(true) * (1 + tolerance) * (1 + 1e-9)


@tried(
    60, 150, world=worlds(), num_tried=st.integers(0, len(GRID)),
    margin=st.sampled_from([None, 0.1]),
)  # fmt: skip
def test_no_candidate_is_ever_faster_than_its_lower_bound(
    world: tuple[list[float], list[float]], num_tried: int, margin: float | None
) -> None:
    predicted, true = world
    logs = [math.log(t / p) for t, p in zip(true, predicted, strict=True)]
    best = min(true[:num_tried], default=math.inf)
    slower = {i for i in range(num_tried) if margin is not None and true[i] > best * (1 + margin)}
    measured = {i: logs[i] for i in range(num_tried) if i not in slower}
    exceeded = {i: math.log(best * (1 + (margin or 0)) / predicted[i]) for i in slower}
    lower = LowerBounds(GRID, measured, exceeded).lower()
    assert all(low <= log + 1e-6 for low, log in zip(lower, logs, strict=True))


@settings(deadline=None)
@given(cost_tables, st.sampled_from([None, 0.0, 0.1]))
def test_a_grid_finds_the_best_whatever_the_predictions_and_the_costs(
    table: list[tuple[float, float]], margin: float | None
) -> None:
    entries = [entry({}, predicted) for predicted, _ in table]
    race = Race(entries, NO_COSTS, "grid")
    order = run_race(race, [true for _, true in table], margin)
    assert sorted(order) == list(range(len(table)))
    assert race.best_seconds == min(true for _, true in table)


@settings(deadline=None)
@given(cost_tables)
def test_a_grid_goes_by_the_predictions(table: list[tuple[float, float]]) -> None:
    race = Race([entry({}, predicted) for predicted, _ in table], NO_COSTS, "grid")
    order = run_race(race, [true for _, true in table])
    predicted = [table[index][0] for index in order]
    assert predicted == sorted(predicted)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 10), st.floats(0.2, 1)), min_size=1, max_size=30),
    st.floats(0, 0.2),
)
def test_a_race_may_stop_at_the_floor_but_never_above_it(
    table: list[tuple[float, float]], tolerance: float
) -> None:
    true = [cost for cost, _ in table]
    entries = [entry({}, cost, floor=cost * share) for cost, share in table]
    race = Race(entries, NO_COSTS, tolerance=tolerance)
    order = run_race(race, true, margin=None)
    assert race.best_seconds is not None
    untried = set(range(len(table))) - set(order)
    assert all(true[i] >= race.best_seconds / (1 + tolerance) - 1e-9 for i in untried)


def test_candidates_that_are_at_the_limit_of_the_hardware_end_a_race_at_once() -> None:
    race = Race([entry(row, 1.0, floor=0.99) for row in GRID], NO_COSTS)
    assert len(run_race(race, [1.0] * len(GRID))) == LEAST_TRIALS


def test_a_race_learns_which_values_do_not_matter_and_stops_in_a_quarter_of_the_grid() -> None:
    race = make_race([1.2 if row["read_threads"] == 2 else 1.0 for row in GRID])
    order = run_race(race, [0.05 if row["read_threads"] == 2 else 0.04 for row in GRID])
    assert race.best_seconds == 0.04
    assert len(order) <= len(GRID) // 4


@pytest.mark.parametrize(("tolerance", "is_tried"), [(0.02, True), (0.1, True), (0.3, False)])
def test_a_candidate_that_may_be_better_by_more_than_the_tolerance_is_tried(
    tolerance: float, is_tried: bool
) -> None:
    alike = [entry({"batch_gpu": 1}, 1.0) for _ in range(LEAST_TRIALS)]
    # An effect of 0.05 each for two values, and 2.5 times that is possible.
    other = entry({"batch_gpu": 2}, 1.06)
    race = Race([*alike, other], NO_COSTS, tolerance=tolerance)
    order = run_race(race, [1.0] * LEAST_TRIALS + [0.9])
    assert (len(alike) in order) == is_tried


def test_the_first_trial_is_the_one_that_is_predicted_to_be_the_best() -> None:
    predicted = [1.0 + 0.01 * ((7 * i) % len(GRID)) for i in range(len(GRID))]
    race = make_race(predicted)
    assert race.next() == 0


def test_a_candidate_that_was_slower_than_a_best_that_is_gone_is_tried_again() -> None:
    race = Race([entry({}, 1.0), entry({}, 2.0)], NO_COSTS, "grid")
    race.tell_slower(1, 5.0)
    record = TrialRecord(settings={}, ending="ok", run_seconds=(7.0,))
    race.tell(0, record)
    assert race.next() == 1


def test_a_candidate_that_took_too_much_memory_is_not_the_best_however_fast() -> None:
    race = Race([entry({}, 1.0), entry({}, 2.0)], NO_COSTS, "grid")
    race.tell(0, TrialRecord(settings={}, ending="ok", run_seconds=(1.0,)), admissible=False)
    assert race.best_seconds is None
    assert race.next() == 1


@pytest.mark.parametrize("strategy", ["grid", "race"])
def test_candidates_that_fail_are_not_tried_again(strategy: Any) -> None:
    race = make_race([1.0] * len(GRID), strategy=strategy)
    for _ in GRID:
        index = race.next()
        assert index is not None
        race.tell_failed(index)
    assert race.next() is None
