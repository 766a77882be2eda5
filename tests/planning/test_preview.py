"""The plan of a checkpoint that is not opened, against what a streamer then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint

from layer_streamer import ConfigError, LayerStreamer, plan_checkpoint

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16, "n_gpu": 1, "n_cpu_pinned": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path, 5, hidden=40)
    return tmp_path


@pytest.mark.parametrize("budget", [None, "100 KiB"])
def test_the_plan_is_that_of_the_streamer_that_is_opened_then(
    model: Path, budget: str | None
) -> None:
    plan = plan_checkpoint(model, device_budget=budget, **OPTIONS)
    with LayerStreamer.from_checkpoint(model, device_budget=budget, **OPTIONS) as streamer:
        assert streamer.plan.placement == plan.placement
        # Pages of the host arena are what the plan rounds to.
        assert streamer.memory.host_bytes <= sum(plan.placement.device_bytes) + 4096 * 10


def test_options_that_the_streamer_refuses_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="device_budget"):
        plan_checkpoint(model, **OPTIONS, device_budget=1)
    with pytest.raises(TypeError, match="n_gpus"):
        plan_checkpoint(model, device="cpu", n_gpus=1)
