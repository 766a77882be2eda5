"""Tunes of an engine: its own plans, its defaults first, both parts of a run on record."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from assets import tiny_checkpoint, tiny_model
from gguf_models import write_gguf
from packed_models import write_packed
from paths import PYTHONPATH
from tuner_support import Marked, marked, start_script, try_setup
from tuning import GIB, Simulation, machine, simulated
from zoo import zoo_model

from layer_streamer import ConfigError, LayerStreamerTuner, TuneError
from layer_streamer.llm import StreamingEngine
from layer_streamer.llm.tuning import open_workload, plan_engines
from layer_streamer.planning.plan import Machine
from layer_streamer.tuner import tuner as tuner_module
from layer_streamer.tuner.search.space import candidates, check_axes, engine_defaults
from layer_streamer.tuner.survey import ask_engine
from layer_streamer.tuner.trials.model_args import decode_model, encode_model
from layer_streamer.tuner.trials.record import TrialRecord, TrialSpec

__all__ = ["marked"]

ENGINE = "layer_streamer.llm.tuning"
SHORT: dict[str, Any] = {"prompt_tokens": 20, "new_tokens": 3}
OPTIONS: dict[str, Any] = {"device": "cpu", "max_length": 64, "track_progress": False} | SHORT
VALUES: dict[str, Any] = {
    "n_gpu_values": [1, 2],
    "n_cpu_pinned_values": [0],
    "n_cpu_values": [0],
    "read_mode_values": ["buffered", "mapped"],
    "read_threads_values": [1],
    "read_chunk_values": [None],
}
CANDIDATES: list[dict[str, Any]] = [
    {},
    {"n_gpu": 1, "read_mode": "direct", "read_threads": 2, "read_chunk": 4096},
    {"device_budget": "16MiB"},
    {"device_budget": 1 << 30, "host_budget": 1 << 29, "n_cpu_pinned": 0, "n_cpu": 2},
]

INTERRUPTED = """
import sys
from layer_streamer import LayerStreamerTuner
from layer_streamer.tuner.trials.trial import run_trial

tuner = LayerStreamerTuner.for_engine(
    sys.argv[1], prompt_tokens=9, new_tokens=3, device="cpu", max_length=64, track_progress=False
)
ask = tuner._session._ask_engine


def say_and_ask(spec, candidates):
    print("plan", flush=True)
    return ask(spec, candidates)


def say_and_run(spec, limits, *, on_event):
    return run_trial(spec, limits, on_event=lambda stage, seconds: print(stage, flush=True))


tuner._session._ask_engine, tuner._session._run_trial = say_and_ask, say_and_run
tuner.tune()
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("engine") / "model", tiny_model("llama"))


def packed_models(folder: Path) -> dict[str, Path]:
    """A GGUF file of mixed types, and a compressed-tensors checkpoint."""
    write_gguf(folder / "model.gguf", tiny_model("llama"), tokenizer=True)
    packed = write_packed(folder / "packed", zoo_model("llama-biases"), "ct4-g32")
    return {"gguf": folder / "model.gguf", "compressed-tensors": packed}


def open_tuner(path: Path, **options: Any) -> LayerStreamerTuner:
    return LayerStreamerTuner.for_engine(path, **OPTIONS | VALUES | options)


def simulate(
    tuner: LayerStreamerTuner, cost: Any, found: Machine | None = None, ask: Any = None
) -> Simulation:
    """Trials simulated, and the engine's plans made here, in this process."""

    def plan(spec: TrialSpec, candidates: Any) -> Any:
        assert spec.engine is not None
        plan_engines = import_module(spec.engine).plan_engines
        return list(plan_engines(candidates=candidates, **decode_model(spec.model)))

    tuner._session._ask_engine = ask or plan
    return simulated(tuner, cost, found)


def cost(settings: Mapping[str, Any]) -> float:
    return 1.0 if not settings else 0.5 + 0.1 * settings["n_gpu"]


def test_a_trial_opens_the_engine_and_measures_a_prompt_and_the_tokens_after_it(
    model: Path, marked: Marked
) -> None:
    arguments = encode_model({"path": model, "device": "cpu", "max_length": 64, **SHORT})
    record = try_setup(model, None, model=arguments, engine=ENGINE, settings={"n_gpu": 1})
    assert (record.ending, record.detail) == ("ok", "")
    assert set(record.parts) == {"prompt", "decode"}
    for number, seconds in enumerate(record.run_seconds):
        assert 0 < record.parts["prompt"][number] + record.parts["decode"][number] <= seconds
    assert [len(seconds) for seconds in record.parts.values()] == [len(record.run_seconds)] * 2
    assert record.step_bytes["compute"] > 0


def test_the_engines_defaults_come_first_and_the_best_is_compared_with_them(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuner = open_tuner(model, track_progress=True)
    started = simulate(tuner, cost)
    best = tuner.tune()
    assert started.started[0] == {}
    assert best["n_gpu"] == 1
    assert "default settings: 1.0000 s; best: 0.6000 s" in capsys.readouterr().err


def test_where_nothing_beats_the_defaults_nothing_is_named(model: Path) -> None:
    tuner = open_tuner(model, strategy="grid")
    simulate(tuner, lambda settings: 1.0 if not settings else 2.0)
    assert tuner.tune() == {}


def test_defaults_that_take_more_than_is_granted_are_measured_and_not_the_best(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hungry(Simulation):
        def __call__(self, spec: Any, limits: Any, *, on_event: Any = None) -> TrialRecord:
            record = super().__call__(spec, limits, on_event=on_event)
            peak = GIB if spec.settings.get("device_budget") else 3 * GIB
            return TrialRecord(
                settings=record.settings, ending=record.ending, run_seconds=record.run_seconds,
                peak_device_bytes=peak,
            )  # fmt: skip

    tuner = open_tuner(model, max_device_bytes="2GiB", margin=None, track_progress=True)
    simulate(tuner, Hungry(lambda s: 1.0 if s.get("device_budget") else 0.5))
    assert tuner.tune()["device_budget"] is not None
    shown = capsys.readouterr().err
    assert "default settings: 0.5000 s (max_device_bytes=2147483648: it took 3.00 GiB); " in shown


def test_what_is_granted_is_handed_to_the_engine_as_its_own_budget(model: Path) -> None:
    tuner = open_tuner(model, max_device_bytes="2GiB", strategy="grid", margin=None)
    started = simulate(tuner, lambda settings: 1.0)
    tuner.tune()
    assert started.started[:2] == [{}, {"device_budget": 2 * GIB * 19 // 20}]
    budgets = {settings.get("device_budget") for settings in started.started}
    assert budgets == {None, 2 * GIB * 19 // 20, 2 * GIB * 3 // 4}


def test_defaults_that_are_candidates_as_well_are_tried_once() -> None:
    axes = check_axes({"read_mode": ["auto", "mapped"], "device_budget": [None, "1GiB"]})
    assert candidates(axes, unified=False, first=engine_defaults(axes)) == [
        {}, {"device_budget": GIB}, {"read_mode": "mapped"},
        {"read_mode": "mapped", "device_budget": GIB},
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "compressed-tensors"])
def test_plans_are_those_that_the_engine_opens_with(model: Path, tmp_path: Path, kind: str) -> None:
    path = model if kind == "safetensors" else packed_models(tmp_path)[kind]
    options = {"device": "cpu", "max_length": 64}
    for settings, plan in zip(
        CANDIDATES, plan_engines(path, CANDIDATES, **options, **SHORT), strict=True
    ):
        with StreamingEngine(path, **options, **settings) as engine:
            assert plan == engine.plan.options, settings
        assert decode_model(encode_model(plan))["dtype"] == plan["dtype"]


def test_the_screen_plans_with_the_engines_part_of_the_memory(model: Path) -> None:
    # 3 MiB: the model's layers would fit, but not beside the engine's own.
    tuner = open_tuner(model, device_budget_values=["3MiB"], strategy="grid", margin=None)
    simulate(tuner, lambda settings: 1.0)
    tuner.tune()
    planned = {"device_budget" in p.settings: p.plan for p in tuner._session._screened.kept}
    with StreamingEngine(model, device="cpu", max_length=64, device_budget="3MiB") as engine:
        assert planned[True].placement == engine.streamer.plan.placement


def test_what_the_engine_refuses_is_pruned_with_its_words_and_the_rest_is_tried(
    model: Path,
) -> None:
    tuner = open_tuner(model, device_budget_values=["1MiB", None], strategy="grid")
    started = simulate(tuner, lambda settings: 1.0)
    tuner.tune()
    assert {settings.get("device_budget") for settings in started.started} == {None}
    pruned = [record for record in tuner.results if record.ending == "pruned"]
    assert pruned
    assert all("device_budget 1.00 MiB: at least" in record.detail for record in pruned)


def test_budgets_are_not_the_same_because_the_streamer_fits_into_both(model: Path) -> None:
    tuner = open_tuner(model, device_budget_values=["1GiB", "2GiB"], strategy="grid", margin=None)
    started = simulate(tuner, lambda settings: 1.0)
    tuner.tune()
    budgets = [settings.get("device_budget") for settings in started.started]
    assert {None, GIB, 2 * GIB} == set(budgets)


def test_on_a_gpu_candidates_are_planned_with_what_the_engine_reserves(model: Path) -> None:
    def ask(spec: TrialSpec, candidates: Any) -> Any:
        own = {"tail": ["lm_head.weight"], "device": "cuda:0", "dtype": None}
        return [
            {**own, **settings, "reserve_bytes": GIB // 2} if "device_budget" in settings
            else {**own, **settings} for settings in candidates
        ]  # fmt: skip

    values = VALUES | {"device_budget_values": [GIB // 2 + 300_000, None]}
    tuner = LayerStreamerTuner.for_engine(model, track_progress=False, margin=None, **values)
    simulate(tuner, lambda settings: 1.0, machine(unified=False), ask)
    tuner.tune()
    kept = tuner._session._screened.kept
    with_budget = [p.plan for p in kept if p.settings.get("device_budget")]
    assert with_budget
    assert all(plan.placement.device_bytes[0] <= 300_000 for plan in with_budget)


def test_a_prompt_without_room_is_an_error_before_any_trial(model: Path) -> None:
    tuner = open_tuner(model, prompt_tokens=62)
    started = simulate(tuner, cost)
    with pytest.raises(TuneError, match=r"prompt_tokens=62 and new_tokens=3: max_length=64 \("):
        tuner.tune()
    assert not started.started


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_tokens": 0}, ConfigError, "prompt_tokens=0: must be an int from 1"),
        ({"new_tokens": 1}, ConfigError, "new_tokens=1: must be an int from 2"),
        ({"tokens": 3}, ConfigError, "tokens: an engine is measured on prompt_tokens"),
        ({"n_gpu": 3}, TypeError, r"n_gpu: is searched; name n_gpu_values=\[3\]"),
        ({"n_runs": 1}, ConfigError, "n_runs=1"),
        ({"setup_fn": cost}, ConfigError, "setup_fn: a function cannot be handed to a trial's"),
        ({"kv": "nowhere"}, TuneError, "no candidate can work: .*kv='nowhere': must be one of"),
        ({"on_kopy": 1}, TuneError, "no candidate can work: .*'on_kopy'"),
        ({"tail": ["x"]}, TuneError, "no candidate can work: .*tail: is the engine's own"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_trial(
    model: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        tuner = open_tuner(model, **options)
        simulate(tuner, cost)
        tuner.tune()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"new_tokens": 4}, {"max_length": 65}, {"kv_int8": True}])
def test_results_of_another_engine_are_not_taken(model: Path, change: dict[str, Any]) -> None:
    first, same, other = open_tuner(model), open_tuner(model), open_tuner(model, **change)
    simulate(first, cost)
    first.tune()
    assert not simulate_and_tune(same).started
    assert simulate_and_tune(other).started


def simulate_and_tune(tuner: LayerStreamerTuner) -> Simulation:
    started = simulate(tuner, cost)
    tuner.tune()
    return started


def test_no_token_ends_a_run_and_every_pass_is_a_sign_of_life(tmp_path: Path) -> None:
    # With every token an end token, text would end at the first.
    changed = tiny_model("llama", eos_token_id=list(range(512)))
    path = tiny_checkpoint(tmp_path / "model", changed)
    signs: list[None] = []
    workload = open_workload(
        path, prompt_tokens=40, new_tokens=5, device="cpu", alive=lambda: signs.append(None)
    )
    for count in (5, 10):
        parts = workload.run()
        assert len(signs) == count
        assert all(seconds > 0 for seconds in parts.values())
    workload.close()


def test_an_engine_without_room_for_the_work_is_closed_again(model: Path) -> None:
    with pytest.raises(ValueError, match="has no room for them"):
        open_workload(
            model, prompt_tokens=62, new_tokens=3, device="cpu", max_length=64, alive=print
        )


def failing(how: str, checkpoint: Path, **options: Any) -> TrialRecord:
    arguments = encode_model({"path": checkpoint, "how": how})
    return try_setup(checkpoint, None, model=arguments, engine="failing_engine", **options)


@pytest.mark.parametrize(
    ("how", "ending"),
    [
        pytest.param("segfaults", "signal", marks=pytest.mark.slow),
        pytest.param("exits_three", "exit", marks=pytest.mark.slow),
        pytest.param("raises", "exception", marks=pytest.mark.slow),
        pytest.param("refused_torch_memory", "out of memory", marks=pytest.mark.slow),
        pytest.param("hangs_holding_the_lock", "hung", marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_goes_wrong_is_an_ending_and_no_hang(
    model: Path, marked: Marked, how: str, ending: str
) -> None:
    assert failing(how, model, hang_seconds=5.0).ending == ending


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cannot be planned", r"^a model that no engine knows$"),
        ("segfaults when it plans", r"^it ended with -11$"),
    ],
)
def test_an_engine_that_cannot_be_had_is_one_line(model: Path, how: str, message: str) -> None:
    arguments = encode_model({"path": model, "how": how})
    spec = TrialSpec(model=arguments, settings={}, setup_fn=None, engine="failing_engine")
    with pytest.raises(ConfigError, match=message), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        ask_engine(spec, [{}])


def test_the_stand_in_says_once_that_it_does_nothing_with_packed_tensors(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path, count in ((model, 0), (packed_models(tmp_path)["compressed-tensors"], 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tuner = LayerStreamerTuner.from_checkpoint(path, track_progress=False)
            simulated(tuner, lambda settings: 1.0)
            tuner.tune()
        assert sum("no matrix work" in record.message for record in caplog.records) == count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "gguf", "compressed-tensors"])
def test_a_tune_of_an_engine_gives_what_opens_it_and_is_no_slower_than_its_defaults(
    model: Path, tmp_path: Path, marked: Marked, kind: str
) -> None:
    path = model if kind == "safetensors" else packed_models(tmp_path)[kind]
    tuner = open_tuner(path, n_runs=2)
    best = tuner.tune()
    (default,) = [record for record in tuner.results if not record.settings]
    assert tuner.best is not None
    assert tuner.best.seconds is not None
    assert default.seconds is not None
    assert tuner.best.seconds <= default.seconds
    with StreamingEngine(path, device="cpu", max_length=64, **best) as engine:  # type: ignore[arg-type]
        assert engine.generate([1, 2, 3], max_new_tokens=1, return_details=True).ids


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["plan", "open", "run 1"])
def test_ctrl_c_in_a_tune_of_an_engine_leaves_nothing(
    model: Path, tmp_path: Path, marked: Marked, moment: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    with start_script(script, model, mark=marked) as parent:
        assert parent.stdout is not None
        assert any(line == f"{moment}\n" for line in parent.stdout)
        parent.send_signal(signal.SIGINT)
        _, errors = parent.communicate(timeout=300)
    assert "KeyboardInterrupt" in errors
    assert not marked.processes()


def test_the_engine_of_a_tune_is_a_module_that_is_there() -> None:
    assert tuner_module.ENGINE == ENGINE
