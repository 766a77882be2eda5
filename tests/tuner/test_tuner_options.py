"""Options of a tune and of the streamer: what is passed on, what is refused before any trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from tuning import simulated

from layer_streamer import ConfigError, LayerStreamer, LayerStreamerTuner, read_manifest

VALUES = {"n_gpu_values": [1, 2], "read_mode_values": ["buffered"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model", 6)
    return tmp_path / "model"


def open_tuner(model: Path, **options: Any) -> LayerStreamerTuner:
    fixed = {"device": "cpu", "track_progress": False}
    return LayerStreamerTuner.from_checkpoint(model, **(VALUES | fixed | options))


def cost(settings: Any) -> float:
    return 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_runs": 1}, "n_runs=1: must be an int from 2 to 1000"),
        ({"tokens": -1}, "tokens=-1: must be an int from 0 to "),
        ({"sleep_seconds": -1.0}, "sleep_seconds=-1.0: must be a number, at least 0"),
        ({"hang_seconds": 0.0}, "hang_seconds=0.0: must be a number, above 0"),
        ({"trial_seconds": float("inf")}, "trial_seconds=inf: must be a number, above 0"),
        ({"margin": -0.1}, "margin=-0.1: must be a number, at least 0"),
        ({"max_seconds": 0}, "max_seconds=0: must be a number, above 0"),
        ({"strategy": "luck"}, "strategy='luck': must be 'grid' or 'race'"),
        ({"cache": "hot"}, "cache='hot': must be 'warm' or 'cold'"),
        ({"max_device_bytes": "6 apples"}, "max_device_bytes='6 apples': must be bytes"),
        ({"n_gpu_values": [-1]}, "n_gpu_values: n_gpu=-1: must be from 0 to 4096"),
    ],
)
def test_an_option_that_cannot_work_is_refused_at_once(
    model: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        open_tuner(model, **options)
    assert str(caught.value).startswith(message)


def test_an_unknown_option_is_an_error(model: Path) -> None:
    with pytest.raises(TypeError, match="n_tpu_values"):
        LayerStreamerTuner.from_checkpoint(model, n_tpu_values=[1])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"on_kopy": print}, "on_kopy: is no option of the tuner, nor of LayerStreamer"),
        ({"n_gpu": 2}, r"n_gpu: is searched; name n_gpu_values=\[2\] to fix it"),
    ],
)
def test_an_option_that_neither_tuner_nor_streamer_has_is_refused_in_one_line(
    model: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        open_tuner(model, **option)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tail": "lm_head.weight"}, "tail='lm_head.weight': must be a list of tensor names"),
        ({"reserve_bytes": "much"}, "reserve_bytes='much': must be bytes"),
        ({"on_copy": lambda layer_idx, stream: None}, "on_copy=<lambda>: is a lambda"),
        ({"tail": ["no.such"]}, "tail='no.such': "),
    ],
)
def test_a_streamers_option_that_cannot_work_is_refused_before_any_trial(
    model: Path, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tuner = open_tuner(model, **option)
        simulated(tuner, cost)
        tuner.tune()
    assert str(caught.value).startswith(message)


def test_tail_steps_are_part_of_what_is_planned(model: Path) -> None:
    tuner = open_tuner(model, tail=["lm_head.weight"])
    simulated(tuner, cost)
    tuner.tune()
    (planned, *_) = tuner._session._screened.kept
    with LayerStreamer.from_checkpoint(model, device="cpu", tail=["lm_head.weight"]) as streamer:
        assert len(planned.plan.tiers) == streamer.num_steps


def test_layers_that_are_chosen_are_those_that_are_planned(model: Path) -> None:
    tuner = open_tuner(model, layers=[4, 1])
    simulated(tuner, cost)
    tuner.tune()
    (planned, *_) = tuner._session._screened.kept
    assert len(planned.plan.tiers) == 2


def test_a_manifest_is_tuned_as_the_checkpoint_that_it_is_of(model: Path) -> None:
    manifest = read_manifest(model, "model.layers.{i}.mlp.")
    tuner = open_tuner(manifest)  # type: ignore[arg-type]
    simulated(tuner, cost)
    tuner.tune()
    arguments = tuner._session._model.arguments  # what the process of a trial is handed
    assert arguments["path"] == model
    assert arguments["layer_pattern"] == "model.layers.{i}.mlp."


def test_a_pattern_beside_a_manifest_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="not beside a Manifest"):
        open_tuner(read_manifest(model), layer_pattern="blk.{i}.")  # type: ignore[arg-type]


def test_a_lambda_is_refused_before_anything_is_looked_at(model: Path) -> None:
    tuner = open_tuner(model, setup_fn=lambda streamer: print)
    started = simulated(tuner, cost)
    with pytest.raises(ConfigError, match="is a lambda"):
        tuner.tune()
    assert not started.started
