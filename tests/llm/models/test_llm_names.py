"""Checkpoints whose tensors are not those of their config."""

import json

import pytest
import torch
from assets import edit_weights, tiny_checkpoint
from gguf_models import MIXED, write_gguf
from shapes import SHAPES, tensor_shapes
from zoo import zoo_config, zoo_model

from layer_streamer import read_manifest
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.config import UnsupportedModelError, model_config
from layer_streamer.llm.models.names import weight_names, weight_shapes


def refuse(path, hf_config, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        weight_names(read_manifest(path), model_config(hf_config))
    assert "\n" not in str(caught.value)


def drop(name: str):
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


LAYER = "model.layers.1."
MIXTRAL = LAYER + "block_sparse_moe."
ATTENTION = LAYER + "self_attn."


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("qwen2", drop(LAYER + "mlp.up_proj.weight"), "layer 1: tensor 'mlp.up_proj.weight' is mi"),
        ("qwen2", drop(ATTENTION + "k_proj.bias"), "k_proj.bias' is missing"),
        ("qwen2", drop("lm_head.weight"), "'lm_head.weight' is missing"),
        ("qwen2", put(ATTENTION + "o_proj.bias", torch.ones(64)), "'self_attn.o_proj.bias' is"),
        ("qwen2", put(ATTENTION + "q_norm.weight", torch.ones(16)), "no part of a qwen2 model"),
        ("qwen2", put("model.norm.weight", torch.ones(63)), r"has shape \[63\], .* says \[64\]"),
        ("qwen2", put("model.norm.weight", torch.ones(64, dtype=torch.int8)), "not a plain float"),
        ("qwen3", drop(ATTENTION + "q_norm.weight"), "q_norm.weight' is missing"),
        ("qwen3", put(ATTENTION + "k_norm.weight", torch.ones(16)), r"\[16\], .* says \[24\]"),
        ("llama", put(LAYER + "mlp.up_proj.bias", torch.ones(96)), "no part of a llama model with"),
        ("llama-biases", drop(LAYER + "mlp.up_proj.bias"), "up_proj.bias' is missing"),
        ("llama-biases", put(LAYER + "mlp.up_proj.bias", torch.ones(9)), r"\[9\], .* says \[96\]"),
        ("mistral", drop("model.embed_tokens.weight"), "'model.embed_tokens.weight' is missing"),
        ("gemma3_text", drop(LAYER + "pre_feedforward_layernorm.weight"), "pre_feed.* is missing"),
        ("mixtral", drop(MIXTRAL + "experts.3.w2.weight"), r"layer 1: .*experts.3.w2.weight' is m"),
        ("mixtral", drop(MIXTRAL + "gate.weight"), "1: tensor 'block_sparse_moe.gate.weight' is m"),
        ("olmoe", put(LAYER + "mlp.experts.8.up_proj.weight", torch.ones(96, 64)),
         "layer 1: tensor 'mlp.experts.8.up_proj.weight' is no part of a olmoe model"),
        ("qwen3_moe", put(LAYER + "mlp.experts.7.up_proj.weight", torch.ones(96, 64)),
         r"'model.layers.1.mlp.experts.7.up_proj.weight' has shape \[96, 64\], .* \[32, 64\]"),
        ("qwen2_moe", put(LAYER + "mlp.gate.weight", torch.ones(7, 64)), r"\[7, 64\], .*\[8, 64\]"),
        ("qwen2_moe", drop(LAYER + "mlp.shared_expert_gate.weight"), "expert_gate.weight' is miss"),
        ("qwen2_moe-dense", put(LAYER + "mlp.gate.weight", torch.ones(8, 64)), "is no part of a q"),
        ("qwen3_moe", put(LAYER + "mlp.up_proj.weight", torch.ones(96, 64)), "is no part of a qw"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_the_config_are_named(tmp_path, name, edit, message):
    model = zoo_model(name)
    edit_weights(tiny_checkpoint(tmp_path, model), edit)
    refuse(tmp_path, model.config, message)


def test_a_layer_count_that_contradicts_the_config_is_named(tmp_path):
    path = tiny_checkpoint(tmp_path, zoo_model("llama"))
    refuse(path, zoo_config("llama", num_hidden_layers=4), "3 layers, the config says 4")


def test_frequencies_that_older_checkpoints_repeat_are_ignored(tmp_path):
    model = zoo_model("llama")
    edit_weights(
        tiny_checkpoint(tmp_path, model),
        put(ATTENTION + "rotary_emb.inv_freq", torch.ones(8)),
    )
    names = weight_names(read_manifest(tmp_path), model_config(model.config))
    assert names.embedding == "model.embed_tokens.weight"


def test_the_head_is_the_embedding_where_the_config_or_the_file_says_so(tmp_path):
    for name in ("llama", "llama-tied"):
        model = zoo_model(name)
        path = tmp_path / f"{name}.gguf"
        write_gguf(path, model)
        names = weight_names(read_manifest(path), model_config(model.config))
        assert (names.head == names.embedding) == (name == "llama-tied")


def test_a_packed_type_that_the_engine_cannot_unpack_is_named(tmp_path, monkeypatch):
    model, path = zoo_model("llama", hidden_size=256), tmp_path / "tiny.gguf"
    monkeypatch.setitem(MIXED, "mlp.up_proj", "TQ2_0")
    write_gguf(path, model)
    refuse(path, model.config, r"ffn_up.weight' is TQ2_0, .* Q4_0, Q4_1, .* IQ4_XS, F32")


def test_rope_factors_of_another_width_are_named(tmp_path):
    model, path = zoo_model("llama"), tmp_path / "tiny.gguf"
    write_gguf(path, model, rope_factors=torch.ones(9))
    refuse(path, model.config, r"'rope_freqs.weight' has shape \[9\], the config says \[12\]")


IN_TURNS = "gpt_oss"
"""Has its experts' matrices in others' rows, which its own tests look at."""


@pytest.mark.parametrize(
    "name", [name for name, fields in SHAPES.items() if fields["model_type"] != IN_TURNS]
)
def test_the_tensors_of_known_models_are_those_that_the_config_asks_for(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(dict(SHAPES[name])))
    config = load_config(tmp_path)
    first = "model.layers.0."
    found = {
        key.removeprefix(first): shape
        for key, shape in tensor_shapes(SHAPES[name])
        if key.startswith(first)
    }
    mixture = config.family.mixture
    shapes = {
        module if mixture is None else mixture.hub_name(module): shape
        for module, shape in weight_shapes(config, 0).items()
    }
    expected = {f"{module}.weight": shape for module, shape in shapes.items()}
    expected |= {f"{module}.bias": shapes[module][:1] for module in config.biased}
    assert found == expected
    assert set(config.windows) == {None}
