"""Layers in host memory beside a GPU: the same text, captured or not, drafted or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from assets import tiny_checkpoint, tiny_model

from layer_streamer.llm.engine import StreamingEngine

pytestmark = pytest.mark.gpu
PROMPTS = [[1 + i] * length for i, length in enumerate((3, 70, 17))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("qwen2", num_hidden_layers=6, max_position_embeddings=512)
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), model)


def ids(path: Path, **options: Any) -> tuple[list[Any], Any]:
    """What an engine says, and its host's passes."""
    given = {"device": "cuda", "dtype": torch.float32, "max_length": 128, "kv_tokens": 1024}
    with StreamingEngine(path, **(given | options)) as engine:
        if engine._runner.host is not None:
            engine._runner.host.choice.there = lambda tokens: tokens <= 8  # type: ignore[method-assign]
        asked = {"max_new_tokens": 40, "temperature": 0, "return_details": True}
        found = [done.ids for done in engine.generate(PROMPTS, **asked)]
        host = engine._runner.host
        return found, None if host is None else host.passes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device_budget": "1GiB"},
        {"device_budget": "1GiB", "lookup": True},
        {"kv": "host", "n_gpu": 1},
        {"read_mode": "buffered", "host_budget": "64MiB"},
    ],
)
def test_a_gpu_and_a_processor_together_say_what_the_gpu_says(
    path: Path, options: dict[str, Any]
) -> None:
    expected, none = ids(path, **options)
    found, passes = ids(path, host_layers=3, **options)
    assert none is None and passes > 0
    assert found == expected
