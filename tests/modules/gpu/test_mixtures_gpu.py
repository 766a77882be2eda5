"""Experts on demand on an NVIDIA GPU: the resident model's answers, whatever slots there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import loaded, quiet
from tiny_models import has, run, tiny_class, tiny_model

from layer_streamer import stream

pytestmark = pytest.mark.gpu

KERNELS = 1e-5
"""What a GPU's kernels differ by with the addresses of their operands, in float32."""
TYPES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "nemotron_h")


def streamed(name: str, folder: Path, slots: int | None, **options: Any) -> Any:
    given = {"experts": "demand", "expert_slots": slots, "device_budget": "64MiB", **options}
    with quiet():
        return stream(folder, cls=tiny_class(name), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("mode", ["mapped", "buffered"])
def test_experts_on_demand_give_a_gpu_the_resident_answers(
    tmp_path: Path, name: str, mode: str
) -> None:
    if not has(name):
        pytest.skip("this transformers does not have it")
    with quiet():
        tiny_model(name).save_pretrained(tmp_path)
        plain = loaded(tiny_class(name), tmp_path, experts_implementation="eager").eval()
        want = run(name, plain.to("cuda"))
    for slots in (1, 3, None):
        model = streamed(name, tmp_path, slots, read_mode=mode)
        for _ in range(3):
            with quiet():
                got = run(name, model)
            for key, tensor in want.items():
                assert torch.allclose(got[key], tensor, rtol=0, atol=KERNELS), (slots, key)
        assert next(iter(model.layer_streamer.last_experts.values())).asked
        model.layer_streamer.close()


def test_on_a_gpu_passes_take_no_more_memory(tmp_path: Path) -> None:
    with quiet():
        tiny_model("mixtral").save_pretrained(tmp_path)
    model, ids = streamed("mixtral", tmp_path, 2), torch.arange(8, 24, device="cuda")[None]
    taken = []
    with torch.no_grad(), quiet():
        for passes in (3, 50):
            for _ in range(passes):
                model(ids)
            torch.cuda.synchronize()
            taken.append(torch.cuda.memory_allocated())
    assert taken[0] == taken[1]
    model.layer_streamer.close()
