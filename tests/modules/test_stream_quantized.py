"""Quantized checkpoints, streamed: the answers of what transformers unpacks whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recipes import loaded, quiet
from test_quantized import OLD
from tiny_quantized import quantized_checkpoint

from layer_streamer import stream


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "fp8"), ("mixtral", "fp8"), ("gpt_oss", "mxfp4"), ("llama", "ct_int4")],
)
def test_answers_are_those_of_the_model_that_is_unpacked(
    tmp_path: Path, name: str, method: str
) -> None:
    if OLD and method.startswith("ct"):
        pytest.skip("this transformers unpacks whole models only")
    quantized_checkpoint(tmp_path, name, method)
    options: dict[str, Any] = {}
    if method.startswith("ct"):
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    ids = torch.tensor([[9, 17, 33, 12]])
    with quiet(), torch.no_grad():
        plain = loaded(transformers.AutoModelForCausalLM, tmp_path, dtype="auto", **options).eval()
        model = stream(tmp_path, device="cpu", n_gpu=1)
        for _ in range(2):
            assert torch.equal(model(ids).logits, plain(ids).logits)
    model.layer_streamer.close()
