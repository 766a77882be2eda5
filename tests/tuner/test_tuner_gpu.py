"""Trials on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import tuner_setups as setups
from tuner_support import Marked, checkpoint, marked, run_script, try_setup

from layer_streamer.tuner.trials.model_args import encode_model

__all__ = ["checkpoint", "marked"]
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("marked")]

PARENT = """
import sys
from pathlib import Path
import torch
import tuner_setups
from tuner_support import try_setup
from layer_streamer.tuner.trials.model_args import encode_model

model = encode_model({"path": sys.argv[1], "device": "cuda"})
print(try_setup(Path(sys.argv[1]), tuner_setups.healthy, model=model).ending)
print(torch.cuda.is_initialized())
"""


def test_a_candidate_that_runs_the_gpu_out_of_memory_costs_one_trial(checkpoint: Path) -> None:
    model = encode_model({"path": checkpoint, "device": "cuda"})
    record = try_setup(checkpoint, setups.allocates_on_the_gpu, model=model)
    assert record.ending == "out of memory"
    assert record.detail.startswith("OutOfMemoryError")
    for _ in range(2):
        record = try_setup(checkpoint, setups.allocates_on_the_gpu, model=model)
        assert record.ending == "out of memory"
        record = try_setup(checkpoint, setups.healthy, model=model)
        assert (record.ending, record.detail) == ("ok", "")
        assert 0 < record.peak_device_bytes < 1 << 30


def test_a_runs_seconds_include_the_devices_work(checkpoint: Path) -> None:
    model = encode_model({"path": checkpoint, "device": "cuda"})
    record = try_setup(checkpoint, setups.launches_work, model=model)
    assert record.ending == "ok"
    # A billion cycles, of clocks that no GPU reaches.
    assert min(record.run_seconds) > 0.2


def test_the_parent_of_a_trial_on_the_gpu_does_not_initialise_cuda(
    tmp_path: Path, checkpoint: Path, marked: Marked
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    done = run_script(script, checkpoint, mark=marked)
    assert (done.stdout, done.stderr) == ("ok\nFalse\n", "")
