"""What an engine is opened with: every option of the streamer, models that are none of its own."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import byte_model
from safetensors.torch import save_file

from layer_streamer import CheckpointError, LayerStreamer
from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.errors import UnsupportedModelError
from layer_streamer.llm.opening import Model
from layer_streamer.llm.scheduling.scheduler import Scheduler

TUNED: dict[str, Any] = {
    "n_gpu": 1, "n_cpu_pinned": 0, "n_cpu": 2, "batch_gpu": 1, "batch_cpu_pinned": 1,
    "batch_cpu": 2, "device_budget": "64MiB", "host_budget": "64MiB", "reserve_bytes": "1MiB",
    "read_mode": "buffered", "read_threads": 2, "read_chunk": 1 << 16,
    "layer_pattern": "model.layers.{i}.", "track_progress": False, "host_layers": 2,
}  # fmt: skip
OWN = {"path", "device", "dtype", "tail", "on_copy", "layers", "experts", "expert_slots"}
"""What the engine itself decides, takes in another way, or takes of mixtures alone."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model(tmp_path_factory.mktemp("tiny"))


def test_an_engine_takes_every_option_of_the_streamer(path: Path) -> None:
    assert set(TUNED) | OWN >= set(inspect.signature(LayerStreamer.from_checkpoint).parameters)
    ids, count = [1, 2, 3], {"max_new_tokens": 4, "return_details": True}
    with (
        StreamingEngine(path, device="cpu", max_length=64) as plain,
        StreamingEngine(path, device="cpu", max_length=64, **TUNED) as tuned,
    ):
        assert tuned.generate(ids, **count).ids == plain.generate(ids, **count).ids
        plan = tuned.streamer.plan
        assert (plan.read_mode, plan.read_threads, plan.read_chunk) == ("buffered", 2, 1 << 16)
        assert plan.placement == tuned.plan.streamer.placement
        assert tuned.plan.device["reserved"] == 1 << 20


def test_an_option_that_nobody_has_is_named(path: Path) -> None:
    with pytest.raises(TypeError, match="n_gpus"):
        StreamingEngine(path, device="cpu", n_gpus=2)


def test_a_foreign_model_is_said_to_be_one_before_its_layers_are_sought(tmp_path: Path) -> None:
    save_file({"backbone.blocks.0.w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UnsupportedModelError, match=r"config.json: .*'mamba' is not supported"):
            Model.read(place, print)


def test_a_model_of_the_engines_own_that_cannot_be_read_is_not_called_foreign(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="safetensors"):
        Model.read(tmp_path, print)


def test_that_a_context_is_short_is_said_once_a_call(path: Path) -> None:
    said: list[str] = []
    with StreamingEngine(path, device="cpu", max_length=8, notify=said.append) as engine:
        engine.generate([[1, 2], [3, 4], [5]], max_new_tokens=100)
    assert said == ["the context has room for 6 new tokens"]


def test_an_error_within_is_raised_and_one_of_closing_is_a_note_on_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Scheduler) -> None:
        raise RuntimeError("the device is lost")

    engine = StreamingEngine(path, device="cpu", max_length=64)
    with monkeypatch.context() as patched, pytest.raises(KeyError) as caught, engine:
        patched.setattr(Scheduler, "close", fail)
        raise KeyError("mine")
    assert caught.value.__notes__ == ["the device is lost"]
    engine.close()
