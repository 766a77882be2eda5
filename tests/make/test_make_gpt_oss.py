"""Random checkpoints of gpt-oss, as transformers and the engine find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import random_packed
import torch
from assets import relative_error
from fabricated import OSS, UNTIED, add_tiny_shapes, contents, main, make
from made import plan_made
from safetensors.torch import load_file
from shapes import SHAPES
from transformers import AutoModelForCausalLM, Mxfp4Config
from zoo import reference

from layer_streamer.llm.engine import StreamingEngine

IDS = [3, 141, 59, 26, 5, 35]
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_tiny_shapes(monkeypatch)
    monkeypatch.setattr(random_packed, "MIN_POOL_NBYTES", 1 << 16)


def logits(path: Path, **options: Any) -> torch.Tensor:
    given: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "max_length": 32} | options
    with StreamingEngine(path, **given) as engine:
        row = engine._runner.kv.rows.add(32)
        assert row is not None
        return engine._runner.forward([(row, torch.tensor(IDS))], every_position=True)


@pytest.mark.parametrize("kind", ["bf16", "mxfp4"])
def test_transformers_and_the_engine_find_the_same_in_gpt_oss(tmp_path: Path, kind: str) -> None:
    packed = kind == "mxfp4"
    options = ["--format", kind] if packed else ["--dtype", "float32"]
    out = make(tmp_path / "out", *options, shape=OSS)
    more = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, **more
    )
    assert not any(info.values()), info
    found = logits(out)
    assert relative_error(found, reference(model, IDS, len(IDS))) <= 1e-5
    assert 0.02 < found.std() < 10
    on_demand = logits(out, experts="demand", expert_slots=24)
    assert relative_error(on_demand, found) <= 1e-5


def test_blocks_of_gpt_oss_are_as_published_and_of_the_scale_of_plain_weights(
    tmp_path: Path,
) -> None:
    out = make(tmp_path / "out", "--format", "mxfp4", shape=OSS)
    tensors = load_file(out / "model.safetensors")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if EXPERTS in name}
    assert shapes == {
        f"{EXPERTS}.gate_up_proj_blocks": [4, 320, 2, 16],
        f"{EXPERTS}.gate_up_proj_scales": [4, 320, 2], f"{EXPERTS}.gate_up_proj_bias": [4, 320],
        f"{EXPERTS}.down_proj_blocks": [4, 64, 5, 16], f"{EXPERTS}.down_proj_scales": [4, 64, 5],
        f"{EXPERTS}.down_proj_bias": [4, 64],
    }  # fmt: skip
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = tensors[f"{EXPERTS}.gate_up_proj_blocks"]
    powers = (tensors[f"{EXPERTS}.gate_up_proj_scales"].float() - 127).exp2()[..., None]
    for codes in (blocks & 15, blocks >> 4):
        weights = powers * levels[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
        assert 0.014 < weights.std() < 0.026 and weights.mean().abs() < 0.003
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"


def test_the_whole_shape_of_gpt_oss_has_the_size_that_is_published() -> None:
    config = SHAPES["gpt-oss-20b"] | {"random_values": {}}
    plan = plan_made(config, "mxfp4", "bfloat16", 5e9)
    assert 13.7e9 < plan.nbytes < 13.8e9


def test_a_seed_repeats_every_byte_of_blocks_and_another_gives_others(tmp_path: Path) -> None:
    first, again, other = (
        contents(make(tmp_path / name, "--format", "mxfp4", "--seed", seed, shape=OSS))
        for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        ("q8_0", OSS, "--format q8_0: experts that lie stacked are not packed so"),
        ("ct4", OSS, "--format ct4: experts that lie stacked are not packed so"),
        ("mxfp4", UNTIED, "--format mxfp4: only experts that lie stacked are packed so"),
        ("mxfp4", "odd", "--format mxfp4: no block of it divides 80 columns"),
    ],
)
def test_a_format_that_a_mixture_is_not_in_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    shape: str,
    message: str,
) -> None:
    monkeypatch.setitem(SHAPES, "odd", SHAPES[OSS] | {"intermediate_size": 80})
    out = tmp_path / ("out.gguf" if kind == "q8_0" else "out")
    assert main(out, "--shape", shape, "--format", kind) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not list(tmp_path.iterdir())
