"""Tunes with real trials, on the CPU: the published example, setup functions that fail, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import tuner_setups
from checkpoints import tiny_checkpoint
from tuner_support import Marked, checkpoint, marked, run_script

from layer_streamer import LayerStreamer, LayerStreamerTuner, TuneError
from layer_streamer.tools.cli import main
from layer_streamer.tuner.survey import take_survey

__all__ = ["checkpoint", "marked"]

COMMAND = [sys.executable, "-m", "layer_streamer"]
VALUES: dict[str, Any] = {
    "device": "cpu",
    "n_gpu_values": [1],
    "n_cpu_pinned_values": [None],
    "read_mode_values": ["buffered"],
    "read_threads_values": [1],
    "read_chunk_values": [None],
    "n_runs": 2,
    "track_progress": False,
}
PUBLISHED = """
import json, sys
import torch
from layer_streamer import LayerStreamer, LayerStreamerTuner

tables = json.load(open("tables.json"))
tensor_info, shard_offsets = tables["tensor_info"], tables["shard_offsets"]
block_keys, block_sizes = tables["block_keys"], tables["block_sizes"]
print("the script runs", file=sys.stderr)


def setup_fn(streamer):
    x = torch.ones(8)

    def run():
        streamer.run_pass(x, lambda x, weights, layer_idx: x + 1)

    return run


tuner = LayerStreamerTuner(
    setup_fn=setup_fn,
    model_dir='./my-model',
    tensor_info=tensor_info,
    shard_offsets=shard_offsets,
    block_keys=block_keys,
    block_sizes=block_sizes,
    dtype=torch.bfloat16,
    num_layers=4,
    n_gpu_values=[1, 2],
    n_cpu_pinned_values=[2],
    n_cpu_values=[None],
    batch_gpu_values=[1],
    batch_cpu_pinned_values=[1],
    batch_cpu_values=[None],
    n_runs=2,
    sleep_seconds=0,
)
best = tuner.tune()
print(json.dumps(best))
streamer = LayerStreamer(
    model_dir='./my-model', tensor_info=tensor_info, shard_offsets=shard_offsets,
    block_keys=block_keys, block_sizes=block_sizes, dtype=torch.bfloat16, num_layers=4,
    **best,
)
streamer.close()
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_tables(folder: Path) -> None:
    """A checkpoint at folder/my-model, and the published constructor's tables of it."""
    tensors = tiny_checkpoint(folder / "my-model", 4, dtype=torch.bfloat16)
    raw = (folder / "my-model" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    prefix = "model.layers.0."
    keys = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    tables = {
        "tensor_info": {
            name: ("model.safetensors", entry["data_offsets"][0], entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        },
        "shard_offsets": {"model.safetensors": 8 + length},
        "block_keys": keys,
        "block_sizes": {key: tensors[prefix + key].numel() for key in keys},
    }
    (folder / "tables.json").write_text(json.dumps(tables))


@pytest.mark.slow
def test_the_published_example_runs_as_a_script_without_a_guard(
    tmp_path: Path, marked: Marked
) -> None:
    write_tables(tmp_path)
    (tmp_path / "script.py").write_text(PUBLISHED)
    process = run_script(tmp_path / "script.py", mark=marked, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    best = json.loads(process.stdout.splitlines()[-1])
    assert set(best) == {
        "n_gpu", "n_cpu_pinned", "n_cpu", "batch_gpu", "batch_cpu_pinned", "batch_cpu",
    }  # fmt: skip
    assert best["n_gpu"] in (1, 2)
    assert process.stderr.count("the script runs") == 1
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(
    "modes", [["mapped"], pytest.param(["buffered", "mapped"], marks=pytest.mark.slow)]
)
def test_a_tune_finds_settings_that_open_and_a_second_one_starts_nothing(
    checkpoint: Path, marked: Marked, modes: list[str]
) -> None:
    options = VALUES | {"read_mode_values": modes}
    tuner = LayerStreamerTuner.from_checkpoint(checkpoint, strategy="grid", **options)
    best = tuner.tune()
    assert tuner.best is not None
    assert tuner.best.step_bytes["compute"] > 0
    assert tuner.best.pass_seconds > 0
    assert tuner.best.peak_host_bytes > 0
    with LayerStreamer.from_checkpoint(checkpoint, device="cpu", **best) as streamer:  # type: ignore[arg-type]
        streamer.run_pass(None, lambda x, w, i: x)
    again = LayerStreamerTuner.from_checkpoint(checkpoint, strategy="grid", **options)
    assert again.tune() == best
    assert [r.trial_seconds for r in again.results] == [r.trial_seconds for r in tuner.results]


@pytest.mark.slow
def test_when_every_candidate_fails_the_error_says_how(checkpoint: Path, marked: Marked) -> None:
    tuner = LayerStreamerTuner.from_checkpoint(
        checkpoint, setup_fn=tuner_setups.raises_in_run, **VALUES
    )
    with pytest.raises(TuneError, match=r"every candidate failed: 1 exception: .*KeyError"):
        tuner.tune()


def test_a_device_that_is_not_there_is_refused_before_any_trial(checkpoint: Path) -> None:
    tuner = LayerStreamerTuner.from_checkpoint(checkpoint, **VALUES | {"device": "cuda:77"})
    with pytest.raises(ValueError, match="device='cuda:77': "):
        tuner.tune()
    assert not tuner.results


@pytest.mark.gpu
def test_a_tune_on_a_gpu_leaves_cuda_alone_in_this_process(
    checkpoint: Path, tmp_path: Path, marked: Marked
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from layer_streamer import LayerStreamerTuner\n"
        "tuner = LayerStreamerTuner.from_checkpoint(sys.argv[1], n_runs=2,\n"
        "    n_gpu_values=[1, 2], read_mode_values=['mapped'], max_device_bytes='2GiB')\n"
        "tuner.tune()\n"
        "assert tuner.best.peak_device_bytes > 0\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    process = run_script(script, checkpoint, mark=marked)
    assert process.returncode == 0, process.stderr


def example(checkpoint: Path, *options: str) -> list[str]:
    return [
        "tune", str(checkpoint), "--device", "cpu",
        "--n-cpu-pinned-values", "none", "--read-mode-values", "buffered",
        "--read-threads-values", "1", "--read-chunk-values", "none", "--n-runs", "2", *options,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_example_prints_a_call_that_can_be_pasted(
    checkpoint: Path, tmp_path: Path, marked: Marked
) -> None:
    report = tmp_path / "report"
    process = subprocess.run(
        [*COMMAND, *example(checkpoint, "--n-gpu-values", "1", "--report", str(report))],
        capture_output=True, text=True, env=os.environ | marked.environment, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "best so far: " in process.stderr
    names: dict[str, Any] = {"LayerStreamer": LayerStreamer}
    exec(process.stdout, names)
    streamer = names["streamer"]
    assert streamer.plan.placement.device_slots[0].count == 2
    streamer.close()
    assert sorted(path.name for path in report.iterdir()) == ["tune.md", "tune.png"]


@pytest.mark.slow
def test_ctrl_c_in_the_example_tells_the_best_so_far_and_the_rest_goes_on_later(
    checkpoint: Path, tmp_path: Path, marked: Marked
) -> None:
    results = tmp_path / "results"
    command = example(
        checkpoint, "--n-gpu-values", "1,2,3,4,5,6", "--strategy", "grid", "--results", str(results)
    )
    with subprocess.Popen(
        [*COMMAND, *command], stderr=subprocess.PIPE, text=True, env=os.environ | marked.environment
    ) as process:
        assert process.stderr is not None
        seen = ""
        while "best so far" not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        process.send_signal(signal.SIGINT)
        seen = process.stderr.read()
    assert process.returncode == 130, seen
    assert re.search(r"best so far: [\d.]+ s a run: n_gpu=", seen)
    assert "Traceback" not in seen
    finished = sum('"record"' in line for line in results.read_text().splitlines())
    assert 1 <= finished < 6


def test_the_example_refuses_what_cannot_be_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(example(tmp_path / "nothing", "--n-gpu-values", "1")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def test_a_survey_imports_what_this_process_does_and_nothing_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("psutil", "torch", "layer_streamer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the folder')")
    file = tmp_path / "file"
    file.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).is_absolute()])
    assert take_survey("cpu", file).machine.devices == ("cpu",)
