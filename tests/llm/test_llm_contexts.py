"""Contexts: how far scaled rotations reach, and batches whose windows hold more than a pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from assets import TINY, tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import make_engine
from transformers import Gemma3TextConfig, LlamaConfig
from zoo import GEMMA, zoo_model

from layer_streamer.llm.kv.kept import KeptRow
from layer_streamer.llm.kv.rows import Rows, make_spans
from layer_streamer.llm.models.config import model_config
from layer_streamer.llm.models.rope_config import LinearScaling, Rope, YarnScaling, context_length

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
PUBLISHED = {
    "as Qwen2.5's card says": (32768, YARN, 131072),
    "as Qwen3's card says": (40960, YARN, 131072),
    "yarn whose config names what it has made": (131072, YARN, 131072),
    "Llama 3.1": (131072, LLAMA3 | {"factor": 8.0}, 131072),
    "Llama 3.2": (131072, LLAMA3 | {"factor": 32.0}, 131072),
    "llama3 whose config names the context of training": (8192, LLAMA3 | {"factor": 8.0}, 65536),
    "Vicuna 16k": (4096, {"rope_type": "linear", "factor": 4.0}, 16384),
    "dynamic NTK": (2048, {"rope_type": "dynamic", "factor": 2.0}, 4096),
    "a factor below 1": (2048, {"rope_type": "linear", "factor": 0.5}, 2048),
    "no scaling": (2048, {"rope_type": "default"}, 2048),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_scaled_rotation_extends_the_context_as_it_is_published(name: str) -> None:
    named, rope, expected = PUBLISHED[name]
    rope = {"rope_theta": 1e6} | rope
    config = LlamaConfig(**TINY | {"max_position_embeddings": named, "rope_parameters": rope})
    assert model_config(config).max_positions == expected


def test_gemma_3_names_the_context_that_its_scaling_has_made() -> None:
    assert model_config(Gemma3TextConfig(**TINY | GEMMA)).max_positions == 256


@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.floats(1e-3, 1e6))
def test_a_context_is_never_shorter_than_the_config_says(
    named: int, original: int, by: float
) -> None:
    ropes = [
        Rope(1e4, LinearScaling(factor=by)),
        Rope(1e4, YarnScaling(factor=by, original_max_positions=original)),
    ]
    assert all(context_length([rope], named) >= named for rope in ropes)


IDS = torch.randint(3, 512, (150,), generator=torch.Generator().manual_seed(0)).tolist()
SHORT: dict[str, Any] = {"max_position_embeddings": 64, "eos_token_id": None}
SCALED = {
    "qwen2": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "mistral": {"rope_type": "linear", "factor": 4.0},
    "llama": {"rope_type": "dynamic", "factor": 4.0},
}


def transformers_ids(model: Any, ids: list[int], count: int) -> tuple[int, ...]:
    out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tuple(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("kind", SCALED)
def test_texts_beyond_the_context_of_training_are_those_of_transformers(
    tmp_path: Path, kind: str
) -> None:
    rope = {"rope_theta": 1e4} | SCALED[kind]
    model = zoo_model(kind, rope_parameters=rope, **SHORT)
    prompts = [IDS, IDS[:60], IDS[:20]]
    expected = [transformers_ids(model, ids, 8) for ids in prompts]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "return_details": True}
    with make_engine(tiny_checkpoint(tmp_path, model), max_length=256) as engine:
        assert [done.ids for done in engine.generate(prompts, **options)] == expected
        for ids in (IDS[:20], IDS, IDS[:60]):  # what is kept was rotated for another length
            found = engine.generate(ids, reuse_prefix=True, **options).ids
            assert found == expected[prompts.index(ids)]
        assert engine.max_length == 256
    with pytest.raises(ValueError, match="max_length=257: the model's context is 256"):
        make_engine(tmp_path, max_length=257, kv_tokens=512)


def test_a_row_is_reused_only_while_its_keys_are_the_same_in_any_text() -> None:
    kept = KeptRow(Rows(make_spans([None], 512, 1), 1), alike=10)
    for length, held, ids, same in (
        (4, [1, 2, 3, 4], [1, 2, 3, 9], 3),
        (4, [1, 2, 3, 4], [1, 2, 3, *range(20)], 0),
        (23, [1, 2, 3, *range(20)], [1, 2, 3, 4], 0),  # they were rotated for a longer text
    ):
        row = kept.take([], 512)
        assert row is not None
        row.length = length
        kept.keep(row, held)
        row = kept.take(ids, 512)
        assert row is not None and row.length == same
        assert kept.row is None and kept.take(ids, 512) is None, "it is in use"
        kept.keep(row, ids)


def test_the_row_that_was_kept_last_takes_the_place_of_the_one_before() -> None:
    rows = Rows(make_spans([None], 512, 2), 2)
    kept = KeptRow(rows, alike=10)
    one, other = (kept.take([1], 256) for _ in range(2))
    assert one is not None and other is not None
    kept.keep(one, [1])
    kept.keep(other, [2])
    assert list(rows) == [other] and kept.row is other
    kept.forget()
    kept.forget()
    assert list(rows) == [] and kept.row is None


WINDOWS = {
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    "gemma3_text": {"sliding_window": 16},
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_rows_whose_windows_hold_more_tokens_than_a_pass_has_room_for_take_turns(
    tmp_path: Path, kind: str
) -> None:
    model = zoo_model(kind, max_position_embeddings=2048, eos_token_id=None, **WINDOWS[kind])
    path = tiny_checkpoint(tmp_path, model)
    lengths = (700, 1000, 3, 650, 900, 1)
    prompts = [(IDS * 10)[i : i + n] for i, n in enumerate(lengths)]
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0, "return_details": True}
    limits = {"max_length": 1024, "kv_tokens": 1024}
    with make_engine(path, max_batch=1, **limits) as engine:
        alone = [engine.generate(ids, **options).ids for ids in prompts]
    with make_engine(path, max_batch=4, **limits) as engine:
        counts: list[tuple[int, int]] = []
        forward = engine._runner.forward

        def counted(entries: Any, **kwargs: Any) -> torch.Tensor:
            counts.append((len(entries), sum(len(ids) for _, ids in entries)))
            return forward(entries, **kwargs)

        engine._runner.forward = counted  # type: ignore[method-assign]
        found = engine.generate(prompts, **options)
        assert [done.ids for done in found] == alone
        assert max(tokens for _, tokens in counts) <= engine._runner.most_tokens
        if kind != "gemma3_text":  # of whose layers some see everything
            assert max(rows for rows, _ in counts) > 1
        row = engine._runner.kv.rows.add(2000)
        if row is not None:
            with pytest.raises(ValueError, match="1025 tokens in one pass: room is for 1024"):
                forward([(row, [1] * 1025)])


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 250), min_size=1, max_size=8), st.integers(1, 4))
def test_any_lengths_of_rows_with_windows_come_to_their_ends(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], batch: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "windows"
    if not path.exists():
        model = zoo_model("mistral", max_position_embeddings=256, eos_token_id=None)
        tiny_checkpoint(path, model)
    prompts = [(IDS * 2)[i : i + n] for i, n in enumerate(lengths)]
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0, "return_details": True}
    with make_engine(path, max_length=256, kv_tokens=256, max_batch=batch) as engine:
        found = engine.generate(prompts, **options)
        assert [len(done.ids) for done in found] == [4] * len(prompts)
