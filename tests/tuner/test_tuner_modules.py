"""Tunes of a streamed model: what its code says of a pass, and trials that open it by stream()."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import module_setups
import pytest
import torch
from recipes import loaded, quiet
from tiny_models import tiny_class, tiny_model
from tuner_support import Marked, marked
from tuning import GIB, Simulation, machine, simulated

import layer_streamer
from layer_streamer import ConfigError, LayerStreamerTuner, stream
from layer_streamer.modules.tuning import Streamed, describe, open_workload
from layer_streamer.tuner.session import plan_streamed
from layer_streamer.tuner.trials.model_args import decode_model
from layer_streamer.tuner.trials.record import TrialSpec

__all__ = ["marked"]

MIB = 1 << 20
VALUES: dict[str, Any] = {
    "n_gpu_values": [1, 2],
    "read_mode_values": ["buffered"],
    "read_threads_values": [1],
    "read_chunk_values": [None],
    "track_progress": False,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose layers the streamer's own patterns do not all find."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("gpt2", "bart", "vit")}
    with quiet():
        for name, folder in found.items():
            tiny_model(name).save_pretrained(folder)
    return found


def simulate(tuner: LayerStreamerTuner, cost: Any, unified: bool = True) -> Simulation:
    """Trials simulated, and the model looked at here, in this process."""

    def look(spec: TrialSpec) -> Streamed:
        return describe(**decode_model(spec.model))._replace(unified=unified)

    tuner._session._ask_streamed = look
    return simulated(tuner, cost, machine(unified=unified))


def cost(settings: Mapping[str, Any]) -> float:
    return 1.0 if not settings else 0.5 + 0.1 * settings.get("n_gpu", 0)


def test_a_streamed_module_has_no_host_layers_and_says_so(folders: dict[str, Path]) -> None:
    values = VALUES | {"host_layers_values": [0, 1]}
    tuner = LayerStreamerTuner.for_module(
        folders["gpt2"], prompt_tokens=3, new_tokens=2, device="cpu", **values
    )
    started = simulate(tuner, cost, unified=False)
    tuner.tune()
    assert not any("host_layers" in settings for settings in started.started)
    pruned = {record.detail for record in tuner.results if record.ending == "pruned"}
    assert pruned == {"host_layers=: not with a module, whose forward has its own order"}


def test_a_pass_is_that_of_the_largest_sequence_and_the_rest_is_taken(
    folders: dict[str, Path],
) -> None:
    found = describe(path=folders["bart"], device="cpu", prompt_tokens=1, new_tokens=2)
    with quiet():
        model: Any = stream(folders["bart"], device="cpu")
    plan = model.layer_streamer.plan
    largest, other = plan.sequences
    assert (largest, other) == ("model.decoder.layers", "model.encoder.layers")
    decoder = model.model.decoder.layers[0]
    assert set(found.manifest.layers[0].tensors) == {name for name, _ in decoder.named_parameters()}
    slots = plan.sequences[other].placement.device_slots[0].total_nbytes
    assert found.taken_nbytes == plan.outside_nbytes + slots
    assert found.slot_nbytes * 3 == plan.sequences[largest].placement.device_slots[0].total_nbytes
    model.layer_streamer.close()


@pytest.mark.slow
def test_of_a_pipeline_the_largest_components_blocks_count_and_all_else_is_taken(
    tmp_path: Path,
) -> None:
    pytest.importorskip("diffusers")
    from tiny_pipelines import save_pipeline, taken

    def setup_fn(**settings: Any) -> Any:
        pipe: Any = stream(tmp_path, device="cpu", **settings)
        plans.append(pipe.layer_streamer.plan)
        return pipe, lambda: None

    plans: list[Any] = []
    with quiet():
        save_pipeline("FluxPipeline", tmp_path)
        found = describe(setup_fn=setup_fn)
    (plan,) = plans
    (blocks,) = plan.components["transformer"].sequences.values()
    assert found.manifest.num_layers == len(blocks.layers)
    assert found.taken_nbytes == taken(plan) - sum(blocks.placement.device_bytes)


@pytest.mark.parametrize(
    ("unified", "model", "candidate", "budget", "taken"),
    [
        (True, {}, {"n_gpu": 1}, None, None),
        (True, {}, {"device_budget": 9 * MIB}, 9 * MIB, 3 * MIB),
        (True, {}, {"device_budget": 4 * MIB, "n_gpu": 1}, 4 * MIB, 2 * MIB),
        (True, {}, {"device_budget": MIB, "n_gpu": 1}, MIB, 0),
        (False, {}, {"n_gpu": 1}, "auto", 3 * MIB + 2 * GIB),
        (False, {"reserve_bytes": "5MiB"}, {}, "auto", 8 * MIB),
        (False, {"reserve_bytes": 0}, {}, "auto", 3 * MIB),
        (False, {}, {"device_budget": "9MiB"}, "9MiB", 3 * MIB),
        (False, {"reserve_bytes": "1MiB"}, {"device_budget": "9MiB"}, "9MiB", 4 * MIB),
    ],
)
def test_of_a_budget_the_largest_sequence_has_what_is_not_taken(
    unified: bool, model: Any, candidate: Any, budget: Any, taken: int | None
) -> None:
    some: Any = None
    found = Streamed(some, MIB, 3 * MIB, 2 * GIB, unified)
    spec = TrialSpec(model={"device": "cpu", **model}, settings={}, setup_fn=None)
    (plan,) = plan_streamed(found, spec, [candidate])
    assert not isinstance(plan, str)
    assert plan == {
        "device": "cpu", **candidate,
        **({} if budget is None else {"device_budget": budget, "reserve_bytes": taken}),
    }  # fmt: skip


def test_defaults_come_first_and_the_best_settings_open_the_model(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = VALUES | {"device": "cpu", "track_progress": True}
    with quiet():
        tuner = LayerStreamerTuner.for_module(folders["gpt2"], **options)
        simulation = simulate(tuner, cost)
        best = tuner.tune()
        assert simulation.started[0] == {} and best["n_gpu"] == 1
        assert "default settings: 1.0000 s; best: 0.6000 s" in capsys.readouterr().err
        model: Any = stream(folders["gpt2"], device="cpu", **best)  # type: ignore[arg-type]
        assert model.layer_streamer.plan.sequences["transformer.h"].read_mode == "buffered"
        model.layer_streamer.close()


def test_a_budget_without_room_for_the_rest_is_not_tried(folders: dict[str, Path]) -> None:
    with quiet():
        tuner = LayerStreamerTuner.for_module(
            folders["gpt2"], device="cpu", device_budget_values=["64KiB", None], **VALUES
        )
        simulate(tuner, cost)
        tuner.tune()
    refused = [record for record in tuner.results if record.ending == "pruned"]
    assert {record.settings.get("device_budget") for record in refused} == {64 << 10}


def test_a_models_work_is_a_prompt_and_the_tokens_after_it(folders: dict[str, Path]) -> None:
    heard: list[bool] = []
    with quiet():
        work = open_workload(
            path=folders["gpt2"], device="cpu", prompt_tokens=5, new_tokens=3,
            alive=lambda: heard.append(True),
        )  # fmt: skip
        parts = work.run()
    assert set(parts) == {"prompt", "decode"} and all(value > 0 for value in parts.values())
    assert len(heard) == 3
    work.close()


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ("no_pair", "setup_fn returned GPT2LMHeadModel: must be (model, run)"),
        ("no_function", "setup_fn returned run=3: must be a function"),
        ("not_streamed", "setup_fn returned tuple: must be (model, run), the model by stream"),
    ],
)
def test_a_setup_fn_that_returns_something_else_is_told_what_is_wanted(
    folders: dict[str, Path], setup: str, words: str
) -> None:
    options = {"model": folders["gpt2"], "device": "cpu", "alive": lambda: None}
    with quiet(), pytest.raises(ConfigError) as raised:
        open_workload(setup_fn=getattr(module_setups, setup), **options)
    assert words in str(raised.value)


def test_a_model_that_writes_no_text_needs_a_setup_fn(folders: dict[str, Path]) -> None:
    with quiet(), pytest.raises(ConfigError, match=r"ViT.* writes no text: say by setup_fn="):
        open_workload(path=folders["vit"], device="cpu", new_tokens=2, alive=lambda: None)


def test_what_cannot_be_asked_for_is_refused_before_anything_starts(tmp_path: Path) -> None:
    door = LayerStreamerTuner.for_module
    for wrong in ({}, {"path": tmp_path, "setup_fn": module_setups.one_forward}):
        with pytest.raises(ConfigError, match="takes a path, or a setup_fn"):
            door(**wrong)
    with pytest.raises(TypeError, match="n_gpu: is searched"):
        door(tmp_path, n_gpu=2)
    with pytest.raises(ConfigError, match="is a lambda"):
        door(setup_fn=lambda **settings: None).tune()


@pytest.mark.parametrize("name", ["ends_itself", pytest.param("no_pair", marks=pytest.mark.slow)])
def test_a_model_that_cannot_be_opened_is_one_line_before_any_trial(
    folders: dict[str, Path], name: str, marked: Marked
) -> None:
    tuner = LayerStreamerTuner.for_module(
        setup_fn=getattr(module_setups, name), model=str(folders["gpt2"]), device="cpu", **VALUES
    )
    with pytest.raises(ConfigError) as raised:
        tuner.tune()
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_a_real_tune_of_a_setup_fn_gives_settings_that_compute_the_same(
    folders: dict[str, Path], marked: Marked, cache: Any
) -> None:
    folder = folders["bart"]
    tuner = LayerStreamerTuner.for_module(
        setup_fn=module_setups.one_forward, model=str(folder), device="cpu", n_runs=2,
        strategy="grid", margin=None, cache=cache, **VALUES,
    )  # fmt: skip
    best = tuner.tune()
    assert {record.ending for record in tuner.results} == {"ok"}
    assert all(record.step_bytes["compute"] > 0 for record in tuner.results)
    ids = torch.tensor([[9, 17, 33, 12]])
    with quiet(), torch.no_grad():
        model: Any = stream(folder, device="cpu", **best)  # type: ignore[arg-type]
        plain = loaded(tiny_class("bart"), folder).eval()
        want = plain(ids, decoder_input_ids=ids).logits
        assert torch.equal(model(ids, decoder_input_ids=ids).logits, want)
    model.layer_streamer.close()


@pytest.mark.slow
def test_the_call_that_the_command_prints_opens_the_model(
    folders: dict[str, Path], tmp_path: Path, marked: Marked
) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "layer_streamer", "tune", str(folders["gpt2"]), "--modules",
            "--device", "cpu", "--prompt-tokens", "9", "--new-tokens", "3", "--n-runs", "2",
            "--n-gpu-values", "1", "--read-mode-values", "buffered", "--read-threads-values", "1",
            "--read-chunk-values", "none",
        ],
        env=os.environ | marked.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "default settings: 0." in done.stderr
    names: dict[str, Any] = {"layer_streamer": layer_streamer}
    exec(done.stdout, names)
    assert type(names["model"]).__name__ == "GPT2LMHeadModel"
    names["model"].layer_streamer.close()
