"""Settings: what is refused, what is capped and said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from support import make_device, open_checkpoint, opened_on

from layer_streamer import ConfigError, LayerStreamer, plan_checkpoint
from layer_streamer.planning.options import OPTIONS
from layer_streamer.planning.settings import Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gpu": -1}, "n_gpu=-1: must be from 0"),
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


def opened_by(path: Path, kind: str, **options: Any) -> dict[str, Any]:
    with opened_on(make_device(kind)), LayerStreamer.from_checkpoint(path, **options) as streamer:
        return streamer.plan.document() | {"slots": streamer.plan.placement.device_slots}


@pytest.mark.parametrize("kind", ["cpu", "fake"])
def test_none_is_the_default_of_every_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    # A plan says how much memory there is, which other processes change meanwhile.
    monkeypatch.setattr("layer_streamer.assembly.available_host_bytes", lambda: 2**33)
    tiny_checkpoint(tmp_path, 9)
    default = opened_by(tmp_path, kind)
    for named in (*([name] for name in OPTIONS), list(OPTIONS)):
        assert opened_by(tmp_path, kind, **dict.fromkeys(named)) == default
    nothing = plan_checkpoint(tmp_path, **(dict.fromkeys(OPTIONS) | {"device": "cpu"}))
    assert nothing.document() == plan_checkpoint(tmp_path, device="cpu").document()
    assert Settings(**dict.fromkeys(OPTIONS)) == Settings()  # type: ignore[arg-type]


def test_0_is_no_such_pool(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, 9)
    for pool in ("n_cpu_pinned", "n_cpu"):
        # A pool of no layers is named all the same: files are not mapped in its place.
        assert opened_by(tmp_path, "fake")["read_mode"] == "mapped"
        assert opened_by(tmp_path, "fake", **{pool: 0})["read_mode"] == "buffered"
    for options, slots in (({}, 7), ({"n_cpu_pinned": 0}, 3), ({"n_cpu": 0, "n_gpu": 0}, 5)):
        assert opened_by(tmp_path, "cpu", **options)["slots"][0].count == slots


def test_an_unknown_option_is_an_error(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(TypeError, match="n_gpus"):
        LayerStreamer.from_checkpoint(tmp_path, device="cpu", n_gpus=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="n_gpus"):
        plan_checkpoint(tmp_path, device="cpu", n_gpus=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_gpu": 9, "n_gpu": 1}, "batch_gpu=9 is more than its pool's 2 slots: capped"),
        ({"batch_cpu": 3, "n_cpu": 1}, "batch_cpu=3 is more than its pool's 2 slots: capped"),
        (
            {"batch_cpu_pinned": 2, "n_cpu_pinned": 0},
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
