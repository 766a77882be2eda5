"""The same bits by Triton's kernels: in its interpreter, and on a GPU with whole engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import random_packed
import torch
from fabricated import LLAMA, add_tiny_shapes, make
from paths import ENGINE
from shapes import SHAPES
from small_engine import drafts_always
from triton_runs import EVERY_CASE, INTERPRETED, needs_triton, run_checks

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.passes import ways

CHECKS = ENGINE / "fixed_products_against_torch.py"


@needs_triton
@pytest.mark.slow
def test_tiles_and_attention_of_any_tokens_are_right_in_the_interpreter() -> None:
    run_checks(INTERPRETED, CHECKS)


@needs_triton
@pytest.mark.slow
def test_so_they_are_with_windows_and_longer_texts() -> None:
    run_checks(INTERPRETED | {EVERY_CASE: "1"}, CHECKS)


@needs_triton
@pytest.mark.gpu
def test_tiles_and_attention_of_any_tokens_are_right_on_a_gpu() -> None:
    run_checks({"TRITON_INTERPRET": "0"}, CHECKS)


def test_a_gpu_that_triton_does_not_serve_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "triton_serves", lambda device: False)
    add_tiny_shapes(monkeypatch)
    with StreamingEngine(make(tmp_path / "out", shape=LLAMA), device="cpu") as engine:
        model = engine.model
    assert "needs Triton" in str(ways.obstacle(torch.device("cuda", 0), model.config, 64))
    assert ways.obstacle(torch.device("cpu"), model.config, 64) is None


gpu = pytest.mark.gpu
FORMATS = ["bf16", "q4_k", "ct4"]
CHOICES: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.3},  # without, random weights say one thing
    {"temperature": 0.8, "seed": 5},
]
PROMPTS = [[5 + i, 60 + i, 7 * i + 3, 40] * (3 + 9 * (i % 4)) for i in range(16)]


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Of four layers of a few million weights, with heads of 64."""
    add_tiny_shapes(monkeypatch)
    wide = {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    monkeypatch.setitem(SHAPES, "wide", SHAPES[LLAMA] | wide)
    monkeypatch.setattr(random_packed, "MIN_POOL_NBYTES", 1 << 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield "wide"


def ids(engine: StreamingEngine, prompts: Any, **options: Any) -> list[Any]:
    options = {"max_new_tokens": 48, "return_details": True} | options
    return [done.ids for done in engine.generate(prompts, **options)]


@needs_triton
@gpu
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_texts_on_a_gpu_are_the_same_with_and_without_drafts_alone_and_among_sixteen(
    tmp_path: Path, shape: str, kind: str, choice: dict[str, Any]
) -> None:
    out = make(tmp_path / ("out.gguf" if kind == "q4_k" else "out"), "--format", kind, shape=shape)
    found, agreed = [], 0
    for options in ({}, {"lookup": True}, {"lookup": True, "kv": "host", "prefill_chunk": 19}):
        with StreamingEngine(
            out, device="cuda", dtype=torch.bfloat16, max_length=256, kv_tokens=16 * 256,
            max_batch=16, reproducible=True, **options,
        ) as engine:  # fmt: skip
            assert not engine.plan.captures
            if "lookup" in options:
                drafts_always(engine)
            found.append(ids(engine, PROMPTS, **choice))
            alone = []
            for i in (0, 3, 14):
                own = choice | ({"seed": choice["seed"] + i} if "seed" in choice else {})
                alone += ids(engine, [PROMPTS[i]], **own)
            assert alone == [found[-1][i] for i in (0, 3, 14)]
            done = engine.generate([1, 2, 3, 4] * 8, max_new_tokens=48, return_details=True)
            agreed += done.agreed
    assert found == found[:1] * len(found)
    assert len({tuple(row) for row in found[0]}) > 8, "texts that are all alike prove little"
    assert kind != "bf16" or agreed, "nothing was drafted"


@needs_triton
@gpu
def test_texts_on_a_gpu_are_so_with_keys_and_values_in_eight_bits(
    tmp_path: Path, shape: str
) -> None:
    out, found = make(tmp_path / "out", "--format", "bf16", shape=shape), []
    for options in ({}, {"lookup": True, "prefill_chunk": 19}):
        with StreamingEngine(
            out, device="cuda", dtype=torch.bfloat16, max_length=256, kv_tokens=16 * 256,
            max_batch=16, reproducible=True, kv="host", kv_int8=True, **options,
        ) as engine:  # fmt: skip
            if "lookup" in options:
                drafts_always(engine)
            found.append(ids(engine, PROMPTS, **CHOICES[0]))
            found[-1].append(ids(engine, [PROMPTS[3]], **CHOICES[0])[0])
    assert found[0] == found[1] and found[0][3] == found[0][-1]


@needs_triton
@gpu
def test_logits_on_a_gpu_are_the_same_bits_in_bfloat16_however_long_the_prompt(
    tmp_path: Path, shape: str
) -> None:
    out = make(tmp_path / "out", "--format", "bf16", shape=shape)
    tokens, found = [(7 * i) % 490 + 3 for i in range(700)], []
    with StreamingEngine(
        out, device="cuda", dtype=torch.bfloat16, max_length=1024, reproducible=True
    ) as engine:
        forward, rows = engine._runner.forward, engine._runner.kv.rows
        for cuts in ([700], [1] * 20 + [680], [512, 1, 63, 64, 60], [699, 1]):
            row, pieces, at = rows.add(1024), [], 0
            assert row is not None
            for count in cuts:
                part = [(row, tokens[at : at + count])]
                pieces.append(forward(part, every_position=True).clone())
                at += count
            rows.drop(row)
            found.append(torch.cat(pieces))
    assert all(torch.equal(other, found[0]) for other in found)
