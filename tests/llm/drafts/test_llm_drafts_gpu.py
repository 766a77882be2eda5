"""Drafts on a GPU: captured passes, the same texts, and memory as planned."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import tiny_checkpoint, tiny_model
from byte_model import byte_model
from small_engine import PROMPTS

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.kernels.triton_support import triton_serves

pytestmark = [pytest.mark.gpu]
GPU = torch.device("cuda:0")
DRAFTS = ("model", "self")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not triton_serves(GPU):
        pytest.skip("needs Triton")
    return byte_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=6)


def opened(path: Path, draft: str | None, **options: Any) -> StreamingEngine:
    """In float32, every layer streamed, and drafting as far as there is room."""
    chosen = path if draft == "model" else draft
    given = {"device": "cuda:0", "dtype": torch.float32, "max_length": 128, "kv_tokens": 512}
    engine = StreamingEngine(path, draft=chosen, **(given | options))
    if engine.scheduler.drafting is not None:
        engine.scheduler.drafting._pace = None
    return engine


def drafter(engine: StreamingEngine) -> Any:
    assert engine.scheduler.drafting is not None
    (source,) = engine.scheduler.drafting._sources.values()
    return source


@pytest.mark.parametrize("draft", DRAFTS)
def test_drafts_are_captured_passes_and_texts_stay_as_they_are(path: Path, draft: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "return_details": True, "temperature": 0.0}
    with opened(path, None) as plain:
        expected = [done.ids for done in plain.generate(PROMPTS, **options)]
    with opened(path, draft) as engine:
        decoder = drafter(engine)._steps._runner.decoder
        before = decoder.passes
        found = engine.generate(PROMPTS, **options)
        assert [done.ids for done in found] == expected
        tokens, passes = (sum(map(len, expected)), sum(done.passes for done in found))
        assert tokens >= (4 if draft == "model" else 1.2) * passes
        assert decoder.passes - before >= tokens - passes, "each drafted token but a draft's last"


@pytest.mark.parametrize("draft", DRAFTS)
def test_closing_returns_all_that_drafts_took(path: Path, draft: str) -> None:
    def left() -> tuple[int, int]:
        with opened(path, draft) as engine:
            engine.generate(PROMPTS, max_new_tokens=20, return_details=True)
        del engine
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    first = left()  # what libraries keep is taken once
    assert [left() for _ in range(3)] == [first] * 3


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_peak_with_a_draft_stays_inside_the_plan(
    tmp_path: Path, dtype: torch.dtype, draft: str
) -> None:
    if not triton_serves(GPU):
        pytest.skip("needs Triton")
    model = tiny_model(
        "qwen2", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=64000,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1 << 13,
        tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    path = tiny_checkpoint(tmp_path, model)
    options = {"dtype": dtype, "max_length": 4096, "kv_tokens": 2 * 4096}
    with opened(path, draft, device_budget="6GiB", **options) as engine:
        spare = engine.plan.device.get("captured passes", 0)  # what is let go of before a layer is
        few = engine.plan.device["layers"] * 3 // 8
        budget = int(engine.plan.device_nbytes - spare - few)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    with opened(path, draft, device_budget=budget, **options) as engine:
        assert not engine.plan.captures and set(engine.streamer.plan.tiers) != {"device"}
        for rows in (1, 2):
            prompts = [[2 + i] * 3000 for i in range(rows)]
            found = engine.generate(prompts, max_new_tokens=8, return_details=True)
            assert all(done.drafted for done in found)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved() - before
    assert peak <= budget + (8 << 20)
