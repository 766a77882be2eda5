"""Tunes over the number of layers that the processor computes: what is tried, and where none."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from assets import tiny_checkpoint as save_model
from assets import tiny_model
from checkpoints import tiny_checkpoint
from fake_device import FakeDevice, near_device
from hypothesis import strategies as st
from packed_models import write_packed
from support import open_checkpoint
from tried import tried
from tuning import GIB, Simulation, all_candidates, machine, screener, simulated, survey_of
from zoo import zoo_model

from layer_streamer import ConfigError, LayerStreamer, LayerStreamerTuner, ProductRate
from layer_streamer.machine.records import Form
from layer_streamer.planning.host_layers import balance
from layer_streamer.planning.placement import Rates
from layer_streamer.planning.plan import Machine, Plan
from layer_streamer.tools import tune_command
from layer_streamer.tuner.results import cache_folder
from layer_streamer.tuner.search.host_layers import counts_around
from layer_streamer.tuner.search.predict import (
    Costs,
    floor_seconds,
    learn,
    predict_seconds,
    work_of,
)
from layer_streamer.tuner.search.space import Bounds, check_axes, default_axes, with_host_layers
from layer_streamer.tuner.survey import Survey
from layer_streamer.tuner.trials.model_args import decode_model
from layer_streamer.tuner.trials.record import TrialRecord, TrialSpec

NUM_LAYERS = 12
MAPPED: dict[str, Any] = {"n_gpu": 2, "read_mode": "mapped"}
AS_FAST = Rates(None, (50e9,), products=50e9, beside=(50e9,))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("there") / "model"
    tiny_checkpoint(path, NUM_LAYERS, hidden=64)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tiny_model("llama", num_hidden_layers=4)
    return save_model(tmp_path_factory.mktemp("engine there") / "model", network)


def probed(rates: Rates = AS_FAST, **memory: int) -> Machine:
    return replace(machine(unified=False, **memory), rates=rates)


def plan_of(path: Path, found: Machine, **settings: Any) -> Plan:
    (only,) = screener(path, found).screen([settings]).kept
    return only.plan


def cost(settings: Mapping[str, Any]) -> float:
    """Six layers are the best; reading costs."""
    there = settings.get("host_layers", 0)
    return 1.0 + 0.05 * abs(there - 6) + 0.5 * (settings.get("read_mode") != "mapped")


def open_tuner(path: Path, **options: Any) -> LayerStreamerTuner:
    return LayerStreamerTuner.from_checkpoint(path, track_progress=False, **options)


def tried_counts(started: Simulation) -> set[int]:
    return {int(settings.get("host_layers") or 0) for settings in started.started}


@tried(30, 200, products=st.floats(1e8, 1e12), link=st.floats(1e9, 1e12))
def test_counts_lie_around_what_measured_rates_suggest_with_none_among_them(
    checkpoint: Path, products: float, link: float
) -> None:
    rates = Rates(None, (link,), products=products, beside=(link,))
    plan = plan_of(checkpoint, probed(rates), **MAPPED)
    counts = counts_around(plan, NUM_LAYERS)
    assert counts[0] == 0 and list(counts) == sorted(set(counts)) and counts[-1] <= NUM_LAYERS
    best = balance(plan, plan.layers, NUM_LAYERS)
    assert best in counts
    assert counts[-1] > best or best in (0, NUM_LAYERS) or round(best * 5 / 4) == best


def test_where_nothing_was_measured_counts_follow_a_guess(checkpoint: Path) -> None:
    plan = plan_of(checkpoint, machine(unified=False), **MAPPED)
    assert counts_around(plan, NUM_LAYERS) == (0, 2, 4, 5, 6)


@pytest.mark.parametrize(
    ("found", "settings"),
    [
        (machine(unified=True), {"n_gpu": 2}),
        (probed(), {"n_gpu": 2, "read_mode": "direct"}),  # the disk holds passes up
        (probed(), {"device_budget": GIB}),  # nothing streams
    ],
)
def test_where_host_layers_could_spare_nothing_none_are_suggested(
    checkpoint: Path, found: Machine, settings: dict[str, Any]
) -> None:
    assert counts_around(plan_of(checkpoint, found, **settings), NUM_LAYERS) == (0,)


def test_candidates_that_differ_in_host_layers_alone_are_planned_as_streamers_plan_them(
    checkpoint: Path,
) -> None:
    counts: list[Any] = [0, 4, 7, "auto"]
    settings = [{**MAPPED, "host_layers": count} for count in counts]
    kept = screener(checkpoint, probed()).screen(settings).kept
    assert [len(planned.plan.host_layers) for planned in kept] == [0, 4, 7, 6]
    for planned in kept[1:3]:
        with open_checkpoint(FakeDevice(1), checkpoint, **planned.settings) as streamer:
            assert streamer.plan.placement == planned.plan.placement
            assert streamer.plan.host_layers == planned.plan.host_layers


def test_predictions_fall_until_the_processor_takes_longer_than_the_link(checkpoint: Path) -> None:
    settings = [{**MAPPED, "host_layers": count} for count in range(NUM_LAYERS + 1)]
    kept = screener(checkpoint, probed()).screen(settings).kept
    costs = Costs("warm", None, unified=False)  # guesses: the link is a third faster
    seconds = [predict_seconds(work_of(planned), costs) for planned in kept]
    least = seconds.index(min(seconds))
    assert least == 5
    assert seconds[: least + 1] == sorted(seconds[: least + 1], reverse=True)
    assert seconds[least:] == sorted(seconds[least:])


def test_compute_of_trials_counts_by_the_part_that_the_device_computes(checkpoint: Path) -> None:
    settings = [{**MAPPED, "host_layers": count} for count in (0, 6, 9)]
    kept = screener(checkpoint, probed()).screen(settings).kept
    whole, half, quarter = (work_of(planned) for planned in kept)
    assert [work.share for work in (whole, half, quarter)] == [1, 0.5, 0.25]
    record = TrialRecord(
        settings={}, ending="ok", run_seconds=(4.0,), pass_seconds=4.0,
        step_bytes={"copy": int(half.copy), "compute": int(half.compute), "host": int(half.there)},
        stalled_seconds={"copy": 3.0, "compute": 2.0, "host": 2.5},
    )  # fmt: skip
    costs = learn(Costs("warm", None, unified=False), [(half, record)])
    assert costs.compute_seconds == 4.0  # 2 s of half of the weights
    assert [floor_seconds(work, costs) for work in (whole, half, quarter)] == [4.0, 2.0, 1.0]
    # 2 s on the device and 1.5 s there; a quarter on the device, and half as much again there.
    jitter = 1 + half.jitter
    assert predict_seconds(half, costs) == pytest.approx(3.5 * jitter)
    assert predict_seconds(quarter, costs) == pytest.approx((1.0 + 2.25) * jitter)


def test_indices_of_host_layers_are_those_of_the_checkpoint(checkpoint: Path) -> None:
    some = screener(checkpoint, probed(), layers=[8, 2, 5])
    (planned,) = some.screen([{**MAPPED, "host_layers": 3}]).kept
    assert planned.plan.host_layers == (8, 2, 5)


@pytest.mark.parametrize("device", [None, 6 * GIB])
@pytest.mark.parametrize("host", [None, 16 * GIB])
def test_with_host_layers_the_defaults_are_still_some_dozens_of_candidates(
    checkpoint: Path, device: int | None, host: int | None
) -> None:
    axes = default_axes(Bounds(device, host), 16, unified=False)
    axes = check_axes(with_host_layers(axes, (0, 3, 5, 6, 8)))
    found = screener(checkpoint, probed()).screen(all_candidates(axes, unified=False))
    assert len(found.kept) <= 300
    assert {len(planned.plan.host_layers) for planned in found.kept} == {0, 3, 5, 6, 8}


def test_a_tune_finds_the_number_and_its_results_are_read_back(checkpoint: Path) -> None:
    tuner = open_tuner(checkpoint)
    started = simulated(tuner, cost, probed())
    best = tuner.tune()
    assert best["host_layers"] == 6 and best["read_mode"] == "mapped"
    assert tried_counts(started) >= {0, 6}
    (file,) = cache_folder().glob("*.jsonl")
    recorded = [json.loads(line).get("record") for line in file.read_text().splitlines()]
    assert best["host_layers"] in [one["settings"].get("host_layers") for one in recorded if one]
    again = open_tuner(checkpoint)
    assert not simulated_and_tuned(again).started
    assert again.best == tuner.best


def simulated_and_tuned(tuner: LayerStreamerTuner) -> Simulation:
    started = simulated(tuner, cost, probed())
    tuner.tune()
    return started


def test_a_streamer_without_host_layers_is_0_of_them(checkpoint: Path) -> None:
    tuner = open_tuner(checkpoint)
    simulated(tuner, lambda settings: 1.0 + settings.get("host_layers", 0), probed())
    assert tuner.tune()["host_layers"] == 0


def test_what_a_probe_measured_comes_through_the_process_that_looks_at_the_machine() -> None:
    survey = survey_of(probed())(None, Path())
    assert Form().read(Survey, json.loads(json.dumps(asdict(survey))), "survey") == survey


def setup_of_this_file(streamer: LayerStreamer) -> Any:
    return lambda: streamer.run_pass(None, lambda x, w, i: x)


@pytest.mark.parametrize(
    ("values", "counts"), [({}, {0}), ({"host_layers_values": [0, 3]}, {0, 3})]
)
def test_a_setup_fn_meets_host_layers_only_where_values_were_named(
    checkpoint: Path, values: dict[str, Any], counts: set[int]
) -> None:
    tuner = open_tuner(
        checkpoint, setup_fn=setup_of_this_file, strategy="grid", read_mode_values=["mapped"],
        **values,
    )  # fmt: skip
    assert tried_counts(simulated_and_tuned(tuner)) == counts


def test_a_stand_in_that_multiplies_no_packed_weights_is_no_measure_of_host_layers(
    tmp_path: Path,
) -> None:
    tuner = open_tuner(write_packed(tmp_path / "packed", zoo_model("llama-biases"), "ct4-g32"))
    assert tried_counts(simulated_and_tuned(tuner)) == {0}


@pytest.mark.parametrize("values", [[[0, 2]], [-1], ["all"], [2.5]])
def test_host_layers_to_try_are_numbers(checkpoint: Path, values: Sequence[Any]) -> None:
    with pytest.raises(ConfigError, match=r"^host_layers_values: host_layers"):
        open_tuner(checkpoint, host_layers_values=values)


def test_more_host_layers_than_there_are_and_some_beside_experts_on_demand_are_pruned(
    checkpoint: Path,
) -> None:
    many = screener(checkpoint, probed())
    demand = screener(checkpoint, probed(), experts="demand")
    for some, words in ((many, "host_layers=13: a pass has 12"), (demand, "experts='demand'")):
        found = some.screen([MAPPED, {**MAPPED, "host_layers": 13}])
        assert [dict(planned.settings) for planned in found.kept] == [MAPPED]
        assert words in found.pruned[0].detail


def test_with_experts_on_demand_none_are_tried_by_default(checkpoint: Path) -> None:
    tuner = open_tuner(checkpoint, experts="demand")
    simulated_and_tuned(tuner)
    assert tuner._session.axes["host_layers"] == (None,)
    assert len(tuner._session.axes["read_threads"]) > 1


def plan_here(spec: TrialSpec, candidates: Any) -> Any:
    """The engine's plans, made in this process, of a device with memory of its own."""
    assert spec.engine is not None
    plan_engines = import_module(spec.engine).plan_engines
    with near_device():
        return list(plan_engines(candidates=candidates, **decode_model(spec.model)))


REFUSED = "does not go with host_layers"


@pytest.mark.parametrize(
    ("options", "counts", "words"),
    [
        ({}, {0, 2, 3, 4}, ""),  # around 3 of 4
        ({"reproducible": True}, {0}, ""),
        ({"kv_int8": True}, {0}, ""),
        ({"host_layers_values": [0, 1]}, {0, 1}, ""),
        ({"host_layers_values": [0, 1], "reproducible": True}, {0}, REFUSED),
    ],
)
def test_an_engine_is_tried_with_host_layers_around_its_own_number_unless_it_refuses_them(
    model: Path,
    options: dict[str, Any],
    counts: set[int],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def product_rates(devices: Any, names: Any) -> Any:
        return dict.fromkeys(names, (ProductRate(1, 150e9, 50e9),))

    monkeypatch.setattr("layer_streamer.llm.on_host.products.product_rates", product_rates)
    given: dict[str, Any] = {"device": "cpu", "max_length": 64, "prompt_tokens": 9, "new_tokens": 2}
    tuner = LayerStreamerTuner.for_engine(
        model, track_progress=False, margin=None, strategy="grid", **given, **options
    )
    tuner._session._ask_engine = plan_here
    started = simulated(tuner, lambda settings: 1.0, probed())
    tuner.tune()
    assert started.started[0] == {}
    assert tried_counts(started) == counts
    pruned = [record for record in tuner.results if record.ending == "pruned"]
    assert bool(pruned) == bool(words)
    assert all(words in record.detail for record in pruned)


def test_the_command_takes_numbers_of_host_layers_and_auto() -> None:
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    args = parser.parse_args(
        ["model", "--host-layers-values", "0,4,auto", "--n-cpu-values", "none"]
    )
    options = tune_command.options_of(args)
    assert options["host_layers_values"] == [0, 4, "auto"] and options["n_cpu_values"] == [None]
