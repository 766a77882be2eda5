"""Tensors that nothing uses: those that change nothing run, any other is refused by its name."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from assets import edit_weights, relative_error, tiny_checkpoint
from forward import open_forward
from packed_models import write_packed
from zoo import CASES, reference, stepwise, zoo_model

from layer_streamer import Manifest, TensorSpec, read_manifest
from layer_streamer.llm.errors import UnsupportedModelError
from layer_streamer.llm.metadata import load_config
from layer_streamer.llm.models.names import weight_names
from layer_streamer.llm.opening import Model
from layer_streamer.llm.weights.unused import changes_nothing

ATTENTION = "model.layers.1.self_attn."

CHANGE_NOTHING = [
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.rotary_emb.sin_cached",
    "model.layers.0.self_attn.rotary_emb.cos_sin_cache",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb_local.original_inv_freq",
    "model.rotary_emb.full_attention_inv_freq",
    "rotary_emb.inv_freq",
    "rope.freqs",
    "freqs_cis",
    "model.layers.2.self_attn.masked_bias",
    "model.layers.2.attn.masked_bias",
    "model.layers.0.self_attn.kv_scale",
    "model.layers.0.self_attn.k_scale",
    "model.layers.0.self_attn.v_scale",
    "model.layers.0.self_attn.q_scale",
    "model.layers.0.self_attn.attn.k_scale",
    "model.layers.0.self_attn.attn.v_scale",
    "model.layers.0.self_attn.k_proj.k_scale",
    "model.layers.0.self_attn.v_proj.v_scale",
    "model.layers.0.self_attn.qkv_proj.k_scale",
    "model.layers.0.self_attn.k_proj.output_scale",
    "model.layers.0.self_attn.v_proj.output_zero_point",
    "model.layers.0.self_attn.prob_output_scale",
    "model.layers.0.self_attn.kv_cache_scaling_factor",
    "model.layers.0.self_attn.q_proj.input_scale",
    "model.layers.0.mlp.down_proj.input_zero_point",
    "lm_head.input_scale",
    "optimizer.state.0.step",
    "model.layers.0.mlp.up_proj.weight.exp_avg",
    "model.norm.weight.exp_avg_sq",
    "mtp.fc.weight",
    "mtp.layers.0.input_layernorm.weight",
    "model.mtp_layers.0.hidden_layernorm.weight",
]
"""One value that is not 0, under each of these names, gives the same text."""

MAY_CHANGE = [
    "lm_head.bias",
    "model.norm.bias",
    "score.weight",
    "model.embed_positions.weight",
    "model.vision_tower.weight",
    "visual.blocks.0.norm1.weight",
    "rope_freqs.weight",
    "model.layers.1.self_attn.q_proj.weight_scale",
    "model.layers.1.self_attn.q_proj.lora_A.weight",
    "model.layers.1.self_attn.q_norm.weight",
    "model.layers.1.self_attn.sinks",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.1.self_attn.o_proj.bias",
    "model.layers.1.self_attn.bias",
    "model.layers.1.self_attn.rotary_emb.weight",
    "model.layers.1.self_attn.k_scales_of_heads",
    "model.layers.1.mlp.gate_proj.scale",
    "model.layers.1.mlp.act_fn.scales",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.pre_feedforward_layernorm.weight",
    "model.layers.1.layer_scalar",
    "model.layers.1.enorm.weight",
]


def spec(name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name, dtype, shape, Path("nowhere"), 0, 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A checkpoint of a plain model, and its logits."""
    model = zoo_model("llama")
    path = tiny_checkpoint(tmp_path_factory.mktemp("plain"), model)
    return path, reference(model)


def with_tensor(manifest: Manifest, name: str) -> Manifest:
    """The manifest with one more tensor, which has the values of the final norm."""
    spec = replace(manifest.static["model.norm.weight"], name=name)
    layer, _, key = name.removeprefix("model.layers.").partition(".")
    if not name.startswith("model.layers."):
        return replace(manifest, static={**manifest.static, name: spec})
    layers = list(manifest.layers)
    old = layers[int(layer)]
    layers[int(layer)] = replace(old, tensors={**old.tensors, key: spec})
    return replace(manifest, layers=tuple(layers))


def without(manifest: Manifest, name: str) -> Manifest:
    """The manifest without one tensor."""

    def rest(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {key: spec for key, spec in tensors.items() if spec.name != name}

    layers = tuple(replace(layer, tensors=rest(layer.tensors)) for layer in manifest.layers)
    return replace(manifest, static=rest(manifest.static), layers=layers)


def beside(source: Path, target: Path, **more: torch.Tensor) -> Path:
    """A copy of the checkpoint with more tensors; ``__`` in a name stands for a dot."""
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    named = {name.replace("__", "."): tensor for name, tensor in more.items()}
    edit_weights(target, lambda tensors: tensors.update(named))
    return target


def test_what_changes_nothing_may_lie_beside_the_weights(tmp_path, plain):
    source, expected = plain
    path = beside(source, tmp_path, **{name: torch.tensor([0.5]) for name in CHANGE_NOTHING})
    model = Model.read(path, pytest.fail)
    with open_forward(path, model.config) as forward:
        assert relative_error(stepwise(forward), expected) <= 1e-5


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_may_change_the_text_is_refused_by_name(plain, name):
    path = plain[0]
    with pytest.raises(UnsupportedModelError, match="is no part of a llama model") as caught:
        weight_names(with_tensor(read_manifest(path), name), load_config(path))
    assert f"{name!r} in {path / 'model.safetensors'}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["weight_packed", "qweight", "weight_scale", "scales", "qzeros"])
def test_a_module_that_is_stored_twice_is_refused(plain, kind):
    manifest = with_tensor(read_manifest(plain[0]), f"model.layers.1.mlp.up_proj.{kind}")
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.\w+'"):
        weight_names(manifest, load_config(plain[0]))


def test_biases_of_nothing_but_zeros_change_nothing(tmp_path, plain):
    names = [name for name in MAY_CHANGE if name.endswith(".bias")]
    path = beside(plain[0], tmp_path, **{name: torch.zeros(24).half() for name in names})
    Model.read(path, pytest.fail)
    for last in (torch.tensor([0.0] * 23 + [1e-7]).half(), torch.tensor([-0.0, torch.nan])):
        beside(plain[0], tmp_path, lm_head__bias=last)
        with pytest.raises(UnsupportedModelError, match=r"'lm_head.bias' is no part"):
            Model.read(path, pytest.fail)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16])
def test_a_causal_mask_is_known_by_its_shape(dtype):
    for name in ("self_attn.bias", "attn.bias", "attention.bias"):
        assert changes_nothing(name, spec(name, (1, 1, 8, 8), dtype))
        assert changes_nothing(name, spec(name, (8, 8), dtype))
        for shape in ((1, 2, 8, 8), (1, 1, 8, 9), (4, 16)):
            assert not changes_nothing(name, spec(name, shape, dtype))


def test_a_bias_of_zeros_beside_packed_words_changes_nothing_and_any_other_is_named(tmp_path):
    for value in (0.0, 0.25):
        path = write_packed(tmp_path, zoo_model("llama"), "gptq4-g32")
        bias = torch.full((96,), value)
        edit_weights(path, lambda t, bias=bias: t.update({ATTENTION + "q_proj.bias": bias}))
        if not value:
            Model.read(path, pytest.fail)
            continue
        with pytest.raises(UnsupportedModelError, match=r"'self_attn.q_proj.bias' is no part"):
            Model.read(path, pytest.fail)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_every_tensor_of_a_model_is_missed(tmp_path, name):
    model = zoo_model(name)
    path = tiny_checkpoint(tmp_path, model)
    config, manifest = load_config(path), read_manifest(path)
    known = list(model.state_dict())
    if CASES[name].get("tie_word_embeddings"):
        known.remove("lm_head.weight")
    for missing in known:
        with pytest.raises(UnsupportedModelError, match="is missing") as caught:
            weight_names(without(manifest, missing), config)
        assert missing.partition("layers.")[2][2:] in str(caught.value)
