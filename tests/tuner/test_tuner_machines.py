"""Races over the default candidates on made-up machines whose speeds nobody has told the tuner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tuning import all_candidates, machine, screener

from layer_streamer.tuner.search.predict import Costs, Work
from layer_streamer.tuner.search.race import Entry, Race, enter
from layer_streamer.tuner.search.space import (
    Bounds,
    check_axes,
    default_axes,
    with_host_layers,
)
from layer_streamer.tuner.trials.record import TrialRecord

START_RUNS = 50
"""How many runs of the best candidate a trial takes beside its own runs."""
NUM_RUNS = 7
"""Of a trial, those that do not count included."""
GB = 1e9


def rate(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low * GB, high * GB)


machines = st.fixed_dictionaries(
    {
        "link": rate(16, 60),
        "cached": rate(1, 6),
        "most_cached": rate(8, 60),
        "disk": rate(0.5, 8),
        "compute": rate(20, 3000),
        "products": rate(1, 60),
    }
)


def entries_with(path: Path, counts: Sequence[int] = ()) -> list[Entry]:
    """The default candidates for a GPU, or those with host layers."""
    tiny_checkpoint(path, 12, hidden=64)
    axes = default_axes(Bounds(), 16, unified=False)
    axes = check_axes(with_host_layers(axes, counts) if counts else axes)
    found = screener(path, machine(unified=False)).screen(all_candidates(axes, unified=False))
    assert len(found.kept) >= 45
    return [enter(planned) for planned in found.kept]


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    return entries_with(tmp_path_factory.mktemp("machines") / "model")


@pytest.fixture(scope="module")
def entries_there(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    return entries_with(tmp_path_factory.mktemp("machines there") / "model", (0, 4, 6, 8, 10))


def measure(work: Work, speeds: dict[str, float]) -> TrialRecord:
    """What a trial on such a machine would say."""
    _, mode, threads, chunk, ring = work.read_class
    if mode == "direct":
        reads = speeds["disk"] * min(1.0, threads / 6)
    else:
        reads = min(speeds["most_cached"], speeds["cached"] * threads)
    reads *= 1.0 if chunk > 4 << 20 else 0.9
    reads = min(reads, chunk / 0.8e-4) if ring else reads * 0.75
    copies = {"mapped": 1.0, "pinned": 0.93, "pageable": 0.2}[work.copy_class[1]] * speeds["link"]
    needs = {
        "read": work.read / reads,
        "copy": work.copy / copies,
        "compute": work.compute / speeds["compute"],
        "host": work.there / speeds["products"],
    }
    waited = needs["copy"], needs["compute"] + needs["host"]
    seconds = needs["read"]
    for need, overlap in zip(waited, work.overlaps[1:], strict=True):
        seconds = max(seconds, need) + (1 - overlap) * min(seconds, need)
    seconds *= 1 + 0.4 * work.jitter
    return TrialRecord(
        settings={},
        ending="ok",
        run_seconds=(seconds,),
        pass_seconds=seconds,
        step_bytes={
            "read": int(work.read),
            "copy": int(work.copy),
            "compute": int(work.compute),
            "host": int(work.there),
        },
        stalled_seconds={step: seconds - need for step, need in needs.items()},
    )


def race_over(entries: Sequence[Entry], speeds: dict[str, float]) -> tuple[float, float]:
    """How much slower the race's best is than the best, and its share of the exhaustive time."""
    records = [measure(entry.work, speeds) for entry in entries]
    times = [record.run_seconds[0] for record in records]
    race = Race(entries, Costs("warm", None, unified=False))
    spent, start = 0.0, START_RUNS * min(times)
    while (index := race.next()) is not None:
        best = race.best_seconds
        if best is not None and times[index] > best * 1.1:
            race.tell_slower(index, best * 1.1)
            spent += start + 2 * best
        else:
            race.tell(index, records[index])
            spent += start + NUM_RUNS * times[index]
    assert race.best_seconds is not None
    exhaustive = sum(start + NUM_RUNS * seconds for seconds in times)
    return race.best_seconds / min(times) - 1, spent / exhaustive


# A search that goes wrong takes a second: to shrink it would take minutes.
quick = settings(
    deadline=None,
    max_examples=30,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(speeds=machines)
def test_a_race_comes_within_three_percent_of_the_best_in_a_quarter_of_the_time(
    entries: list[Entry], speeds: dict[str, float]
) -> None:
    loss, share = race_over(entries, speeds)
    assert loss <= 0.03
    assert share <= 0.25


@quick
@given(speeds=machines)
def test_a_race_among_host_layers_comes_within_three_percent_in_half_of_the_time(
    entries_there: list[Entry], speeds: dict[str, float]
) -> None:
    loss, share = race_over(entries_there, speeds)
    assert loss <= 0.03
    assert share <= 0.5


def test_what_was_tried_does_not_look_better_than_what_was_not_because_it_was_tried(
    entries: list[Entry],
) -> None:
    # Mapped files are tried first, and are slow here: reads are to be looked at all the same.
    slow_link = {"link": 10 * GB, "cached": 6 * GB, "most_cached": 60 * GB, "disk": GB}
    loss, _ = race_over(entries, slow_link | {"compute": 3000 * GB, "products": GB})
    assert loss <= 0.03
