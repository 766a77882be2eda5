"""Quantized checkpoints, streamed: the answers of what transformers unpacks whole."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gptqmodel_answers
import pytest
import torch
import transformers
from packings import PACKINGS
from recipes import loaded, quiet
from test_quantized import OLD
from tiny_quantized import packed_checkpoint, quantized_checkpoint

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


@pytest.mark.slow
@pytest.mark.skipif(
    OLD or importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed"
)
@pytest.mark.parametrize(
    "packing", ["gptq4-g32", "gptq4-v2-act-order", "gptq8-v2-channel", "awq-g32"]
)
def test_answers_are_those_of_the_layers_of_gptqmodel(tmp_path: Path, packing: str) -> None:
    packed_checkpoint(tmp_path, "llama", PACKINGS[packing])
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["backend"] = "torch_awq" if "awq" in packing else "torch"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    output = tmp_path / "answer.pt"
    done = subprocess.run(
        [sys.executable, gptqmodel_answers.__file__, str(tmp_path), str(output)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = torch.load(output)
    assert "Torch" in theirs["kind"]
    with quiet(), torch.no_grad():
        model: Any = stream(tmp_path, device="cpu", n_gpu=1, dtype=torch.float32)
        found = model(torch.tensor(gptqmodel_answers.IDS)).logits
    # Their scales are multiplied in half precision here and there.
    assert torch.allclose(found, theirs["logits"], rtol=0, atol=1e-4)
    model.layer_streamer.close()
