"""Random checkpoints of mixtures of experts, as transformers, gguf and the engine find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import random_packed
import torch
from assets import relative_error
from fabricated import MIXTURES, add_tiny_shapes, make
from shapes import SHAPES
from transformers import AutoModelForCausalLM
from zoo import reference

from layer_streamer.llm.engine import StreamingEngine
from layer_streamer.llm.metadata import load_tokenizer, metadata_directory
from layer_streamer.llm.opening import Model

IDS = [3, 141, 59, 26, 5, 35]


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_tiny_shapes(monkeypatch)
    monkeypatch.setattr(random_packed, "MIN_POOL_NBYTES", 1 << 16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def logits(path: Path) -> torch.Tensor:
    with StreamingEngine(path, device="cpu", dtype=torch.float32, max_length=32) as engine:
        row = engine._runner.kv.rows.add(32)
        assert row is not None
        return engine._runner.forward([(row, torch.tensor(IDS))], every_position=True)


@pytest.mark.parametrize("shape", MIXTURES)
def test_transformers_and_the_engine_find_the_same_in_a_mixture(tmp_path: Path, shape: str) -> None:
    out = make(tmp_path / "out", "--dtype", "float32", shape=shape)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    found = logits(out)
    assert relative_error(found, reference(model, IDS, len(IDS))) <= 1e-5 and found.std() > 0.01


@pytest.mark.parametrize("kind", ["q4_k", "q8_0", "ct4", "ct8", "fp8"])
@pytest.mark.parametrize("shape", MIXTURES)
def test_a_packed_mixture_computes_and_is_not_dead(tmp_path: Path, shape: str, kind: str) -> None:
    out = make(tmp_path / ("a.gguf" if kind[0] == "q" else "a"), "--format", kind, shape=shape)
    found = logits(out)
    assert found.isfinite().all() and 0.02 < found.std() < 10
    model = Model.read(out, print)
    kinds = {module: matrix.format for module, matrix in model.names.layers[1].items()}
    assert kinds.pop("mlp.gate") in ("F32", "BF16")
    assert not set(kinds.values()) & {"F32", "BF16"}


@pytest.mark.parametrize("shape", MIXTURES)
def test_a_layers_experts_are_three_tensors_of_a_gguf_file(tmp_path: Path, shape: str) -> None:
    reader = gguf.GGUFReader(make(tmp_path / "a.gguf", "--format", "q8_0", shape=shape))
    sizes = {tensor.name: list(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    config = SHAPES[shape]
    experts = config.get("num_experts") or config["num_local_experts"]
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    for layer in range(config["num_hidden_layers"]):
        assert sizes[f"blk.{layer}.ffn_gate_inp.weight"] == [experts, 64]
        for matrix in ("gate", "up"):
            assert sizes[f"blk.{layer}.ffn_{matrix}_exps.weight"] == [experts, width, 64]
        assert sizes[f"blk.{layer}.ffn_down_exps.weight"] == [experts, 64, width]
    assert not [name for name in sizes if ".experts." in name]


def test_a_router_is_no_target_of_what_packs_the_others(tmp_path: Path) -> None:
    def packing(kind: str) -> Any:
        out = make(tmp_path / kind, "--format", kind, shape="tiny-mixtral")
        return json.loads((out / "config.json").read_text())["quantization_config"]

    assert packing("ct4")["ignore"] == ["lm_head", "re:.*block_sparse_moe[.]gate$"]
    assert packing("fp8")["modules_to_not_convert"] == ["lm_head", "block_sparse_moe.gate"]


@pytest.mark.parametrize("shape", ["tiny-qwen3-moe", "tiny-mixtral"])
def test_a_mixture_in_a_gguf_file_takes_any_text(tmp_path: Path, shape: str) -> None:
    out = make(tmp_path / "a.gguf", "--format", "q8_0", shape=shape)
    with StreamingEngine(out, device="cpu", max_length=32) as engine:
        tokenizer = load_tokenizer(metadata_directory(engine.model.manifest, print))
        assert tokenizer.decode(tokenizer.encode("Grüße, 世界!\n")) == "Grüße, 世界!\n"
        assert engine.generate("ab", max_new_tokens=3, return_details=True).prompt_tokens > 0
