"""Whose name is whose: schemas, prefixes, ties, what is missing and what is left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recipes import differences, loaded, made, made_all, manifest_of, write
from safetensors.torch import load_file
from tiny_models import has, tiny_class, tiny_config, tiny_model, tiny_model_on_meta

from layer_streamer import CheckpointError, ConfigError
from layer_streamer.modules.naming.names import Names, name_tensors

Tensors = dict[str, torch.Tensor]


def saved(name: str, folder: Path, **options: Any) -> Tensors:
    """A tiny model's checkpoint as a dict; its configuration lies in the folder."""
    tiny_model(name).save_pretrained(folder, **options)
    return load_file(folder / "model.safetensors")


def named(name: str, folder: Path, tensors: Tensors, **options: Any) -> Names:
    return name_tensors(tiny_model_on_meta(name), write(folder, tensors), **options)


def on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


@pytest.mark.parametrize(
    "name", ["llama", "mixtral", "nomic_bert", "llava", "clip", "qwen3_vl_moe", "dinov2_swiglu"]
)
def test_a_checkpoint_may_have_the_modules_own_names(name: str, tmp_path: Path) -> None:
    tensors = saved(name, tmp_path, save_original_format=False)
    names = named(name, tmp_path, tensors)
    assert [*names.recipes] == [n for n in tiny_model_on_meta(name).state_dict() if n in tensors]
    assert all(recipe.pieces[0].name == key for key, recipe in names.recipes.items())
    assert (names.missing, names.unused) == ((), ())
    assert differences(made_all(names), loaded(tiny_class(name), tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "base", "head"),
    [("llama", "LlamaModel", "LlamaForCausalLM"), ("gpt2", "GPT2Model", "GPT2LMHeadModel"),
     ("mixtral", "MixtralModel", "MixtralForCausalLM"), ("bert", "BertModel", "BertForMaskedLM"),
     ("vit", "ViTModel", "ViTForImageClassification"), ("t5", "T5Model", "T5EncoderModel"),
     ("qwen3_moe", "Qwen3MoeModel", "Qwen3MoeForCausalLM"),
     ("llava", "LlavaModel", "LlavaForConditionalGeneration")],
)  # fmt: skip
def test_base_and_head_models_load_each_others_checkpoints(
    name: str, base: str, head: str, tmp_path: Path
) -> None:
    classes = [getattr(transformers, base), getattr(transformers, head)]
    for saving, loading in (classes, classes[::-1]):
        folder = tmp_path / saving.__name__
        torch.manual_seed(0)
        saving(tiny_config(name)).save_pretrained(folder)
        reference, found = loaded(loading, folder, output_loading_info=True)
        names = name_tensors(on_meta(loading, reference.config), manifest_of(folder))
        assert {*names.missing} == {*found["missing_keys"]} - {*names.tied}
        assert len(names.unused) == len(found["unexpected_keys"])
        assert differences(made_all(names), reference, *names.missing, *names.made) == []


def test_older_names_of_norms_are_known(tmp_path: Path) -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in saved("bert", tmp_path).items()
    }
    assert any(name.endswith("gamma") for name in old)
    names = named("bert", tmp_path, old)
    assert (names.missing, names.unused) == ((), ())
    assert differences(made_all(names), loaded(tiny_class("bert"), tmp_path)) == []


def test_older_names_of_weight_norms_are_known(tmp_path: Path) -> None:
    old = {
        name.replace("parametrizations.weight.original0", "weight_g")
            .replace("parametrizations.weight.original1", "weight_v"): t
        for name, t in saved("wav2vec2", tmp_path).items()
    }  # fmt: skip
    assert any(name.endswith("weight_g") for name in old)
    names = named("wav2vec2", tmp_path, old)
    assert (names.missing, names.unused) == ((), ())
    assert differences(made_all(names), loaded(tiny_class("wav2vec2"), tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "useless"),
    [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("bert", "embeddings.position_ids"),
     ("clip", "text_model.embeddings.position_ids"), ("deepseek_v3", "model.layers.61.eh.weight")],
)  # fmt: skip
def test_what_the_class_ignores_is_not_unused(name: str, useless: str, tmp_path: Path) -> None:
    tensors = saved(name, tmp_path)
    other = {"model.something": torch.ones(2)}
    names = named(name, tmp_path, {**tensors, useless: torch.ones(3), **other})
    assert names.unused == ("model.something",)


def test_experts_that_are_stored_transposed_are_converted(tmp_path: Path) -> None:
    if not has("qwen3_vl_moe"):
        pytest.skip("this transformers has no qwen3_vl_moe")
    tensors = saved("qwen3_vl_moe", tmp_path)
    turned = {n: t.mT.contiguous() if ".experts." in n else t for n, t in tensors.items()}
    names = named("qwen3_vl_moe", tmp_path, turned)
    converted = [n for n, recipe in names.recipes.items() if recipe.convert]
    assert len(converted) == 2 * 3 and all(".experts." in n for n in converted)
    reference = tiny_model("qwen3_vl_moe")
    assert differences(made_all(names), reference) == []


TIED = "gemma3_text"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tied_head_shares_the_recipe_of_the_embedding(tmp_path: Path) -> None:
    names = named(TIED, tmp_path, saved(TIED, tmp_path))
    assert dict(names.tied) == {HEAD: EMBEDDING} and HEAD not in names.recipes
    assert names.missing == ()


def test_a_tied_embedding_shares_the_recipe_of_the_head_if_the_checkpoint_has_that(
    tmp_path: Path,
) -> None:
    tensors = saved(TIED, tmp_path)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    names = named(TIED, tmp_path, tensors)
    assert dict(names.tied) == {EMBEDDING: HEAD} and names.missing == ()
    assert differences(made_all(names), loaded(tiny_class(TIED), tmp_path)) == []


@pytest.mark.parametrize("equal", [True, False])
def test_of_tied_names_that_the_checkpoint_has_both_each_is_its_own(
    tmp_path: Path, equal: bool
) -> None:
    tensors = saved(TIED, tmp_path)
    tensors[HEAD] = tensors[EMBEDDING] + (not equal)
    names = named(TIED, tmp_path, tensors)
    assert dict(names.tied) == {} and {HEAD, EMBEDDING} <= {*names.recipes}
    assert differences(made_all(names), loaded(tiny_class(TIED), tmp_path)) == []


def test_of_several_tied_names_each_shares_with_the_one_that_its_class_names(
    tmp_path: Path,
) -> None:
    tensors = saved("t5", tmp_path)
    tensors["lm_head.weight"] = tensors["shared.weight"] + 1
    names = named("t5", tmp_path, tensors)
    assert {*names.tied.values()} == {"shared.weight"} and len(names.tied) == 2
    assert differences(made_all(names), loaded(tiny_class("t5"), tmp_path)) == []


def test_without_either_of_two_tied_names_both_are_missing(tmp_path: Path) -> None:
    tensors = saved(TIED, tmp_path)
    del tensors[EMBEDDING]
    names = named(TIED, tmp_path, tensors)
    assert names.missing == (EMBEDDING, HEAD) and dict(names.tied) == {}


def test_a_block_that_layers_share_is_one_recipe_and_ties(tmp_path: Path) -> None:
    names = named("zamba2", tmp_path, saved("zamba2", tmp_path))
    shared = {source for name, source in names.tied.items() if ".shared_transformer." in name}
    assert shared and all(source.startswith("model.layers.1.") for source in shared)


def test_what_the_class_makes_itself_is_not_missing(tmp_path: Path) -> None:
    names = named("marian", tmp_path, saved("marian", tmp_path))
    assert names.missing == () and len(names.made) == 2


def test_a_tensor_of_a_wrong_shape_is_named_with_its_parameter(tmp_path: Path) -> None:
    tensors = saved("llava", tmp_path)
    name = next(n for n in tensors if n.endswith("layers.1.self_attn.q_proj.weight"))
    tensors[name] = tensors[name][:3]
    with pytest.raises(CheckpointError) as caught:
        named("llava", tmp_path, tensors)
    message = str(caught.value)
    for part in ("model.safetensors", repr(name), "q_proj.weight", "[64, 64]", "[3, 64]"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("lacking", [".experts.3.w1.", ".experts.1.w2.", ".w3."])
def test_experts_that_lack_one_are_named_with_what_they_come_to(
    lacking: str, tmp_path: Path
) -> None:
    tensors = {n: t for n, t in saved("mixtral", tmp_path).items() if lacking not in n}
    with pytest.raises(CheckpointError, match=r"experts\.0\.w.*more.*experts\.(gate_up|down)_proj"):
        named("mixtral", tmp_path, tensors)


def test_experts_of_unequal_shapes_are_named_with_the_operation(tmp_path: Path) -> None:
    tensors = saved("mixtral", tmp_path)
    name = next(n for n in tensors if ".experts.2.w1." in n)
    tensors[name] = tensors[name][:5]
    with pytest.raises(CheckpointError, match=r"MergeModulelist.*cannot take.*equal size"):
        named("mixtral", tmp_path, tensors)


def test_a_part_of_a_fused_tensor_that_the_module_has_no_place_for_is_refused(
    tmp_path: Path,
) -> None:
    manifest = write(tmp_path, saved("nomic_bert", tmp_path))
    meta = tiny_model_on_meta("nomic_bert")
    meta.layers[1].self_attn.v_proj.weight = None
    with pytest.raises(CheckpointError, match=r"Wqkv.*Chunk.*v_proj\.weight' of it.*no place for"):
        name_tensors(meta, manifest)


def test_of_two_names_of_one_parameter_the_loaders_choice_is_taken(tmp_path: Path) -> None:
    tensors = saved("llama", tmp_path)
    twin = "model.layers.0.mlp.up_proj.weight"
    tensors[twin.removeprefix("model.")] = tensors[twin] + 1
    names = named("llama", tmp_path, tensors)
    assert len(names.unused) == 1 and names.missing == ()
    assert differences(made_all(names), loaded(tiny_class("llama"), tmp_path)) == []


def test_a_key_mapping_comes_before_all_else(tmp_path: Path) -> None:
    tensors = saved("mixtral", tmp_path)
    odd = {f"network.{name.replace('layers', 'stages')}": t for name, t in tensors.items()}
    mapping = {r"^network\.": "", r"stages\.(\d+)": r"layers.\1"}
    names = named("mixtral", tmp_path, odd, key_mapping=mapping)
    assert (names.missing, names.unused) == ((), ())
    want = loaded(tiny_class("mixtral"), tmp_path, key_mapping=mapping)
    assert differences(made_all(names), want) == []


def test_a_key_mapping_that_is_no_regular_expression_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"key_mapping: '\(' is no regular"):
        named("llama", tmp_path, {"a": torch.ones(1)}, key_mapping={"(": ""})


def test_a_name_that_a_mapping_would_spoil_is_taken_as_it_is(tmp_path: Path) -> None:
    mapping = {"layers": "stages"}
    names = named("llama", tmp_path, saved("llama", tmp_path), key_mapping=mapping)
    assert (names.missing, names.unused) == ((), ())
    want = loaded(tiny_class("llama"), tmp_path, key_mapping=mapping)
    assert differences(made_all(names), want) == []


def test_naming_changes_nothing_of_the_model(tmp_path: Path) -> None:
    meta = tiny_model_on_meta("mixtral")
    before = {name: id(t) for name, t in meta.state_dict(keep_vars=True).items()}
    tensors = write(tmp_path, saved("mixtral", tmp_path))
    first, again = name_tensors(meta, tensors), name_tensors(meta, tensors)
    assert {name: id(t) for name, t in meta.state_dict(keep_vars=True).items()} == before
    assert first.recipes.keys() == again.recipes.keys()
    assert all(first.recipes[n].pieces == again.recipes[n].pieces for n in first.recipes)


def test_a_persistent_buffer_has_a_recipe_like_a_parameter(tmp_path: Path) -> None:
    names = named("resnet", tmp_path, saved("resnet", tmp_path))
    counted = [n for n in names.recipes if n.endswith("num_batches_tracked")]
    assert counted and all(names.recipes[n].dtype == torch.int64 for n in counted)
    assert all(made(names.recipes[n]).shape == () for n in counted)
