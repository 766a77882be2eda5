"""Experts of mixtures as transformers saves them: each is found, with its own numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from expert_layouts import bytes_of
from safetensors import safe_open
from tiny_models import has, tiny_model

from layer_streamer.checkpoint.experts import split_experts
from layer_streamer.checkpoint.formats import read_manifest
from layer_streamer.errors import CheckpointError

COUNT = 4
BANKS = {
    "mixtral": ("block_sparse_moe", ["w1.weight", "w2.weight", "w3.weight"]),
    "qwen3_moe": ("mlp", ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]),
    "deepseek_v3": ("mlp", ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]),
    "gpt_oss": ("mlp", ["down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias"]),
    "llama4_text": ("feed_forward", ["down_proj", "gate_up_proj"]),
}
"""Where its files have experts, and what each expert has."""


@pytest.mark.parametrize("name", BANKS)
def test_experts_of_a_model_that_transformers_saved_are_found(tmp_path: Path, name: str) -> None:
    if not has(name):
        pytest.skip(f"transformers does not have {name}")
    tiny_model(name).save_pretrained(tmp_path)
    place, banks = BANKS[name]
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as saved:
        stored = {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118 - no mapping
    found = 0
    for layer in read_manifest(tmp_path).layers:
        rest, experts = split_experts(layer)
        if experts is None:
            assert name == "deepseek_v3" and layer.layer_idx == 0  # a dense one
            continue
        found += 1
        assert list(experts.banks) == [f"{place}.experts.{bank}" for bank in banks]
        assert not [key for key in rest.tensors if re.search(r"\bexperts\.", key)]
        assert any("gate" in key or "router" in key for key in rest.tensors)
        head = f"model.layers.{layer.layer_idx}.{place}.experts."
        for bank in banks:
            for index, spec in enumerate(experts.banks[f"{place}.experts.{bank}"]):
                whole = stored.get(head + bank)
                one = stored[f"{head}{index}.{bank}"] if whole is None else whole[index]
                raw = torch.frombuffer(bytearray(bytes_of(spec)), dtype=spec.dtype)
                assert torch.equal(raw.view(spec.shape), one)
        assert experts.num_experts == COUNT
    assert found


@pytest.mark.parametrize(
    "name",
    ["qwen2_moe", "olmoe", "phimoe", "minimax_m2", "flex_olmo", "hunyuan_v1_moe", "ernie4_5_moe",
     "afmoe", "glm4_moe", "dots1", "minimax", "qwen3_next"],
)  # fmt: skip
def test_experts_of_other_types_are_found_and_nothing_that_all_share(
    tmp_path: Path, name: str
) -> None:
    if not has(name):
        pytest.skip(f"transformers does not have {name}")
    tiny_model(name).save_pretrained(tmp_path)
    found = [split_experts(layer) for layer in read_manifest(tmp_path).layers]
    mixtures = [(rest, experts) for rest, experts in found if experts is not None]
    assert mixtures
    for rest, experts in mixtures:
        assert (experts.num_experts, len(experts.banks)) == (COUNT, 3)
        assert not [key for key in rest.tensors if re.search(r"(^|\.)experts\.", key)]


def test_experts_of_two_sizes_in_one_layer_are_refused(tmp_path: Path) -> None:
    """Those for text and those for images, numbered through."""
    if not has("ernie4_5_vl_moe"):
        pytest.skip("transformers does not have ernie4_5_vl_moe")
    tiny_model("ernie4_5_vl_moe").save_pretrained(tmp_path)
    layers = read_manifest(tmp_path, "model.layers.{i}.").layers
    with pytest.raises(CheckpointError, match=r"expert \d: expected .* got .* of shape"):
        for layer in layers:
            split_experts(layer)
