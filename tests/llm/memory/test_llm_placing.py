"""Which dtype a GPU computes in, and that float16 is checked."""

from pathlib import Path

import pytest
import torch
from assets import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.memory.placing import suited_dtype


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((12, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),
        ((7, 0), torch.float16),
        ((6, 1), torch.float32),
    ],
)
def test_a_gpu_computes_in_the_dtype_that_its_capability_suits(capability, dtype):
    assert suited_dtype(capability) == dtype


def large_model(directory: Path) -> Path:
    """A model whose feed-forward block goes beyond 65504."""
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight.mul_(10_000)
    model.save_pretrained(directory)
    return directory


def test_a_pass_that_overflows_in_float16_says_so_and_works_in_float32(tmp_path):
    path = large_model(tmp_path)
    options = {"max_new_tokens": 2, "return_details": True, "temperature": 0}
    with (
        StreamingEngine(path, device="cpu", dtype=torch.float16) as engine,
        pytest.raises(ValueError, match="too small for this model"),
    ):
        engine.generate([1, 2, 3], **options)
    with StreamingEngine(path, device="cpu", dtype=torch.float32) as engine:
        assert len(engine.generate([1, 2, 3], **options).ids) == 2
