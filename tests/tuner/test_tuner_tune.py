"""tune() over simulated trials: the best, results on record, time and memory bounds, errors."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from tuning import GIB, Simulation, machine, simulated

from layer_streamer import ConfigError, LayerStreamer, LayerStreamerTuner, TuneError
from layer_streamer.tuner.results import cache_folder
from layer_streamer.tuner.trials.record import TrialRecord

AXES = {"n_gpu_values": [1, 2, 4], "read_threads_values": [1, 2], "read_chunk_values": [1 << 20]}
FIXED = {"device": "cpu", "read_mode_values": ["buffered"], "track_progress": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model", 6)
    return tmp_path / "model"


def open_tuner(model: Path, **options: Any) -> LayerStreamerTuner:
    return LayerStreamerTuner.from_checkpoint(model, **(AXES | FIXED | options))


def cost(settings: Mapping[str, Any]) -> float:
    return 0.1 / settings["n_gpu"] + 0.01 * settings["read_threads"]


BEST = {"n_gpu": 4, "read_threads": 1}


def setup_of_this_file(streamer: LayerStreamer) -> Any:
    return lambda: streamer.run_pass(None, lambda x, w, i: x)


def on_copy_of_this_file(layer_idx: int, stream: object) -> None: ...


def test_tune_returns_what_both_ways_to_open_a_streamer_take(model: Path) -> None:
    tuner = open_tuner(model, strategy="grid")
    simulated(tuner, cost)
    best = tuner.tune()
    assert {name: best[name] for name in BEST} == BEST
    with LayerStreamer.from_checkpoint(model, device="cpu", **best) as streamer:  # type: ignore[arg-type]
        assert streamer.plan.read_threads == 1
    assert tuner.best is not None
    assert tuner.best.seconds == pytest.approx(0.035)
    assert len(tuner.results) == 6


def test_defaults_are_searched_and_a_race_is_done_before_the_grid(model: Path) -> None:
    found = machine(unified=False)
    tuner = LayerStreamerTuner.from_checkpoint(model, track_progress=False)
    started = simulated(tuner, lambda s: 1.0 + 0.1 * (s.get("read_mode") != "mapped"), found)
    best = tuner.tune()
    assert best["read_mode"] == "mapped"
    assert 1 <= len(started.started) < 30
    assert started.limits[0].best_seconds is None
    assert started.limits[-1].best_seconds == pytest.approx(1.0)


def test_a_second_tune_returns_at_once_and_says_so(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_tuner(model)
    simulated(first, cost)
    expected = first.tune()
    second = open_tuner(model)
    started = simulated(second, cost)
    with caplog.at_level(logging.INFO, "layer_streamer"):
        assert second.tune() == expected
    assert not started.started
    assert "results were on record" in caplog.text
    assert [r.settings for r in second.results if r.seconds] == [
        r.settings for r in first.results if r.seconds
    ]


def test_trials_of_a_file_with_null_for_a_pool_still_count_and_come_back_as_0(model: Path) -> None:
    path = model.parent / "results"
    options: dict[str, Any] = {"n_cpu_pinned_values": [0], "results_path": path, "strategy": "grid"}
    first = open_tuner(model, **options)
    simulated(first, cost)
    expected = first.tune()
    assert expected["n_cpu_pinned"] == 0
    path.write_text(path.read_text().replace('"n_cpu_pinned": 0', '"n_cpu_pinned": null'))
    again = open_tuner(model, **options | {"n_cpu_pinned_values": [None]})
    started = simulated(again, cost)
    assert again.tune() == expected
    assert not started.started
    assert [record.settings for record in again.results] == [r.settings for r in first.results]


@pytest.mark.parametrize("num_trials", [0, 1, 3, 5])
def test_an_interrupted_tune_loses_no_finished_trial(model: Path, num_trials: int) -> None:
    simulation = Simulation(cost)

    def interrupted(settings: Mapping[str, Any]) -> float:
        if len(simulation.started) > num_trials:
            raise KeyboardInterrupt
        return cost(settings)

    simulation.cost = interrupted
    tuner = open_tuner(model, strategy="grid", margin=None)
    simulated(tuner, simulation)
    with pytest.raises(KeyboardInterrupt):
        tuner.tune()
    assert len(tuner.results) == num_trials
    again = open_tuner(model, strategy="grid", margin=None)
    started = simulated(again, cost)
    best = again.tune()
    assert {name: best[name] for name in BEST} == BEST
    assert len(started.started) == 6 - num_trials
    assert len(again.results) == 6


def change_checkpoint(model: Path) -> dict[str, Any]:
    os.utime(model / "model.safetensors", ns=(1, 1))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        change_checkpoint,
        lambda model: {"n_runs": 7},
        lambda model: {"tokens": 2},
        lambda model: {"cache": "cold"},
        lambda model: {"sleep_seconds": 1.0},
        lambda model: {"dtype": torch.float16},
        lambda model: {"setup_fn": setup_of_this_file},
        lambda model: {"on_copy": on_copy_of_this_file},
        lambda model: {"tail": ["lm_head.weight"]},
        lambda model: {"reserve_bytes": 1},
        lambda model: {"layer_pattern": "model.layers.{i}."},
    ],
)
def test_results_of_something_else_are_not_taken(model: Path, change: Any) -> None:
    path = model.parent / "results"
    first = open_tuner(model, results_path=path, strategy="grid")
    simulated(first, cost)
    first.tune()
    second = open_tuner(model, results_path=path, strategy="grid", **change(model))
    started = simulated(second, cost)
    second.tune()
    assert len(started.started) == 6
    assert (
        len({json.loads(line)["layer_streamer_tune"] for line in path.read_text().splitlines()})
        == 2
    )


@pytest.mark.parametrize("changes", [False, True])
def test_results_count_as_long_as_no_function_beside_setup_fn_changes(
    model: Path, monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    name = f"a_setup_that_changes_{changes}"
    file = model.parent / f"{name}.py"
    file.write_text("def helper(): return 1\ndef setup(streamer): return helper\n")
    monkeypatch.syspath_prepend(model.parent)
    setup_fn = importlib.import_module(name).setup
    first = open_tuner(model, setup_fn=setup_fn)
    simulated(first, cost)
    first.tune()
    if changes:
        file.write_text(file.read_text().replace("return 1", "return 2"))
    second = open_tuner(model, setup_fn=setup_fn)
    started = simulated(second, cost)
    second.tune()
    assert bool(started.started) == changes


def test_slower_ones_are_tried_again_when_their_better_no_longer_counts(model: Path) -> None:
    def run(simulation: Simulation, **options: Any) -> LayerStreamerTuner:
        tuner = open_tuner(model, strategy="grid", **options)
        simulated(tuner, simulation)
        tuner.tune()
        return tuner

    class Hungry(Simulation):
        def __call__(self, *args: Any, **options: Any) -> TrialRecord:
            from dataclasses import replace

            record = super().__call__(*args, **options)
            return replace(record, peak_host_bytes=record.settings["n_gpu"] * GIB)

    run(Hungry(cost))
    simulation = Hungry(cost)
    tuner = run(simulation, max_host_bytes="2GiB")
    assert tuner.best is not None
    assert tuner.best.settings["n_gpu"] == 2
    assert any("max_host_bytes" in record.detail for record in tuner.results)
    assert all(settings["n_gpu"] < 4 for settings in simulation.started)


def test_failures_are_told_grouped_and_tried_again_the_next_time(model: Path) -> None:
    tuner = open_tuner(model)
    simulated(tuner, lambda s: "exception" if s["n_gpu"] > 1 else "hung")
    with pytest.raises(TuneError) as caught:
        tuner.tune()
    assert str(caught.value) == (
        "every candidate failed: 4 exception: as it was told; 2 hung: as it was told"
    )
    again = open_tuner(model)
    assert len(simulated(again, cost).started) == 0
    again.tune()
    assert again.best is not None


def test_one_failure_costs_one_trial_and_nothing_else(model: Path) -> None:
    tuner = open_tuner(model, strategy="grid")
    started = simulated(tuner, lambda s: "out of memory" if s["n_gpu"] == 4 else cost(s))
    best = tuner.tune()
    assert best["n_gpu"] == 2
    assert len(started.started) == 6


def test_nothing_that_fits_the_bounds_is_an_error_before_anything_is_started(model: Path) -> None:
    tuner = open_tuner(model, max_host_bytes=100)
    started = simulated(tuner, cost)
    with pytest.raises(TuneError, match=r"no candidate can work: .*max_host_bytes=100: the plan"):
        tuner.tune()
    assert not started.started
    assert {record.ending for record in tuner.results} == {"pruned"}


def test_when_the_time_is_over_the_best_so_far_is_returned_with_a_word(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    simulation = Simulation(cost)
    clock = [0.0]
    tuner = open_tuner(model, strategy="grid", max_seconds=100.0)
    simulated(tuner, simulation)
    session = tuner._session

    def run(*args: Any, **options: Any) -> TrialRecord:
        clock[0] += 40.0
        return simulation(*args, **options)

    session._run_trial = run
    session._now = lambda: clock[0]
    tuner.tune()
    assert len(simulation.started) == 3
    assert [limits.trial_seconds for limits in simulation.limits] == [100.0, 60.0, 20.0]
    assert "max_seconds=100.0 are over" in caplog.text
    assert "3 of 6 candidates were not tried" in caplog.text


def test_no_result_within_the_time_is_an_error(model: Path) -> None:
    tuner = open_tuner(model, max_seconds=0.1)
    simulated(tuner, lambda s: 1.0)
    with pytest.raises(TuneError, match=r"max_seconds=0\.1: no candidate had a result within"):
        tuner.tune()


def test_one_tune_at_a_time(model: Path) -> None:
    tuner = open_tuner(model)
    refused = []

    def tune_within(settings: Mapping[str, Any]) -> float:
        other = open_tuner(model, results_path=model.parent / "other")
        simulated(other, cost)
        with pytest.raises(ConfigError, match=r"tune\(\): another tune is using it") as caught:
            other.tune()
        refused.append(caught.value)
        return cost(settings)

    simulated(tuner, tune_within)
    tuner.tune()
    assert refused
    assert cache_folder().is_dir()


def test_cuda_that_is_up_in_this_process_is_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tuner = open_tuner(model)
    simulated(tuner, cost)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    tuner.tune()
    assert [r.message for r in caplog.records if "CUDA is initialised" in r.message]


def test_progress_tells_each_new_best_and_its_gain(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuner = open_tuner(model, strategy="grid", track_progress=True)
    times = iter([4.0, 2.0, 3.0, 1.5, 9.0, 9.0])
    simulated(tuner, lambda s: next(times))
    tuner.tune()
    out, shown = capsys.readouterr()
    assert not out
    assert "6 candidates" in shown
    assert "best so far: 4.0000 s a run: n_gpu=" in shown
    assert "best so far: 2.0000 s a run (50.0% less)" in shown
    assert "best so far: 1.5000 s a run (25.0% less)" in shown
    assert shown.count("best so far") == 3
    assert "none of the others" not in shown


def test_a_race_that_ends_early_says_how_many_it_tried_and_why(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuner = LayerStreamerTuner.from_checkpoint(model)
    trials = simulated(tuner, lambda s: 1.0, machine(unified=False))
    tuner.tune()
    shown = capsys.readouterr().err
    tried, total = len(trials.started), int(shown.split(" candidates")[0].split()[-1])
    assert 1 <= tried < total
    assert f"{tried} of {total} tried: none of the others can be better by more than 2%" in shown
