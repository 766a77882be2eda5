"""When a trial is to be ended, from what was said and the clock alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_streamer.tuner.trials.course import DELIVERY_SECONDS, START_SECONDS, Course
from layer_streamer.tuner.trials.record import TrialLimits

SECONDS = st.floats(0.001, 1e4)


def course(**limits: Any) -> Course:
    return Course(TrialLimits(**{"trial_seconds": 1e6, "hang_seconds": 1e5} | limits), 100.0)


def begin(some: Course, stage: str, timed: str, now: float) -> None:
    assert some.hear({"stage": stage, "timed": timed}, now) == stage


def ran(some: Course, seconds: float, now: float) -> None:
    assert some.hear({"seconds": seconds, "device_peak": 0}, now) is None


def test_a_trial_without_a_word_is_hung_after_the_time_that_a_start_may_take() -> None:
    due = course(hang_seconds=5.0).due()
    assert (due.when, due.ending) == (100 + START_SECONDS, "hung")
    due = course(hang_seconds=1000.0).due()
    assert due.when == 1100


def test_every_word_starts_the_patience_anew() -> None:
    some = course(hang_seconds=5.0)
    begin(some, "open", "", 110.0)
    assert some.due().when == 115
    some.hear({"alive": True}, 114.0)
    due = some.due()
    assert (due.when, due.ending) == (119, "hung")
    assert "open" in due.detail
    assert "hang_seconds=5" in due.detail


def test_a_pause_that_was_asked_for_is_no_hang() -> None:
    some = Course(TrialLimits(hang_seconds=5.0), 100.0, sleep_seconds=30.0)
    begin(some, "sleep", "", 110.0)
    assert some.due().when == 145
    begin(some, "before run 2", "untimed", 140.0)
    assert some.due().when == 145


def test_the_limit_of_the_whole_trial_holds_however_much_is_said() -> None:
    some = course(trial_seconds=50.0)
    some.hear({"alive": True}, 149.0)
    due = some.due()
    assert (due.when, due.ending) == (150, "timed out")


@given(SECONDS, st.floats(0, 2), SECONDS)
def test_a_measured_run_is_due_when_it_passes_the_best_and_its_margin(
    best: float, margin: float, begins: float
) -> None:
    some = course(best_seconds=best, margin=margin)
    begin(some, "run 2", "measured", 100 + begins)
    due = some.due()
    assert due.ending == "slower"
    assert due.when == pytest.approx(100 + begins + best * (1 + margin) + DELIVERY_SECONDS)
    assert DELIVERY_SECONDS < 0.5


@given(SECONDS, SECONDS, st.floats(0, 2))
def test_a_run_that_ended_is_judged_by_its_own_clock(
    best: float, seconds: float, margin: float
) -> None:
    some = course(best_seconds=best, margin=margin)
    begin(some, "run 2", "measured", 101.0)
    ran(some, seconds, 101.0 + seconds)
    assert some.run_seconds == [seconds]
    assert (some.verdict is not None) == (seconds > best * (1 + margin))
    assert some.verdict is None or some.verdict[0] == "slower"


def test_between_runs_nothing_is_slow() -> None:
    some = course(best_seconds=1.0)
    begin(some, "run 2", "measured", 101.0)
    ran(some, 0.5, 101.5)
    assert some.due().ending == "hung"
    begin(some, "cache", "", 102.0)
    assert some.due().ending == "hung"


def test_without_a_best_no_run_is_slow() -> None:
    some = course(warm_up_seconds=1.0)
    for kind in ("warm-up", "untimed", "measured"):
        begin(some, "run", kind, 101.0)
        assert some.due().ending == "hung"


@given(SECONDS, SECONDS)
def test_a_run_that_is_not_measured_may_take_twice_as_long_and_never_counts(
    best: float, seconds: float
) -> None:
    some = course(best_seconds=best, margin=0.0)
    begin(some, "before run 2", "untimed", 101.0)
    assert some.due().when - 101 > 2 * best
    ran(some, seconds, 101.0)
    assert (some.run_seconds, some.verdict) == ([], None)


@given(SECONDS, SECONDS)
def test_a_first_run_is_compared_with_the_best_candidates_first_run(
    best: float, first: float
) -> None:
    some = course(best_seconds=best, margin=0.0, warm_up_seconds=first)
    begin(some, "run 1", "warm-up", 101.0)
    assert some.due().when - 101 > 2 * max(best, first)
    ran(some, 7.0, 108.0)
    assert (some.warm_up_seconds, some.run_seconds, some.verdict) == (7.0, [], None)
    unknown = course(best_seconds=best)
    begin(unknown, "run 1", "warm-up", 101.0)
    assert unknown.due().ending == "hung"


def test_the_word_of_failure_or_success_is_the_end() -> None:
    some = course()
    some.hear({"failed": "exception", "detail": "ValueError: x"}, 101.0)
    assert some.over
    assert some.verdict == ("exception", "ValueError: x")
    other = course()
    other.hear({"result": {"detail": ""}}, 101.0)
    assert other.over
    assert other.verdict is None
