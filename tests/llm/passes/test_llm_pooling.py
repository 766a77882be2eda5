"""Vectors of texts: those of transformers, whatever else goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from assets import tiny_checkpoint, tiny_model
from small_engine import make_engine

from layer_streamer.llm.errors import EngineError

PROMPTS = [[7, 8, 9], [20], [30] * 12, list(range(40, 60))]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), model)


@pytest.mark.parametrize(
    "options", [{}, {"kv": "host"}, {"max_batch": 2, "prefill_chunk": 8}, {"reproducible": True}]
)
def test_a_vector_is_the_mean_of_what_the_final_norm_gives(
    path: Path, model: Any, options: dict[str, Any]
) -> None:
    with make_engine(path, **options) as engine:
        found = list(engine.embed(PROMPTS))
        assert not list(engine._runner.kv.rows)
    for ids, vector in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            states = model.model(torch.tensor([ids])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states.mean(0), dim=0)
        torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-4)
        assert vector.dtype == torch.float32 and vector.device.type == "cpu"


def test_a_text_that_is_being_made_is_the_same_with_vectors_between_its_passes(path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    with make_engine(path, reproducible=True) as engine:
        (alone,) = engine.completions([[5, 6, 7]], **options)
        events = engine.events([[5, 6, 7]], **options)
        requests = []
        for request, _ in events:
            requests.append(request)
            assert len(list(engine.embed(PROMPTS[:2]))) == 2
        assert tuple(requests[-1].new_ids) == alone.ids


def test_where_there_is_no_room_it_says_so_and_holds_none(path: Path) -> None:
    with make_engine(path, max_batch=1) as engine:
        events = engine.events([[5, 6, 7]], max_new_tokens=3, temperature=0.0)
        next(events)
        with pytest.raises(EngineError, match="no room"):
            list(engine.embed(PROMPTS))
        list(events)
        assert len(list(engine.embed(PROMPTS))) == len(PROMPTS)
        with pytest.raises(ValueError, match="max_length"):
            engine.embed([[1] * 100])
