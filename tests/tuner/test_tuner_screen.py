"""Pruning from the plan's arithmetic, and predictions: never against the best that can work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from hypothesis import strategies as st
from tried import tried
from tuning import GIB, all_candidates, machine, screener

from layer_streamer import LayerStreamer
from layer_streamer.tuner.search.predict import (
    Costs,
    floor_seconds,
    learn,
    predict_seconds,
    work_of,
)
from layer_streamer.tuner.search.screen import Planned
from layer_streamer.tuner.search.space import Bounds
from layer_streamer.tuner.trials.record import TrialRecord

AXES: dict[str, list[Any]] = {
    "n_gpu": [0, 1, 2],
    "n_cpu_pinned": [None, 2],
    "n_cpu": [None, 2],
    "batch_gpu": [None, 2],
    "read_mode": ["mapped", "buffered", "direct"],
    "read_threads": [1, 4],
}
NUM_LAYERS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("screen") / "model"
    tiny_checkpoint(path, NUM_LAYERS, hidden=64)
    return path


def planned(path: Path, *, unified: bool = False, **values: Any) -> Planned:
    """The plan of one candidate."""
    axes = {name: [value] for name, value in values.items()}
    screened = screener(path, machine(unified=unified)).screen(
        all_candidates(axes, unified=unified)
    )
    (only,) = screened.kept
    return only


@tried(30, 100, device=st.integers(0, 600_000), host=st.integers(0, 900_000), unified=st.booleans())
def test_what_is_pruned_exceeds_a_bound_and_what_is_kept_does_not(
    checkpoint: Path, device: int, host: int, unified: bool
) -> None:
    found = all_candidates(AXES, unified=unified)
    free = screener(checkpoint, machine(unified=unified)).screen(found)
    bounded = screener(checkpoint, machine(unified=unified), Bounds(device, host)).screen(found)
    assert free.kept
    assert not free.pruned
    kept = [p.settings for p in bounded.kept]
    for candidate in free.kept:
        place = candidate.plan.placement
        used = sum(place.device_bytes) if unified else place.host_bytes
        fits = max(place.device_bytes) <= device and used <= host
        assert (candidate.settings in kept) == fits
    for record in bounded.pruned:
        assert record.ending == "pruned"
        assert "max_device_bytes=" in record.detail or "max_host_bytes=" in record.detail


def test_on_the_cpu_the_plan_is_the_one_that_the_streamer_opens_with(checkpoint: Path) -> None:
    settings = {"n_gpu": 2, "n_cpu_pinned": 3, "n_cpu": None, "read_mode": "buffered"}
    expected = planned(checkpoint, unified=True, **settings).plan
    with LayerStreamer.from_checkpoint(checkpoint, device="cpu", **settings) as streamer:  # type: ignore[arg-type]
        assert streamer.plan.placement == expected.placement
        assert streamer.plan.read_mode == expected.read_mode


def test_a_budget_below_its_slots_is_pruned_with_the_planners_words(checkpoint: Path) -> None:
    axes = {"n_gpu": [2], "device_budget": [1000]}
    screened = screener(checkpoint, machine(unified=False)).screen(
        all_candidates(axes, unified=False)
    )
    assert not screened.kept
    assert "device_budget=1000" in screened.pruned[0].detail


def test_what_a_device_cannot_hold_is_pruned(checkpoint: Path) -> None:
    found = machine(unified=False, device=70_000)
    axes = {"n_gpu": [0, 8], "n_cpu_pinned": [2]}
    screened = screener(checkpoint, found).screen(all_candidates(axes, unified=False))
    assert [p.settings["n_gpu"] for p in screened.kept] == [0]
    assert "of a device with" in screened.pruned[0].detail


def test_mapped_files_are_pruned_where_the_device_cannot_copy_from_them(checkpoint: Path) -> None:
    found = replace(machine(unified=False), maps_files=False)
    axes = {"read_mode": ["mapped", "buffered"]}
    screened = screener(checkpoint, found).screen(all_candidates(axes, unified=False))
    assert [p.plan.read_mode for p in screened.kept] == ["buffered"]
    assert len(screened.pruned) == 1


def test_candidates_that_are_opened_alike_run_once(checkpoint: Path) -> None:
    # Everything fits on the device: nothing streams, and no pool is built.
    axes = {"n_gpu": [1, 2], "n_cpu_pinned": [2, 4], "device_budget": [GIB]}
    screened = screener(checkpoint, machine(unified=False)).screen(
        all_candidates(axes, unified=False)
    )
    assert len(screened.kept) == 1
    assert screened.num_equal == 3


def test_planning_hundreds_of_candidates_logs_nothing(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = replace(machine(unified=False, host=1000), maps_files=False)
    axes = {"read_mode": ["mapped", "direct"], "host_budget": [GIB], "n_cpu_pinned": [None, 2]}
    screener(checkpoint, found).screen(all_candidates(axes, unified=False))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def seconds(path: Path, costs: Costs | None = None, **values: Any) -> float:
    costs = costs or Costs("warm", None, unified=False)
    return predict_seconds(work_of(planned(path, **values)), costs)


def test_predictions_have_the_order_that_the_pipeline_gives(checkpoint: Path) -> None:
    base = {"n_gpu": 2, "n_cpu_pinned": 4, "read_mode": "buffered", "read_threads": 8}
    expected = seconds(checkpoint, **base)
    assert seconds(checkpoint, n_gpu=2, read_mode="mapped") < expected
    # A ring: faster, unless its parts are small for what comes out of the page cache.
    assert seconds(checkpoint, **(base | {"n_cpu_pinned": None})) < expected
    pools = base | {"read_chunk": 4096}
    assert seconds(checkpoint, **(pools | {"n_cpu_pinned": None})) > seconds(checkpoint, **pools)
    for worse in (
        {"n_gpu": 0},
        {"n_gpu": 1},
        {"batch_gpu": 3},
        {"n_cpu_pinned": None, "n_cpu": 4},
        {"n_cpu": 4},
        {"read_mode": "direct"},
        {"read_threads": 1},
        {"read_chunk": 4096},
    ):
        assert seconds(checkpoint, **(base | worse)) > expected, worse


def test_layers_on_the_device_cost_nothing_to_move(checkpoint: Path) -> None:
    some = seconds(checkpoint, n_gpu=2, read_mode="mapped", device_budget=200_000)
    none = seconds(checkpoint, n_gpu=2, read_mode="mapped")
    assert some < none


def test_trials_tell_what_compute_and_copies_need(checkpoint: Path) -> None:
    work = work_of(planned(checkpoint, n_gpu=2, n_cpu_pinned=4, read_mode="buffered"))
    record = TrialRecord(
        settings={},
        ending="ok",
        run_seconds=(8.0,),
        pass_seconds=2.0,
        step_bytes={"read": int(work.read), "copy": int(work.copy), "compute": int(work.compute)},
        stalled_seconds={"read": 0.5, "copy": 1.0, "compute": 1.5},
    )
    costs = learn(Costs("warm", None, unified=False), [(work, record)])
    assert costs.passes == 4
    assert costs.compute_seconds == 2.0
    # Each step's own seconds of the run: 4 passes of 1.5 s of reads, 1 s of copies.
    assert floor_seconds(work, costs) == pytest.approx(6.0)
    mapped = work_of(planned(checkpoint, n_gpu=2, read_mode="mapped"))
    assert floor_seconds(mapped, costs) == pytest.approx(2.0)
    assert predict_seconds(work, costs) >= 6.0


@pytest.mark.parametrize("speed", [0.1, 10.0])
def test_a_trial_tells_how_far_the_guesses_of_others_like_it_are_off(
    checkpoint: Path, speed: float
) -> None:
    base = {"n_gpu": 2, "n_cpu_pinned": 4, "read_mode": "direct", "read_chunk": 8 << 20}
    some, more = (work_of(planned(checkpoint, **base, read_threads=n)) for n in (4, 16))
    costs = Costs("warm", None, unified=False, compute_seconds=0.0)
    before = predict_seconds(more, costs) / predict_seconds(some, costs)
    took = predict_seconds(some, costs) / speed
    record = TrialRecord(
        settings={}, ending="ok", run_seconds=(took,), pass_seconds=took,
        step_bytes={"read": int(some.read), "compute": int(some.compute)},
        stalled_seconds={"compute": took},
    )  # fmt: skip
    learned = learn(costs, [(some, record)])
    after = predict_seconds(more, learned) / predict_seconds(some, learned)
    assert after == pytest.approx(before, rel=0.05 if speed < 1 else 1.0)


def test_the_floor_of_a_trial_is_never_above_what_it_took(checkpoint: Path) -> None:
    work = work_of(planned(checkpoint, n_gpu=2, n_cpu_pinned=4, read_mode="buffered"))
    for stalled in (0.0, 0.3, 5.0):
        record = TrialRecord(
            settings={}, ending="ok", run_seconds=(1.0,), pass_seconds=1.0,
            step_bytes={"read": 1, "copy": 1, "compute": 1},
            stalled_seconds=dict.fromkeys(("read", "copy", "compute"), stalled),
        )  # fmt: skip
        costs = learn(Costs("warm", None, unified=False), [(work, record)])
        assert floor_seconds(work, costs) <= 1.0


def test_on_the_cpu_there_is_no_floor(checkpoint: Path) -> None:
    work = work_of(planned(checkpoint, unified=True, n_gpu=2, read_mode="buffered"))
    assert floor_seconds(work, Costs("warm", None, unified=True, compute_seconds=5.0)) == 0.0
