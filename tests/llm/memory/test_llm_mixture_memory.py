"""What a mixture of experts takes in passing is part of the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import open_runner, tiny_checkpoint
from torch.profiler import ProfilerActivity, profile
from zoo import zoo_model

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.memory.footprint import Footprint, Needs
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.passes.chunking import Chunking

TOKENS, ROOM = 128, 512
MANY = {"num_experts": 32, "num_experts_per_tok": 12, "intermediate_size": 64}
NARROW = {"num_experts": 32, "num_experts_per_tok": 8}
WIDE = {"intermediate_size": 768}
SHARED = {"shared_expert_intermediate_size": 768}
CASES = [("olmoe", MANY), ("qwen3_moe", NARROW), ("mixtral", WIDE), ("qwen2_moe", SHARED)]


def peak(work: Callable[[], object]) -> int:
    """Most bytes of tensors that were there at a time beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = most = 0
    assert profiled.profiler is not None
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("dtype", "reproducible"), [(torch.float32, True), (torch.bfloat16, False)]
)
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=[name for name, _ in CASES])
def test_a_pass_in_which_some_experts_have_all_tokens_stays_inside_the_plan(
    tmp_path: Path, name: str, sizes: dict[str, Any], dtype: torch.dtype, reproducible: bool
) -> None:
    model = zoo_model(name, hidden_size=256, num_hidden_layers=2, **sizes)
    with torch.no_grad():  # all alike: the same ones are chosen for all
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    path = tiny_checkpoint(tmp_path, model.to(dtype))
    config, ids = load_config(path), [i % 500 for i in range(TOKENS)]
    chunking = Chunking(TOKENS, reproducible=reproducible)
    options: dict[str, Any] = {"max_rows": 2, "dtype": dtype, "chunking": chunking}
    with open_runner(path, config, tokens=ROOM, **options) as runner:
        first, second = (runner.kv.rows.add(TOKENS) for _ in range(2))
        runner.forward([(first, ids[:2])])
        found = peak(lambda: runner.forward([(second, ids)]))
    needs = Needs(
        kv_tokens=ROOM, max_batch=2, dtype=dtype, device_type="cpu", int8=False,
        packed_nbytes=0, reproducible=reproducible,
    )  # fmt: skip
    footprint = Footprint(config, needs)
    planned = footprint.temporaries(TOKENS) + footprint.logits()
    assert planned / 4 < found <= planned


@pytest.mark.gpu
def test_the_peak_of_a_mixture_on_a_gpu_stays_inside_the_plan(tmp_path: Path) -> None:
    """Each expert has another number of tokens, so that its tensors have another size."""
    model = zoo_model(
        "qwen3_moe", hidden_size=512, num_hidden_layers=6, vocab_size=32000, num_experts=32,
        num_experts_per_tok=8, moe_intermediate_size=256, num_attention_heads=8, head_dim=64,
        num_key_value_heads=4, max_position_embeddings=1 << 15,
    )  # fmt: skip
    path, budget = tiny_checkpoint(tmp_path, model), 900 << 20
    options: dict[str, Any] = {"device": "cuda", "max_length": 8192, "kv_tokens": 16384}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    with StreamingEngine(path, device_budget=budget, max_batch=16, **options) as engine:
        engine.generate([[i] * 4000 for i in range(4)], max_new_tokens=20, return_details=True)
        engine.generate([3] * 8000, max_new_tokens=20, return_details=True, temperature=1.0)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_reserved() - before <= budget, str(engine.plan)
