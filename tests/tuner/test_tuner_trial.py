"""Trials of candidates that go wrong: told as what they are, over in time, nothing left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import tuner_setups as setups
from checkpoints import write_safetensors
from support import footprint
from tuner_support import Marked, checkpoint, marked, try_setup

from layer_streamer import ConfigError, read_manifest
from layer_streamer.machine.threads import most_torch_threads
from layer_streamer.tuner.trials.model_args import decode_model, encode_model

__all__ = ["checkpoint", "marked"]
pytestmark = [
    pytest.mark.usefixtures("marked"),
    pytest.mark.skipif(sys.platform != "linux", reason="supervised in full on Linux alone"),
]

ENDINGS: list[Any] = [
    (setups.segfaults, "signal", "SIGSEGV, in stage 'run 1'"),
    (setups.refused_torch_memory, "out of memory", "RuntimeError: [enforce fail"),
]
RARER: list[Any] = [
    (setups.raises, "exception", "ValueError: a setup that raises (in stage 'setup')\n"),
    (setups.closes_everything, "exit", "exit code 74 without a result, in stage 'run 1'; "),
    (setups.kills_its_parent, "signal", "the trial's supervisor was ended (SIGKILL), in stage "),
    (setups.exits_three, "exit", "exit code 3 without a result, in stage 'run 1'"),
    (setups.fakes_a_result, "exception", "ValueError: no result (in stage 'setup')\n"),
    (setups.writes_garbage_and_exits, "exit", "exit code 6 without a result, in stage 'setup'; "),
    (setups.runs_away, "exit", "exit code 8 without a result, in stage 'setup'"),
    (setups.exits_zero, "exit", "exit code 0 without a result, in stage 'run 1'"),
    (setups.sys_exits, "exit", "SystemExit: 4 (in stage 'run 1')\n"),
    (setups.raises_in_run, "exception", "KeyError: 'run' (in stage 'run 1')\n"),
    (setups.starts_others_and_exits, "exit", "exit code 5 without a result, in stage 'setup'"),
    (setups.returns_nothing, "exception", "ConfigError: setup_fn returned None: "),
    (setups.interrupts_itself, "exception", "KeyboardInterrupt: (in stage 'run 1')\n"),
    (setups.refused_memory, "out of memory", "MemoryError: (in stage 'run 1')\n"),
]


def name_of(value: object) -> str | None:
    return value.__name__ if callable(value) else ""


@pytest.mark.parametrize(
    ("setup_fn", "ending", "detail"),
    ENDINGS + [pytest.param(*case, marks=pytest.mark.slow) for case in RARER],
    ids=name_of,
)
def test_a_candidate_that_ends_badly_is_told_as_what_it_is(
    checkpoint: Path, setup_fn: Callable[..., Any], ending: str, detail: str
) -> None:
    record = try_setup(checkpoint, setup_fn)
    assert record.ending == ending
    assert record.detail.startswith(detail)
    assert len(record.detail) < 20_000
    assert (record.run_seconds, record.seconds) == ((), None)


@pytest.mark.parametrize(
    "setup_fn",
    [
        setups.hangs_holding_the_lock,
        pytest.param(setups.starts_others_and_hangs, marks=pytest.mark.slow),
        pytest.param(setups.hangs, marks=pytest.mark.slow),
        pytest.param(setups.hangs_ignoring_signals, marks=pytest.mark.slow),
        pytest.param(setups.stops_its_parent, marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_a_candidate_without_a_word_is_hung(checkpoint: Path, setup_fn: Callable[..., Any]) -> None:
    record = try_setup(checkpoint, setup_fn, hang_seconds=2.0)
    assert record.ending == "hung"
    assert record.detail.startswith("no word for 2 s, hang_seconds=2, in stage 'run 1'")


@pytest.mark.slow
def test_a_candidate_that_takes_too_long_as_a_whole_is_timed_out(checkpoint: Path) -> None:
    record = try_setup(checkpoint, setups.hangs_ignoring_signals, trial_seconds=2.0)
    assert record.ending == "timed out"
    assert record.detail.startswith("no result within trial_seconds=2, in stage ")
    assert 2.0 <= record.trial_seconds < 200.0


@pytest.mark.parametrize(
    "setup_fn",
    [pytest.param(setups.allocates, marks=pytest.mark.slow), setups.allocates_in_a_grandchild],
    ids=name_of,
)
def test_a_candidate_that_allocates_without_end_is_out_of_memory(
    checkpoint: Path, setup_fn: Callable[..., Any]
) -> None:
    most = 1 << 30
    record = try_setup(checkpoint, setup_fn, max_host_bytes=most)
    assert record.ending == "out of memory"
    assert f"max_host_bytes={most}, in stage 'run 1'" in record.detail
    assert most < record.peak_host_bytes


@pytest.mark.parametrize(
    "setup_fn",
    [
        setups.starts_others,
        pytest.param(setups.forks_and_goes_on, marks=pytest.mark.slow),
        pytest.param(setups.writes_garbage, marks=pytest.mark.slow),
        pytest.param(setups.prints_and_works, marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_what_a_candidate_does_beside_its_work_costs_it_nothing(
    checkpoint: Path, setup_fn: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    record = try_setup(checkpoint, setup_fn)
    assert (record.ending, record.detail) == ("ok", "")
    assert len(record.run_seconds) == 2
    assert capfd.readouterr() == ("", "")


def test_what_a_candidate_printed_last_is_in_the_detail_and_nowhere_else(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: how many threads torch has on a CPU, where it leaves a core to the streamer."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    record = try_setup(checkpoint, setups.prints_megabytes)
    assert record.ending == "exception"
    assert record.detail.startswith("ValueError: after much ado (in stage 'setup')\n")
    assert "The end of what it printed:\n" in record.detail
    assert record.detail.endswith(f"\ntorch has {most_torch_threads()} threads")
    assert capfd.readouterr() == ("", "")


def test_a_healthy_trial_is_told_in_full(checkpoint: Path) -> None:
    stages: list[tuple[str, float]] = []
    record = try_setup(
        checkpoint, setups.healthy, on_event=lambda *event: stages.append(event), n_runs=4
    )
    assert (record.ending, record.detail, record.settings) == ("ok", "", {"n_gpu": 1})
    assert len(record.run_seconds) == 3
    assert record.seconds == sorted(record.run_seconds)[1]
    assert record.warm_up_seconds > 0
    assert record.step_bytes["read"] == read_manifest(checkpoint).nbytes - _static(checkpoint)
    assert set(record.stalled_seconds) == set(record.step_bytes)
    assert record.peak_device_bytes == 0
    assert 30 << 20 < record.peak_host_bytes < 1 << 30
    names = [name for name, _ in stages]
    assert names[:6] == ["start", "import", "device", "open", "setup", "cache"]
    assert names[6:9] == ["run 1", "cache", "before run 2"]
    assert names[-2:] == ["before run 4", "run 4"]
    times = [seconds for _, seconds in stages]
    assert times == sorted(times)
    assert times[-1] <= record.trial_seconds


def _static(path: Path) -> int:
    return sum(spec.nbytes for spec in read_manifest(path).static.values())


def test_a_cold_trial_with_pauses_and_no_setup_runs_the_synthetic_load(checkpoint: Path) -> None:
    stages: list[str] = []
    before = footprint()
    record = try_setup(
        checkpoint, None, cache="cold", sleep_seconds=0.05, tokens=3,
        on_event=lambda stage, seconds: stages.append(stage),
    )  # fmt: skip
    assert record.ending == "ok"
    assert footprint() == before
    assert stages[-6:] == ["sleep", "cache", "run 2", "sleep", "cache", "run 3"]


def test_a_run_that_is_hopeless_is_ended_within_half_a_second(checkpoint: Path) -> None:
    record = try_setup(checkpoint, setups.slow_once_measured, best_seconds=0.5, margin=0.2)
    assert record.ending == "slower"
    assert record.detail.startswith("run 2 passed 0.6 s, where the best takes 0.5 s and margin=0.2")
    after, gone = (
        float(part.split()[-2])
        for part in record.detail.replace(" s later", " s").split("; ")[1].split(", ")
    )
    # The parent's own clock. A machine that is busy with other things may take a little longer.
    assert 0.6 <= after < 0.6 + 0.5
    assert 0 <= gone < 2.0
    assert record.run_seconds == ()


@pytest.mark.slow
def test_a_hopeless_first_run_is_ended_where_the_bests_own_is_known(checkpoint: Path) -> None:
    record = try_setup(checkpoint, setups.slow, best_seconds=0.5, margin=0.0, warm_up_seconds=0.5)
    assert record.ending == "slower"
    assert record.detail.startswith("run 1 (warm-up) passed 2 s")


def test_the_published_constructors_arguments_reach_a_trial(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{i}.{key}.weight": torch.ones(4, 4, dtype=torch.bfloat16)
        for i in range(3)
        for key in ("a", "b")
    }
    file = write_safetensors(tmp_path / "m.safetensors", tensors)
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    manifest = read_manifest(file)
    specs = [spec for layer in manifest.layers for spec in layer.tensors.values()]
    model: Mapping[str, Any] = {
        "model_dir": tmp_path,
        "tensor_info": {s.name: (file.name, s.offset - start, torch.Size(s.shape)) for s in specs},
        "shard_offsets": {file.name: start},
        "block_keys": ("a.weight", "b.weight"),
        "block_sizes": {"a.weight": 16, "b.weight": 16},
        "dtype": torch.bfloat16,
        "num_layers": 3,
        "device": torch.device("cpu"),
    }
    assert decode_model(encode_model(model))["dtype"] is torch.bfloat16
    record = try_setup(tmp_path, setups.healthy, model=encode_model(model))
    assert (record.ending, record.detail) == ("ok", "")
    assert record.step_bytes["read"] == sum(spec.nbytes for spec in specs)


def test_a_value_that_cannot_be_handed_over_is_named() -> None:
    with pytest.raises(ConfigError, match="on_copy: a function cannot be handed"):
        encode_model({"path": ".", "on_copy": name_of})


def test_an_error_in_on_event_ends_the_trial_and_is_raised(
    checkpoint: Path, marked: Marked
) -> None:
    def fail(stage: str, seconds: float) -> None:
        if stage == "run 1":
            raise LookupError(stage)

    begin = time.monotonic()
    with pytest.raises(LookupError, match="run 1"):
        try_setup(checkpoint, setups.starts_others_and_hangs, on_event=fail, hang_seconds=60.0)
    assert time.monotonic() - begin < 50.0
    assert not marked.processes()
