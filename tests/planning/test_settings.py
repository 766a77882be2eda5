"""Settings: what is refused, what is capped and said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from support import make_device, open_checkpoint

from layer_streamer import ConfigError, LayerStreamer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gpu": -1}, "n_gpu=-1: must be from 0"),
        ({"n_gpu": None}, "n_gpu=None: must be an int"),
        ({"n_cpu_pinned": True}, "n_cpu_pinned=True: must be an int"),
        ({"n_cpu": 2.0}, r"n_cpu=2\.0: must be an int"),
        ({"batch_gpu": 0}, "batch_gpu=0: must be from 1"),
        ({"read_threads": 0}, "read_threads=0"),
        ({"read_chunk": 1}, "read_chunk=1"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"tail": "lm_head.weight"}, "must be a list"),
        ({"tail": ["nope"]}, "no tensor named 'nope'"),
        ({"layer_pattern": "h."}, "layer_pattern='h.'"),
        ({"device": "cuda:77"}, "device='cuda:77'"),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=message):
        LayerStreamer.from_checkpoint(tmp_path, **{"device": "cpu", **options})


def test_an_unknown_option_is_an_error(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(TypeError, match="n_gpus"):
        LayerStreamer.from_checkpoint(tmp_path, device="cpu", n_gpus=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_gpu": 9, "n_gpu": 1}, "batch_gpu=9 is more than its pool's 2 slots: capped"),
        ({"batch_cpu": 3, "n_cpu": 1}, "batch_cpu=3 is more than its pool's 2 slots: capped"),
        (
            {"batch_cpu_pinned": 2, "n_cpu_pinned": None},
            "batch_cpu_pinned=2 has no effect: there is no pinned pool",
        ),
        ({"batch_cpu": 2}, "batch_cpu=2 has no effect: there is no pageable pool"),
    ],
)
def test_a_batch_that_cannot_be_honoured_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], message: str
) -> None:
    tiny_checkpoint(tmp_path)
    with (
        caplog.at_level(logging.INFO, logger="layer_streamer"),
        open_checkpoint(make_device("fake"), tmp_path, **options) as streamer,
    ):
        assert message in caplog.text
        streamer.run_pass(None, lambda x, w, i: x)


def test_the_smallest_configuration_works(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, 1)
    options: dict[str, Any] = {"n_gpu": 0, "n_cpu_pinned": 0, "n_cpu": 0, "read_threads": 1}
    with open_checkpoint(make_device("fake"), tmp_path, **options) as streamer:
        for _ in range(3):
            assert streamer.run_pass(0, lambda x, w, i: x + 1) == 1
