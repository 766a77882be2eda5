"""device="cpu" and its plans leave CUDA alone: it would be started in a process that forks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint

from layer_streamer import LayerStreamer, plan_checkpoint


@pytest.mark.parametrize("options", [{}, {"device_budget": "1GiB"}, {"read_mode": "mapped"}])
def test_a_streamer_on_the_cpu_asks_nothing_of_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    tiny_checkpoint(tmp_path)

    def touched(*arguments: Any, **named: Any) -> None:
        raise AssertionError("CUDA was asked")

    for module in (torch.cuda, torch.accelerator):
        for name in dir(module):
            if callable(getattr(module, name)) and name[0].islower():
                monkeypatch.setattr(module, name, touched)
    plan_checkpoint(tmp_path, device="cpu", **options)
    with LayerStreamer.from_checkpoint(tmp_path, device="cpu", **options) as streamer:
        streamer.run_pass(torch.ones(1, device="cpu"), lambda x, w, i: x)
        streamer.load_static("lm_head.weight")
        assert streamer.last_pass is not None
